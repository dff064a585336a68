"""Pictures of the page as data URIs: crops, colours of their features, what each filter takes."""

from collections.abc import Collection

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from trainer.doctor.measure import Masks, Shown
from trainer.pages import data_uri
from trainer.preview import principal_colors

_SIDE = 176
_REJECTED = torch.tensor([214, 40, 90])
_FILTERS = {
    "fixed_pattern": "fixed pattern",
    "global_proxy": "global proxy",
    "register_guided": "register-guided",
    "attention_hijack": "attention hijack",
    "clean": "all enabled",
}


def rows(
    shown: list[Shown], masks: Masks, grid: tuple[int, int], *, off: Collection[str]
) -> list[list[tuple[str, str]]]:
    """A row per image: pairs of caption and data URI. The filters named in `off` do not count."""
    found = []
    for one in shown:
        view = _pixels(one.view_3SS * 255)
        colors_NC = principal_colors(one.tokens_NC)
        cells = [
            ("image and crop", _with_box(one.image_3SS, one.box_4)),
            ("crop's tokens", _map(colors_NC * 255, grid)),
        ]
        for name, title in _FILTERS.items():
            clean_N = getattr(masks, name)[one.crop]
            caption = f"{title}: {float(clean_N.float().mean()):.0%} kept"
            if name == "attention_hijack":  # it judges only what the others kept
                all_N = masks.clean[one.crop]
                share = (all_N & clean_N).sum() / (all_N | ~clean_N).sum().clamp(min=1)
                caption = f"{title}: {float(share):.0%} of what the others keep"
            if name in off:
                caption += " (off)"
            cells.append((caption, _masked(view, clean_N.view(grid))))
        found.append([(caption, data_uri(picture, "JPEG")) for caption, picture in cells])
    return found


def _pixels(values_3hw: Tensor) -> Image.Image:
    array = values_3hw.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous()
    return Image.fromarray(array.numpy()).resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)


def _map(colors_N3: Tensor, grid: tuple[int, int]) -> Image.Image:
    array = colors_N3.view(*grid, 3).round().to(torch.uint8).contiguous().numpy()
    return Image.fromarray(array).resize((_SIDE, _SIDE), Image.Resampling.NEAREST)


def _with_box(image_3SS: Tensor, box_4: Tensor) -> Image.Image:
    picture = _pixels(image_3SS.float())
    x0, y0, x1, y1 = (box_4 * (_SIDE - 1)).tolist()
    pen = ImageDraw.Draw(picture)
    pen.rectangle((x0, y0, x1, y1), outline="black", width=4)
    pen.rectangle((x0 + 1, y0 + 1, x1 - 1, y1 - 1), outline="white", width=2)
    return picture


def _masked(view: Image.Image, clean_hw: Tensor) -> Image.Image:
    """The crop in grey, with rejected tokens in red over it."""
    grey = view.convert("L").point(lambda value: 60 + int(value * 0.75)).convert("RGB")
    rejected = Image.fromarray(((~clean_hw).to(torch.uint8) * 185).contiguous().numpy())
    mask = rejected.resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
    grey.paste(Image.new("RGB", grey.size, tuple(_REJECTED.tolist())), mask=mask)
    return grey
