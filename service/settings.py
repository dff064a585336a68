"""The service's settings: one frozen model, filled from flags, then `REFINERY_*` variables.

A field is the only place where a setting is written down: its name gives the flag
(`batch_tokens` -> `--batch-tokens`) and the variable (`REFINERY_BATCH_TOKENS`), its description
the help text.
"""

import argparse
import ipaddress
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from service.hints import nearest

ENV_PREFIX = "REFINERY_"
# Read by `kernels.dispatch` itself, which also checks it; importing that here would load torch.
KERNELS_VARIABLE = "REFINERY_KERNELS"
_MIB = 1024 * 1024


class SettingsError(Exception):
    """A flag or variable that does not exist or has an impossible value."""


class Settings(BaseModel):
    """Everything that an operator can choose."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(
        description="artifact folder, timm model name (hf-hub:... too) or local-dir:PATH"
    )
    weights: Path | None = Field(
        None, description="checkpoint file that goes with a timm model name"
    )
    random_weights: bool = Field(
        False, description="serve untrained weights of a timm model name, for load tests"
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?(,cuda:\d+)*)$",
        description="auto, cpu, cuda, or several as cuda:0,cuda:1; devices share one queue",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto is bf16 where the hardware has matrix units for it"
    )
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    insecure: bool = Field(
        False, description="allow a non-loopback --host although requests need no key"
    )
    max_body_bytes: int = Field(32 * _MIB, ge=1, description="largest request body, bytes")
    max_images: int = Field(32, ge=1, description="most images in a request")
    max_image_pixels: int = Field(
        40_000_000, ge=1, description="most pixels that an image's header may declare"
    )
    max_image_tokens: int = Field(
        8192,
        ge=1,
        description="most tokens, register border included, that one image may cost at the size "
        "asked for; memory and time of one forward grow with it",
    )
    max_image_boxes: int = Field(
        1000, ge=1, description="most boxes of one image, with the option boxes"
    )
    max_box_vectors: int = Field(
        65536,
        ge=1,
        description="most feature vectors that the boxes of a request may ask for (boxes x "
        "box_size^2 x layers), also those of a batch",
    )
    batch_tokens: int = Field(
        16384,
        ge=1,
        description="most tokens in a batch, at least --max-image-tokens; raise it until images "
        "per second stop growing",
    )
    decode_threads: int = Field(
        0, ge=0, le=256, description="threads that decode and resize images; 0: one per core"
    )
    torch_threads: int = Field(
        0, ge=0, le=1024, description="threads of one forward on a CPU; 0: one per core"
    )
    drain_seconds: float = Field(
        30.0, gt=0, description="how long SIGTERM waits for requests in flight"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least severe log line that is written"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.batch_tokens < self.max_image_tokens:
            # A batch that cannot hold the largest image would leave it in the queue for ever.
            raise ValueError(
                f"batch_tokens {self.batch_tokens} is less than max_image_tokens "
                f"{self.max_image_tokens}: set --batch-tokens to {self.max_image_tokens} or more"
            )
        if not self.insecure and not is_loopback(self.host):
            raise ValueError(
                f"host {self.host} can be reached from other machines and requests need no key: "
                "listen on 127.0.0.1 behind a proxy that authenticates, or add --insecure"
            )
        return self

    @property
    def num_decode_threads(self) -> int:
        return self.decode_threads or available_cores()

    @property
    def num_torch_threads(self) -> int:
        return self.torch_threads or available_cores()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
        parser.add_argument(flag, default=argparse.SUPPRESS, dest=name, metavar=metavar, help=text)


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
    where = "--" + name.replace("_", "-") if name in flags else ENV_PREFIX + name.upper()
    return f"{where} is {item['input']!r}: {message}"


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
