"""Reading recipes: shipped ones by name, files, and single values on top.

recipe = load_recipe("paper", ["data.batch_size=8", "optim.schedule=cosine"])
"""

import difflib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from trainer.config import Recipe
from trainer.errors import RecipeError


def recipe_names() -> list[str]:
    """The recipes that ship with the trainer."""
    names = (path.name for path in (resources.files("trainer") / "recipes").iterdir())
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def load_recipe(source: str, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        source: Name of a recipe that ships with the trainer, or a TOML file.
        settings: `section.key=value` each, applied on top; the value in TOML, quotes optional.

    Raises:
        RecipeError: no such recipe, not TOML, an unknown key, or a value that is not allowed.
    """
    try:
        values = tomllib.loads(_recipe_text(source))
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"recipe {source} is not valid TOML: {error}") from error
    for setting in settings:
        _apply(values, setting)
    return make_recipe(values, source)


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


def _recipe_text(source: str) -> str:
    path = Path(source)
    if path.suffix == ".toml" or len(path.parts) > 1:
        try:
            return path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"recipe file {source} cannot be read: {error}") from error
    if source not in recipe_names():
        raise RecipeError(
            f"no recipe is called {source!r}; there are {', '.join(recipe_names())}, "
            "or give a file that ends in .toml"
        )
    return (resources.files("trainer") / "recipes" / f"{source}.toml").read_text()


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
