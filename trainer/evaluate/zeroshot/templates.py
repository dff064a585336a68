"""Sentences that a class name is put into, `{}` standing for the name.

A class's text embedding is the mean over its sentences. Source: Radford et al. 2021 (CLIP,
arXiv:2103.00020), whose repository lists the 80 sentences for ImageNet (notebooks/
Prompt_Engineering_for_ImageNet.ipynb) and the seven of them that do nearly as well.
"""

from pathlib import Path

from trainer.evaluate.zeroshot.errors import ZeroshotError

IMAGENET_80 = (
    "a bad photo of a {}.",
    "a photo of many {}.",
    "a sculpture of a {}.",
    "a photo of the hard to see {}.",
    "a low resolution photo of the {}.",
    "a rendering of a {}.",
    "graffiti of a {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.",
    "a tattoo of a {}.",
    "the embroidered {}.",
    "a photo of a hard to see {}.",
    "a bright photo of a {}.",
    "a photo of a clean {}.",
    "a photo of a dirty {}.",
    "a dark photo of the {}.",
    "a drawing of a {}.",
    "a photo of my {}.",
    "the plastic {}.",
    "a photo of the cool {}.",
    "a close-up photo of a {}.",
    "a black and white photo of the {}.",
    "a painting of the {}.",
    "a painting of a {}.",
    "a pixelated photo of the {}.",
    "a sculpture of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a plastic {}.",
    "a photo of the dirty {}.",
    "a jpeg corrupted photo of a {}.",
    "a blurry photo of the {}.",
    "a photo of the {}.",
    "a good photo of the {}.",
    "a rendering of the {}.",
    "a {} in a video game.",
    "a photo of one {}.",
    "a doodle of a {}.",
    "a close-up photo of the {}.",
    "a photo of a {}.",
    "the origami {}.",
    "the {} in a video game.",
    "a sketch of a {}.",
    "a doodle of the {}.",
    "a origami {}.",
    "a low resolution photo of a {}.",
    "the toy {}.",
    "a rendition of the {}.",
    "a photo of the clean {}.",
    "a photo of a large {}.",
    "a rendition of a {}.",
    "a photo of a nice {}.",
    "a photo of a weird {}.",
    "a blurry photo of a {}.",
    "a cartoon {}.",
    "art of a {}.",
    "a sketch of the {}.",
    "a embroidered {}.",
    "a pixelated photo of a {}.",
    "itap of the {}.",
    "a jpeg corrupted photo of the {}.",
    "a good photo of a {}.",
    "a plushie {}.",
    "a photo of the nice {}.",
    "a photo of the small {}.",
    "a photo of the weird {}.",
    "the cartoon {}.",
    "art of the {}.",
    "a drawing of the {}.",
    "a photo of the large {}.",
    "a black and white photo of a {}.",
    "the plushie {}.",
    "a dark photo of a {}.",
    "itap of a {}.",
    "graffiti of the {}.",
    "a toy {}.",
    "itap of my {}.",
    "a photo of a cool {}.",
    "a photo of a small {}.",
    "a tattoo of the {}.",
)

SHORT = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)

NAMED = {"imagenet80": IMAGENET_80, "short": SHORT, "plain": ("a photo of a {}.",), "name": ("{}",)}
"""What `--templates` takes, beside a file."""


def read_templates(spec: str) -> tuple[str, ...]:
    """Sentences by name, or of a text file with one per line.

    Raises:
        ZeroshotError: no such name or file, or a sentence has not exactly one place for the name.
    """
    if spec in NAMED:
        return NAMED[spec]
    path = Path(spec)
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ZeroshotError(
            f"templates {spec!r} are neither one of {', '.join(NAMED)} nor a text file that can be "
            f"read ({error})"
        ) from error
    templates = tuple(line for line in lines if line and not line.startswith("#"))
    wrong = next((line for line in templates if line.count("{}") != 1), None)
    if not templates or wrong is not None:
        raise ZeroshotError(
            f"{path} has {'no sentence' if wrong is None else f'the line {wrong!r}'}; every line "
            "is a sentence with one {} for the class name"
        )
    return templates
