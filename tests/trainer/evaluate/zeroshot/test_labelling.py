import pytest
import torch
from torch.nn import functional as F

from trainer.evaluate.zeroshot.labelling import label_map
from trainer.evaluate.zeroshot.vocabulary import Vocabulary


def vocabulary(classes, *, background=None, rule="none"):
    names = tuple(f"name{n}" for n in range(len(classes)))
    return Vocabulary(names, tuple(classes), max(classes) + 1, background, rule)


@pytest.mark.parametrize("strip_values", [1, 500, 2**25])
@pytest.mark.parametrize("size", [(33, 50), (3, 4), (7, 90)])
def test_logits_are_upsampled_bilinearly(size, strip_values):
    cosines = torch.randn(6, 9, 5, generator=torch.Generator().manual_seed(0))

    found = label_map(cosines, vocabulary(range(5)), size, scale=40, strip_values=strip_values)

    up = F.interpolate(cosines.permute(2, 0, 1)[None], size, mode="bilinear", align_corners=False)
    # In float32 two names may all but tie.
    top = up[0].topk(2, dim=0).values
    is_clear = top[0] - top[1] > 1e-5
    assert is_clear.float().mean() > 0.99
    assert torch.equal(found[is_clear], up[0].argmax(dim=0)[is_clear])


def test_a_class_is_as_good_as_its_best_name():
    cosines = torch.tensor([[[0.1, 0.2, 0.9, 0.8]]])

    found = label_map(cosines, vocabulary([2, 1, 0, 0]), (1, 1), scale=1)

    assert found.tolist() == [[0]]
    cosines[..., 1] = 1.0
    assert label_map(cosines, vocabulary([2, 1, 0, 0]), (2, 2), scale=1).unique().tolist() == [1]


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [(None, 2), (0.7, 2), (0.74, 0)],  # e / (e + 1) = 0.731
)
def test_pixels_of_low_probability_are_background(threshold, expected):
    cosines = torch.tensor([[[0.0, 0.5]]])
    names = vocabulary([1, 2], background=0, rule="threshold")

    found = label_map(cosines, names, (3, 3), scale=2.0, threshold=threshold)

    assert found.unique().tolist() == [expected]
    # A sharper softmax is surer of the same pixel.
    sure = label_map(cosines, names, (3, 3), scale=8.0, threshold=threshold)
    assert sure.unique().tolist() == [2]


def test_names_of_the_background_win_like_others():
    names = vocabulary([0, 0, 1], background=0, rule="names")

    found = label_map(torch.tensor([[[0.1, 0.6, 0.5]]]), names, (1, 1), scale=40)

    assert found.tolist() == [[0]]
