import pytest
import torch
from torch.nn import functional as F

from backbone import open_model
from tests.support import tiny_artifact
from trainer.evaluate.norms import before_final_norm, norm_outliers


def tokens_of_norms(norms):
    directions = torch.randn(*norms.shape, 16, generator=torch.Generator().manual_seed(0))
    return F.normalize(directions, dim=-1) * norms[..., None]


def test_planted_outliers_are_counted_per_image():
    norms = 10 + torch.randn(2, 400, generator=torch.Generator().manual_seed(1))
    norms[0, :12] = 100  # the second image has none

    outliers = norm_outliers(tokens_of_norms(norms), deviations=5)

    assert outliers.share_B.tolist() == [12 / 400, 0]
    assert float(outliers.peak_B[0]) == pytest.approx(10, rel=0.02)
    assert float(outliers.peak_B[1]) < 1.5


def test_the_limit_is_the_median_and_robust_deviations():
    norms = torch.tensor([[8.0, 9.0, 10.0, 11.0, 12.0, 10 + 3 * 1.4826 + 0.01]])
    # Median 10.5, deviations 2.5 1.5 0.5 0.5 1.5 3.96: their median is 1.5.
    limit = (norms[0, -1] - 10.5) / (1.4826 * 1.5)

    found = [
        norm_outliers(tokens_of_norms(norms), deviations=float(limit) + d) for d in (-0.1, 0.1)
    ]

    assert [float(each.share_B) for each in found] == pytest.approx([1 / 6, 0])


def test_equal_norms_have_no_outliers():
    outliers = norm_outliers(tokens_of_norms(torch.full((1, 50), 3.0)))

    assert float(outliers.share_B) == 0
    assert float(outliers.peak_B) == pytest.approx(1)


def test_tokens_before_the_final_norm_are_what_it_is_applied_to(tmp_path):
    encoder = open_model(tiny_artifact(tmp_path / "a"), precision="fp32")
    image = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8)

    plain = before_final_norm(encoder).encode(image)[0].tokens

    normed = encoder.encode(image)[0].tokens
    torch.testing.assert_close(encoder.backbone.vit.norm(plain), normed)
    assert not torch.allclose(plain, normed)
    assert encoder.backbone.dense_norm
