"""Pictures of the page."""

import base64
import io

import torch
from PIL import Image
from torch.nn import functional as F

from trainer.evaluate.spurious import SpuriousScores
from trainer.report.measure import Shown, View
from trainer.report.pictures import SCALE, marked, principal_maps, scalar_map

GRID = (2, 3)


def opened(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def view(num_registers=0, width=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    unit = F.normalize(torch.randn(6 + num_registers, 8, generator=generator), dim=-1)
    scores = SpuriousScores(torch.zeros(6), torch.zeros(6), torch.zeros(6, dtype=torch.bool))
    registers = unit[6:] if num_registers else None
    return View(unit[:6], torch.ones(6), registers, width, scores)


def test_a_map_has_a_pixel_per_token_and_the_scale_s_ends():
    picture = opened(scalar_map(torch.tensor([0.0, -1, 0.5, 1, 2, 0.25]), GRID, 0, 1))

    assert picture.size == (3, 2)
    assert picture.getpixel((0, 0)) == picture.getpixel((1, 0)) == SCALE[0]
    assert picture.getpixel((2, 0)) == SCALE[4]
    assert picture.getpixel((0, 1)) == picture.getpixel((1, 1)) == SCALE[-1]


def test_values_that_are_all_equal_have_a_colour_too():
    assert opened(scalar_map(torch.ones(6), GRID, 1, 1)).getpixel((0, 0)) == SCALE[0]


def test_marked_tokens_have_the_colour_and_others_are_grey():
    image_3HW = torch.full((3, 32, 48), 128, dtype=torch.uint8)
    is_marked_N = torch.tensor([True, False, False, False, False, False])

    picture = opened(marked(image_3HW, is_marked_N, GRID, "#0072b2")).convert("RGB")

    red, green, blue = picture.getpixel((3, 3))
    assert blue > red + 60
    red, green, blue = picture.getpixel((20, 12))
    assert max(red, green, blue) - min(red, green, blue) < 12


def test_registers_frame_the_image_and_both_pictures_have_one_size():
    # Canvas of 4 x 5 with a border of 1: 14 registers around 2 x 3 tokens.
    views = {"raw": view(), "refined": view(14, 1, seed=1)}
    one = Shown("a", torch.zeros(3, 32, 48, dtype=torch.uint8), GRID, views, None)

    raw, refined = (opened(uri) for uri in principal_maps(one).values())

    assert raw.size == refined.size == (5 * 8 + 2 * 4, 4 * 8 + 2 * 4)
    assert raw.getpixel((3, 3))[3] == 0
    assert refined.getpixel((3, 3))[3] == 255
    assert refined.getpixel((9, 9))[3] == 0  # the gap
    assert refined.getpixel((14, 14))[3] == raw.getpixel((14, 14))[3] == 255
