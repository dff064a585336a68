"""Variants of one recipe: what each sets there, or why it would be no row of its own.

source = RecipeSource("siglip2-so400m")
rows = resolve(choose_variants("no-uni,served-width-2", [], source), source)
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from backbone.errors import ModelError, ModelNotFoundError
from backbone.registers import border_width
from trainer.ablate.variants import (
    FULL,
    FULL_VARIANT,
    VARIANTS,
    WIDE,
    Variant,
    named_variants,
    parse_custom,
    served_variant,
)
from trainer.architecture import Architecture, architecture_of
from trainer.config import Recipe
from trainer.errors import RecipeError, TrainerError
from trainer.recipe_file import VARIANTS as METHODS
from trainer.recipe_file import Variant as Method
from trainer.recipe_file import load_recipe

# Times the border that is trained, for rows that are served with a wider one.
_SERVED_FACTORS = (2, 4)


@dataclass(frozen=True)
class RecipeSource:
    """A recipe as the user named it: what every variant is laid on."""

    name: str
    settings: tuple[str, ...] = ()

    @cached_property
    def full(self) -> Recipe:
        """The recipe that is ablated.

        Raises:
            RecipeError: see `load_recipe`.
        """
        return load_recipe(self.name, self.settings)

    @cached_property
    def _architecture(self) -> Architecture:
        return architecture_of(self.full.backbone.name)

    @property
    def size(self) -> int:
        """Side of the training images in pixels.

        Raises:
            ModelError: there is no such backbone.
        """
        return self.full.data.size or self._architecture.native_size

    @property
    def grid(self) -> int:
        """Side of the training image's grid in patches."""
        return self.size // self._architecture.patch

    @property
    def width(self) -> int:
        """Width in patches of the border that is trained."""
        registers = self.full.registers
        return border_width((self.grid, self.grid), registers.r_reg, registers.rounding)

    def check_backbone(self) -> None:
        """Refuse a recipe whose every row would fail, as its backbone cannot be found.

        Raises:
            RecipeError: there is no such model, or no such file or folder of weights.
        """
        section = self.full.backbone
        try:
            _ = self._architecture
        except ModelNotFoundError as error:
            problem = str(error)
        except ModelError:
            return  # it is here; who needs its sizes says what is wrong with it
        else:
            if section.weights is None or Path(section.weights).exists():
                return
            problem = f"backbone.weights {section.weights} does not exist"
        raise RecipeError(
            f"the backbone of recipe {self.name} cannot be found: {problem} (paths count from the "
            f"current folder, {Path.cwd()}; give --set backbone.name=PATH, or --backbone PATH, "
            "and --set backbone.weights=PATH where the recipe names weights)"
        )

    def laid_on(self, method: Method | None) -> tuple[str, Method | None]:
        """Recipe and variant for `load_recipe` and the command line, where `method` is wanted."""
        if method is not None and self.name in METHODS:
            return method, None  # the recipe is a method and nothing else: take the other
        return self.name, method

    def with_variant(self, variant: Variant, settings: Sequence[str]) -> Recipe:
        """The recipe with a variant's values on top.

        Raises:
            RecipeError: see `load_recipe`.
        """
        name, method = self.laid_on(variant.method)
        return load_recipe(name, [*self.settings, *settings], variant=method)


@dataclass(frozen=True)
class ResolvedVariant:
    """A variant of one recipe.

    Attributes:
        settings: All that the variant sets, those that follow from the recipe included.
        effect: What a variant of another method sets by that, in the same form.
        recipe: With them; of a row that is only served, the full one; None where it is skipped.
        skipped: Why it would not be a row of its own.
    """

    variant: Variant
    settings: tuple[str, ...] = ()
    effect: tuple[str, ...] = ()
    recipe: Recipe | None = field(default=None, repr=False)
    skipped: str = ""

    @property
    def name(self) -> str:
        return self.variant.name

    @property
    def changes(self) -> str:
        """What it does to the recipe, for people."""
        if self.variant.served_width is not None:
            return f"full run, --register-width {self.variant.served_width}"
        if self.variant.method is not None:
            effect = f": {' '.join(self.effect)}" if self.effect else ""
            return f"--variant {self.variant.method}{effect}"
        return " ".join(self.settings)


