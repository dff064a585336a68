import pytest
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch.nn import functional as F

from backbone.checkpoints import plan_loading, to_published
from backbone.digest import weights_digest
from tests.backbone.checkpoints.published import CASES, tensors_of, without_antialiasing

# Measured: 3e-6 for RMS norms and rotary embeddings, else to the bit or 1e-6.
CLOSE = {"rtol": 0, "atol": 1e-5}


def pixels_of(case, *grid):
    return torch.randn(2, 3, *(case.patch * side for side in grid))


@pytest.mark.parametrize("name", CASES)
def test_a_published_checkpoint_gives_transformers_features(tmp_path, name):
    case = CASES[name]
    model = case.write(tmp_path)
    pixels = pixels_of(case, 4, 4)

    backbone = case.read(tmp_path)
    with torch.no_grad():
        tokens = backbone.encode(pixels).tokens

    assert plan_loading(tensors_of(tmp_path), backbone.vit.state_dict()).layout is case.layout
    torch.testing.assert_close(tokens, case.features(model, pixels), **CLOSE)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.off_grid != "impossible"])
def test_other_grids_differ_by_antialiasing_alone(tmp_path, monkeypatch, name):
    case = CASES[name]
    model, backbone = case.write(tmp_path), case.read(tmp_path)

    for grid in ((6, 6), (5, 7)):
        pixels = pixels_of(case, *grid)
        expected = case.features(model, pixels)
        with torch.no_grad():
            timms = backbone.encode(pixels).tokens
        if case.off_grid == "exact":
            torch.testing.assert_close(timms, expected, **CLOSE)
            continue
        with without_antialiasing(monkeypatch), torch.no_grad():
            torch.testing.assert_close(backbone.encode(pixels).tokens, expected, **CLOSE)
        assert not torch.allclose(timms, expected, atol=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_writing_a_layout_and_reading_it_gives_the_same_weights(tmp_path, name):
    case = CASES[name]
    case.write(tmp_path / "theirs")
    state = case.read(tmp_path / "theirs").vit.state_dict()

    published = to_published(state, case.layout, depth=2)
    (tmp_path / "ours").mkdir()
    save_file(published, tmp_path / "ours" / "model.safetensors")

    again = case.read(tmp_path / "ours").vit.state_dict()
    assert again.keys() == state.keys()
    for key, value in again.items():
        assert torch.equal(value, state[key]), key
    theirs = tensors_of(tmp_path / "theirs")
    assert published.keys() <= theirs.keys()
    if "registers" not in name:  # the class token's position was added to it
        for key, value in published.items():
            assert torch.equal(value, theirs[key]), key


@pytest.mark.parametrize("name", ["clip", "siglip", "rice"])
def test_a_vision_tower_is_found_beside_a_text_tower(tmp_path, name):
    case = CASES[name]
    case.write(tmp_path / "alone")
    tensors = {f"vision_model.{k}": v for k, v in tensors_of(tmp_path / "alone").items()}
    tensors |= {
        "text_model.embeddings.position_ids": torch.arange(3),
        "text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(2, 2),
        "visual_projection.weight": torch.zeros(2, 32),
        "logit_scale": torch.zeros(()),
    }
    save_file(tensors, tmp_path / "both.safetensors")

    alone, both = case.read(tmp_path / "alone"), case.read(tmp_path / "both.safetensors")

    assert weights_digest(both.vit.state_dict()) == weights_digest(alone.vit.state_dict())


def field(power, side=32, channels=64):
    """Position embeddings with a spectrum of 1 / f^power: the higher, the smoother."""
    frequency = torch.fft.fftfreq(side)
    distance = (frequency[:, None] ** 2 + frequency[None] ** 2).sqrt().clamp_min(1 / side)
    noise = torch.fft.fft2(torch.randn(channels, side, side))
    return torch.fft.ifft2(noise / distance**power).real[None]


# White noise is the worst that there can be; trained position embeddings are smooth.
@pytest.mark.parametrize(("power", "low", "high"), [(0, 0.07, 0.09), (2, 0.005, 0.02)])
def test_how_far_antialiasing_takes_positions_from_transformers(power, low, high):
    torch.manual_seed(0)
    positions = field(power)

    for size in ((34, 34), (40, 40)):  # a register border of one, of four
        theirs = F.interpolate(positions, size, mode="bicubic", align_corners=False)
        ours = resample_abs_pos_embed(
            positions.flatten(2).transpose(1, 2), list(size), num_prefix_tokens=0
        )
        theirs = theirs.flatten(2).transpose(1, 2)
        assert low < float((ours - theirs).norm() / theirs.norm()) < high
