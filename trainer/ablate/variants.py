"""The ablations: named sets of values on top of a recipe.

    named_variants("no-uni,served-width-2")
    parse_custom("hot:loss.temperature=0.5")

Source: UniRefiner, arXiv:2605.19622, ablations; `release` is what the authors' recipes do.
"""

import difflib
import re
from typing import NamedTuple

from trainer.errors import TrainerError
from trainer.recipe_file import Variant as Method

FULL = "full"
RAW = "raw"
RESERVED = (RAW, FULL, "features")
"""Names that stand for something else in the folder of a sweep."""

WIDE = "wide-registers"
_SERVED = re.compile(r"served-width-(\d+)")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
# A comma ends a value only where another `section.key=` follows: values may be lists.
_NEXT_SETTING = re.compile(r",(?=\s*[a-z_]+(?:\.[a-z_]+)+\s*=)")


class Variant(NamedTuple):
    """A row of the table.

    Attributes:
        name: Folder in OUTPUT, and what `--variants` takes.
        about: What it is, in words.
        settings: `section.key=value` each, on top of the recipe.
        method: What the recipe lies on instead; None: what it lies on.
        served_width: Border width in patches of the full run at inference; such a row is evaluated
            and not trained.
        is_custom: The user made it.
    """

    name: str
    about: str
    settings: tuple[str, ...] = ()
    method: Method | None = None
    served_width: int | None = None
    is_custom: bool = False


FULL_VARIANT = Variant(FULL, "the recipe as it is")

_AH = "filters.attention_hijack.enabled"
VARIANTS: tuple[Variant, ...] = (
    Variant("learnable-registers", "trained border, no noise", ("registers.fill=learnable",)),
    Variant("no-uni", "without L_uni: registers are not kept apart", ("loss.lambda_uni=0",)),
    Variant("no-spu", "without L_spu: registers absorb nothing", ("loss.lambda_spu=0",)),
    Variant("no-fp-gp", "without the FP-GP filter", ("filters.fp_gp.enabled=false",)),
    Variant("no-ah", "without the attention-hijack filter", (f"{_AH}=false",)),
    Variant(
        "with-ah",
        "with the attention-hijack filter, which the recipe has off",
        (f"{_AH}=true",),
    ),
    Variant(
        "no-register-guided",
        "without the register-guided filter",
        ("filters.register_guided.enabled=false",),
    ),
    # Its r_reg follows from the recipe.
    Variant(
        WIDE,
        "trained with a border twice as wide (r_reg divides the grid: a smaller number is a wider "
        "border)",
    ),
    Variant("fill-zeros", "border of zeros", ("registers.fill=zeros",)),
    Variant("fill-gaussian", "border of Gaussian noise", ("registers.fill=gaussian",)),
    Variant("fill-uniform", "border of uniform noise", ("registers.fill=uniform",)),
    Variant("matched", "targets matched to the full image", ("loss.matched=true",)),
    Variant("unmatched", "targets are the crop's own tokens", ("loss.matched=false",)),
    Variant("paper", "the recipe on the method as the paper has it", method="paper"),
    Variant("release", "the recipe on the method as the authors' release", method="release"),
)
"""In the order of the table."""


def served_variant(width: int) -> Variant:
    """The full run, served with a border of another width."""
    return Variant(
        f"served-width-{width}",
        f"the full run, served with a border of {width}",
        served_width=width,
    )


def parse_custom(text: str) -> Variant:
    """`NAME:section.key=value,section.key=value` as a variant.

    Raises:
        TrainerError: it is not of that form, or the name is taken.
    """
    name, colon, rest = text.partition(":")
    name = name.strip()
    settings = tuple(part.strip() for part in _NEXT_SETTING.split(rest) if part.strip())
    if not colon or not settings or not all("=" in setting for setting in settings):
        raise TrainerError(
            f"--variant {text!r} is not NAME:section.key=value,section.key=value, for example "
            "hot:loss.temperature=0.5"
        )
    if not _NAME.fullmatch(name):
        raise TrainerError(
            f"--variant {name!r} would be a folder's name; use letters, digits, - and _"
        )
    if any(setting.partition("=")[0].strip() == "run.seed" for setting in settings):
        raise TrainerError(
            f"--variant {text!r}: every variant is trained with the seeds of the sweep; leave "
            "run.seed out, and choose the first by --set run.seed=N and their number by --seeds"
        )
    known = {variant.name for variant in VARIANTS} | set(RESERVED)
    if name in known or _SERVED.fullmatch(name):
        raise TrainerError(f"--variant {name!r} is the name of something else; choose another")
    return Variant(name, "given by --variant", settings, is_custom=True)


def named_variants(names: str) -> list[Variant]:
    """`a,b,c` of `VARIANTS` and `served-width-N`, in the order of the table.

    Raises:
        TrainerError: a name is not known.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        _check_known(name)
    widths = {int(match[1]) for name in wanted if (match := _SERVED.fullmatch(name))}
    return [
        *(variant for variant in VARIANTS if variant.name in wanted),
        *(served_variant(width) for width in sorted(widths)),
    ]


def _check_known(name: str) -> None:
    known = [FULL, *(variant.name for variant in VARIANTS)]
    if name in known or name == RAW or _SERVED.fullmatch(name):
        return
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else "."
    raise TrainerError(
        f"no variant is called {name!r}; there are {', '.join(known)} and served-width-N (N in "
        f"patches){hint} Your own come by --variant NAME:section.key=value"
    )