def choose_variants(
    names: str | None, custom: Sequence[str], source: RecipeSource
) -> list[Variant]:
    """The rows of a sweep but the raw backbone's: the full recipe first, the user's own last.

    Args:
        names: `a,b,c` of `VARIANTS`, and `served-width-N`; None for all, N two and four times the
            width that is trained.
        custom: `NAME:section.key=value,section.key=value` each.
        source: The recipe.

    Raises:
        TrainerError: a name is not known, or not one that a folder can have.
    """
    if names is None:
        served = [served_variant(factor * source.width) for factor in _SERVED_FACTORS]
        chosen = [*VARIANTS, *served]
    else:
        chosen = named_variants(names)
    own = [parse_custom(text) for text in custom]
    for number, variant in enumerate(own):
        if variant.name in (other.name for other in own[:number]):
            raise TrainerError(f"two variants are called {variant.name!r}; rename one of them")
    return [FULL_VARIANT, *chosen, *own]


def resolve(variants: Sequence[Variant], source: RecipeSource) -> list[ResolvedVariant]:
    """What each variant is on a recipe, or why it is not a row there.

    Raises:
        RecipeError, ModelError: the recipe cannot be read, its backbone is not here, or a variant
            of the user's own has a value that is not allowed.
    """
    taken = [(FULL, _values(source.full))]
    resolved = []
    for variant in variants:
        if variant.name == FULL or variant.served_width is not None:
            resolved.append(_resolve_full(variant, source))
            continue
        row = _resolve_one(variant, source)
        if row.recipe is not None:
            values = _values(row.recipe)
            same = next((name for name, other in taken if other == values), None)
            if same is None:
                taken.append((row.name, values))
            else:
                row = ResolvedVariant(variant, row.settings, skipped=_sameness(row, same))
        resolved.append(row)
    return resolved


def _resolve_full(variant: Variant, source: RecipeSource) -> ResolvedVariant:
    """The full recipe, or its run served otherwise."""
    # At the training size; a data set's own size may make the run's width another there.
    if variant.served_width is not None and variant.served_width == source.width:
        return ResolvedVariant(
            variant, skipped=f"the full run is served with a border of {source.width} already"
        )
    return ResolvedVariant(variant, recipe=source.full)


def _resolve_one(variant: Variant, source: RecipeSource) -> ResolvedVariant:
    settings = variant.settings
    try:
        if variant.name == WIDE:
            settings = (f"registers.r_reg={_doubling_r_reg(source)}",)
        recipe = source.with_variant(variant, settings)
    except (RecipeError, ModelError) as error:
        if variant.is_custom:
            raise RecipeError(f"variant {variant.name}: {error}") from error
        return ResolvedVariant(variant, settings, skipped=str(error))
    effect: tuple[str, ...] = ()
    if variant.method is not None:
        before, after = _flat(_values(source.full)), _flat(_values(recipe))
        effect = tuple(f"{k}={_as_text(after[k])}" for k in after if after[k] != before[k])
    return ResolvedVariant(variant, settings, effect, recipe)


def _doubling_r_reg(source: RecipeSource) -> int:
    """The r_reg nearest to half of the recipe's that makes the border twice as wide.

    Nearest to half, so that the border stays about twice as wide at other sizes.
    """
    registers, grid = source.full.registers, (source.grid, source.grid)
    wanted = 2 * source.width
    fitting = [
        r_reg
        for r_reg in range(1, registers.r_reg + 1)
        if border_width(grid, r_reg, registers.rounding) == wanted
    ]
    if not fitting:
        raise RecipeError(
            f"no registers.r_reg makes the border of {source.width} on a grid of {source.grid} "
            "exactly twice as wide"
        )
    return min(fitting, key=lambda r_reg: abs(2 * r_reg - registers.r_reg))


def _values(recipe: Recipe) -> dict[str, object]:
    return recipe.model_dump(mode="json", exclude={"name"})


def _flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Values by their dotted names."""
    found: dict[str, object] = {}
    for key, value in values.items():
        found |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return found


def _as_text(value: object) -> str:
    """As in TOML, a string without its quotes."""
    return value if isinstance(value, str) else json.dumps(value)


def _sameness(row: ResolvedVariant, other: str) -> str:
    whom = "the full recipe" if other == FULL else f"the variant {other}"
    if row.variant.method is not None:
        return f"equals {whom}, which is on {row.variant.method} already"
    return f"equals {whom}, which has {', '.join(row.settings)} already"
