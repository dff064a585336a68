"""Reading recipes: shipped ones by name, files, variants, and single values on top.

    recipe = load_recipe("paper", ["data.batch_size=8", "optim.schedule=cosine"])
    recipe = load_recipe("eva-clip-8b", variant="release")

A recipe is layers of values, later ones on top: the defaults of `trainer.config`, the variant
(`paper.toml` or `release.toml`: how the method is done), the recipe (what a backbone needs, in
either variant), single settings. A recipe may itself lie on another: `extends = "dinov2-g"`, the
name of one that ships or a file beside it.
"""

import difflib
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, ValidationError

from trainer.config import Recipe
from trainer.errors import RecipeError

Variant = Literal["paper", "release"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)


class _Layer(NamedTuple):
    """One file of a recipe: what names it in errors, and what it says."""

    source: str
    values: dict[str, Any]


def recipe_names() -> list[str]:
    """The recipes that ship with the trainer, variants included."""
    names = (path.name for path in (resources.files("trainer") / "recipes").iterdir())
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def load_recipe(
    source: str, settings: Sequence[str] = (), *, variant: Variant | None = None
) -> Recipe:
    """Read a recipe.

    Args:
        source: Name of a recipe that ships with the trainer, or a TOML file.
        settings: `section.key=value` each, applied on top; the value in TOML, quotes optional.
        variant: What the recipe lies on; none: what its files say, else `paper`.

    Raises:
        RecipeError: no such recipe, not TOML, an unknown key, or a value that is not allowed.
    """
    layers = _stack(source, variant)
    values: dict[str, Any] = {}
    for layer in layers:
        values = _merge(values, layer.values)
    if layers[0].source != "paper" and len(layers) > 1:
        values["name"] = f"{values['name']} ({layers[0].source})"
    for setting in settings:
        _apply(values, setting)
    return make_recipe(values, source)


def variant_of(source: str, variant: Variant | None = None) -> Variant:
    """The variant that `load_recipe` would put under a recipe.

    Raises:
        RecipeError: see `load_recipe`.
    """
    root = _stack(source, variant)[0].source
    return next(known for known in VARIANTS if known == root)


def make_recipe(values: Mapping[str, Any], source: str) -> Recipe:
    """Check values against the recipe's fields; `source` is named in errors.

    Raises:
        RecipeError: see `load_recipe`.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"recipe {source}: {_explain(error)}") from error


def field_names(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    """Dotted names of all values of a recipe."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from field_names(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


def _stack(source: str, variant: Variant | None) -> list[_Layer]:
    """A variant, and the files of a recipe on top of it."""
    layers = _layers(source)
    root = layers[0].source
    if root not in VARIANTS:
        root = variant or "paper"
        return [_Layer(root, _read(root)), *layers]
    if variant not in (None, root):
        raise RecipeError(
            f"recipe {source} is of the variant {root} already, and --variant {variant} was asked "
            "for; leave one of the two out"
        )
    return layers


def _layers(source: str) -> list[_Layer]:
    """A recipe's own files, the one that everything else lies on first."""
    layers: list[_Layer] = []
    wanted: str | None = source
    while wanted is not None:
        if any(layer.source == wanted for layer in layers):
            chain = " -> ".join([*(layer.source for layer in layers), wanted])
            raise RecipeError(f"recipe {source} extends itself: {chain}")
        values = _read(wanted)
        base = values.pop("extends", None)
        if not isinstance(base, str | None):
            raise RecipeError(
                f"recipe {wanted}: extends is {base!r}; give the name of one recipe or a file"
            )
        layers.append(_Layer(wanted, values))
        if base is not None and _is_file(base) and _is_file(wanted):
            base = os.path.normpath(Path(wanted).parent / base)
        wanted = base
    return layers[::-1]


def _read(source: str) -> dict[str, Any]:
    """What a recipe file says; one without a name has that of its file."""
    try:
        values = tomllib.loads(_recipe_text(source))
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"recipe {source} is not valid TOML: {error}") from error
    return {"name": Path(source).stem if _is_file(source) else source} | values


def _is_file(source: str) -> bool:
    path = Path(source)
    return path.suffix == ".toml" or len(path.parts) > 1


def _recipe_text(source: str) -> str:
    if _is_file(source):
        try:
            return Path(source).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"recipe file {source} cannot be read: {error}") from error
    names = recipe_names()
    if source not in names:
        near = difflib.get_close_matches(source, names, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise RecipeError(
            f"no recipe is called {source!r}; there are demo, paper, release and one for each "
            f"backbone, which `python -m trainer recipes` lists. {hint}"
            "A file's name ends in .toml"
        )
    return (resources.files("trainer") / "recipes" / f"{source}.toml").read_text()


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`; tables are merged, lists are replaced."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            value = _merge(old, value)
        merged[key] = value
    return merged


def _apply(values: dict[str, Any], setting: str) -> None:
    name, equals, text = setting.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(
            f"--set {setting!r} is not section.key=value, for example loss.temperature=0.1"
        )
    for key in keys[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise RecipeError(f"--set {setting!r}: {key} is a value, not a section")
    values[keys[-1]] = _value(text.strip())


def _value(text: str) -> Any:
    if text == "none":
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a string without its quotes


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            if isinstance(problem["input"], dict) and problem["input"]:
                name += "." + next(iter(problem["input"]))  # an unknown section: show what is in it
            lines.append(f"unknown key {name}; {_nearest(name)}")
        else:
            got = f" (got {problem['input']!r})" if problem["type"] != "value_error" else ""
            lines.append(f"{name}: {problem['msg']}{got}")
    return "; ".join(lines)


def _nearest(name: str) -> str:
    known = list(field_names())
    leaf = name.rsplit(".", 1)[-1]
    elsewhere = [other for other in known if other.rsplit(".", 1)[-1] == leaf]
    near = difflib.get_close_matches(name, elsewhere or known, n=1, cutoff=0.0)
    return f"the nearest valid key is {near[0]}"
