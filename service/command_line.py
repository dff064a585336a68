"""The service's command line: one flag and one `REFINERY_*` variable per field of `Settings`.

A field's name gives the flag (`batch_tokens` -> `--batch-tokens`) and the variable
(`REFINERY_BATCH_TOKENS`), its description the help text.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import ValidationError

from service.hints import nearest
from service.settings import Settings, SettingsError, without_password

ENV_PREFIX = "REFINERY_"
# Read by `kernels.dispatch` itself, which also checks it; importing that here would load torch.
KERNELS_VARIABLE = "REFINERY_KERNELS"
_REPEATED = ("model",)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag per field of `Settings`; what is not given is left out of the namespace."""
    for name, field in Settings.model_fields.items():
        required = field.is_required()
        default = "required" if required else f"default {_shown(field.default)}"
        text = f"{field.description} ({default}; {ENV_PREFIX}{name.upper()})".replace("%", "%%")
        flag = "--" + name.replace("_", "-")
        if field.annotation is bool:
            parser.add_argument(
                flag, action="store_true", default=argparse.SUPPRESS, dest=name, help=text
            )
            continue
        choices = getattr(field.annotation, "__args__", None)
        metavar = (
            "|".join(choices)
            if choices and all(isinstance(choice, str) for choice in choices)
            else name.rsplit("_", 1)[-1].upper()
        )
        action = "append" if name in _REPEATED else "store"
        parser.add_argument(
            flag, action=action, default=argparse.SUPPRESS, dest=name, metavar=metavar, help=text
        )


def load_settings(flags: Mapping[str, Any], environment: Mapping[str, str]) -> Settings:
    """Flags over variables over defaults.

    Raises:
        SettingsError: an unknown `REFINERY_*` variable, or a value that is not possible.
    """
    values: dict[str, Any] = dict(_from_environment(environment))
    values.update(flags)
    if "model" not in values:
        raise SettingsError(f"no model given: add --model models/demo, or set {ENV_PREFIX}MODEL")
    try:
        return Settings(**values)
    except ValidationError as error:
        raise SettingsError("; ".join(_explain(item, flags) for item in error.errors())) from None


def _from_environment(environment: Mapping[str, str]) -> dict[str, str]:
    values = {}
    for variable, value in environment.items():
        if not variable.startswith(ENV_PREFIX) or variable == KERNELS_VARIABLE:
            continue
        name = variable.removeprefix(ENV_PREFIX).lower()
        if name not in Settings.model_fields or variable != variable.upper():
            known = [ENV_PREFIX + field.upper() for field in Settings.model_fields]
            hint = nearest(variable.upper(), [*known, KERNELS_VARIABLE])
            raise SettingsError(f"unknown variable {variable}: {hint}")
        values[name] = value
    return values


def _explain(item: Any, flags: Mapping[str, Any]) -> str:
    message = str(item["msg"]).removeprefix("Value error, ")
    if not item["loc"]:
        return message
    name = str(item["loc"][0])
    if item["type"] == "string_pattern_mismatch":  # the pattern says nothing to people
        message = f"give {Settings.model_fields[name].description}"
    where = "--" + name.replace("_", "-") if name in flags else ENV_PREFIX + name.upper()
    given = item["input"]
    shown = without_password(given) if isinstance(given, str) else given
    return f"{where} is {shown!r}: {message}"


def _shown(default: object) -> str:
    if default is None:
        return "none"
    if default is False:
        return "off"
    return str(default)


class Invocation(NamedTuple):
    """What a command line asks for."""

    settings: Settings
    print_config: bool


def parse_arguments(arguments: Sequence[str], environment: Mapping[str, str]) -> Invocation:
    """Settings of a command line.

    Raises:
        SettingsError: see `load_settings`.
        SystemExit: `--help`, or an unknown flag.
    """
    parser = argparse.ArgumentParser(
        prog="python -m service",
        description="Serve dense image features over HTTP: POST /features, documentation at /docs.",
        epilog=f"A flag wins over its variable. {KERNELS_VARIABLE} chooses what computes attention "
        "and boxes: auto (default) takes the Triton kernels where they are made for the GPU and "
        "PyTorch elsewhere, reference takes PyTorch everywhere, triton takes the kernels or fails; "
        "the log says once what runs. Exit status: 0 after SIGTERM with every request "
        "answered, 1 when the drain deadline cut some off or the service failed, 2 for settings "
        "or a model that cannot be used.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the settings as JSON and exit"
    )
    add_flags(parser)
    flags = vars(parser.parse_args(arguments))
    print_config = bool(flags.pop("print_config"))
    return Invocation(load_settings(flags, environment), print_config)
