import pytest
import torch

from trainer.evaluate.errors import EvaluationError
from trainer.evaluate.windows import Windows, encode_grid, window_starts

PATCH = 4


def mean_colours(images):
    """Tokens that say what is at their place alone."""
    pooled = torch.nn.functional.avg_pool2d(images.float(), PATCH)
    return pooled.flatten(2).transpose(1, 2)


def pictures(height, width, count=2):
    generator = torch.Generator().manual_seed(0)
    shape = (count, 3, height, width)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(
    ("length", "size", "stride", "starts"),
    [
        (8, 8, 4, [0]),
        (4, 8, 4, [0]),
        (16, 8, 8, [0, 8]),
        (16, 8, 4, [0, 4, 8]),
        (20, 8, 8, [0, 8, 12]),
        (12, 8, 8, [0, 4]),
    ],
)
def test_windows_cover_a_side_and_end_flush(length, size, stride, starts):
    assert window_starts(length, size, stride) == starts


@pytest.mark.parametrize("windows", [None, Windows(8, 8), Windows(8, 4), Windows(64, 64)])
@pytest.mark.parametrize(("height", "width"), [(16, 24), (8, 20), (4, 12), (20, 4)])
def test_windows_give_what_the_whole_image_gives_where_tokens_are_local(height, width, windows):
    images = pictures(height, width)

    grid = encode_grid(mean_colours, images, patch_size=PATCH, windows=windows)

    assert grid.shape == (2, height // PATCH, width // PATCH, 3)
    expected = encode_grid(mean_colours, images, patch_size=PATCH)
    torch.testing.assert_close(grid, expected, rtol=1e-6, atol=1e-4)


def test_overlapping_windows_are_averaged():
    calls = iter(range(10))

    def numbered(images):
        return torch.full((len(images), images[0, 0].numel() // PATCH**2, 1), float(next(calls)))

    grid = encode_grid(numbered, pictures(8, 16, 1), patch_size=PATCH, windows=Windows(8, 4))

    assert grid[0, :, :, 0].tolist() == [[0.0, 0.5, 1.5, 2.0]] * 2


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (Windows(10, 4), "window size 10 px is not a whole number of 4 px patches; ask for 8"),
        (Windows(8, 2), "window stride 2 px is not a whole number"),
        (Windows(8, 12), "stride 12 px is more than the window's 8 px"),
    ],
)
def test_impossible_windows_are_refused(windows, message):
    with pytest.raises(EvaluationError, match=message):
        encode_grid(mean_colours, pictures(16, 16), patch_size=PATCH, windows=windows)


def test_tokens_that_do_not_fill_the_grid_are_refused():
    with pytest.raises(EvaluationError, match=r"shape \[2, 15, 3\]; \[2, 16, C\] was expected"):
        encode_grid(lambda images: mean_colours(images)[:, 1:], pictures(16, 16), patch_size=PATCH)
