import pytest
import torch

from backbone import RegisterBorder, multiplies_bf16, open_model
from backbone.encoder import choose_precision
from backbone.errors import ImageSizeError
from backbone.preprocess import normalize
from backbone.registers import register_mask, seeded_border, surround
from tests.support import tiny_artifact, tiny_backbone


def images(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@pytest.fixture
def encoder(tmp_path):
    return open_model(tiny_artifact(tmp_path / "a"), precision="fp32")


def test_the_border_is_laid_encoded_and_stripped(encoder):
    batch = images(2, 3, 48, 80)

    (features,) = encoder.encode(batch, registers=True)

    backbone = tiny_backbone()
    pixels = normalize(batch, mean=backbone.mean, std=backbone.std)
    canvas = surround(pixels, seeded_border("gaussian", (80, 112), 7), width=1, patch_size=16)
    tokens = backbone.encode(canvas).tokens
    mask = register_mask((3, 5), 1)
    assert features.grid == (3, 5)
    torch.testing.assert_close(features.tokens, tokens[:, ~mask])
    torch.testing.assert_close(features.registers, tokens[:, mask])


def test_the_same_images_give_the_same_bytes(encoder):
    batch = images(2, 3, 64, 64)

    first = encoder.encode(batch)[0].tokens
    torch.manual_seed(123)

    assert torch.equal(first, encoder.encode(batch)[0].tokens)


def test_several_layers_come_stripped(encoder):
    first, last = encoder.encode(images(1, 3, 64, 64), layers=[0, -1])

    assert first.tokens.shape == last.tokens.shape == (1, 16, 32)
    assert not torch.equal(first.tokens, last.tokens)


def test_a_wider_border_can_be_asked_for(encoder):
    (narrow,) = encoder.encode(images(1, 3, 64, 64))
    (wide,) = encoder.encode(images(1, 3, 64, 64), register_width=3, registers=True)
    (none,) = encoder.encode(images(1, 3, 64, 64), register_width=0, registers=True)

    assert narrow.tokens.shape == wide.tokens.shape == none.tokens.shape
    assert wide.registers.shape[1] == 10 * 10 - 16
    assert none.registers is None


def test_a_negative_border_is_refused(encoder):
    with pytest.raises(ImageSizeError, match="negative"):
        encoder.encode(images(1, 3, 64, 64), register_width=-1)


def test_tokens_of_an_image_count_border_and_prefix(encoder):
    assert encoder.num_tokens(64, 96) == (4 + 2) * (6 + 2) + 1
    assert encoder.num_tokens(64, 96, register_width=0) == 4 * 6 + 1


@pytest.mark.parametrize(("expects_raw", "warnings"), [(False, 1), (True, 0)])
def test_a_raw_backbone_is_warned_of_unless_it_is_expected(caplog, expects_raw, warnings):
    open_model("vit_tiny_patch16_224", random_weights=True, expects_raw=expects_raw)

    assert caplog.text.count("is not an artifact: features are raw") == warnings


def test_a_raw_backbone_has_no_border():
    encoder = open_model("vit_tiny_patch16_224", random_weights=True, precision="fp32")

    (features,) = encoder.encode(images(1, 3, 32, 32))

    assert features.registers is None
    assert encoder.border is None
    assert len(encoder.digest) == 64
    with pytest.raises(ImageSizeError, match="was not refined"):
        encoder.encode(images(1, 3, 32, 32), register_width=1)


def test_bf16_stays_close_to_fp32(tmp_path):
    folder = tiny_artifact(tmp_path / "a")
    batch = images(4, 3, 64, 64)

    (exact,) = open_model(folder, precision="fp32").encode(batch)
    (fast,) = open_model(folder, precision="bf16").encode(batch)

    assert fast.tokens.dtype == torch.bfloat16
    cosine = torch.cosine_similarity(exact.tokens, fast.tokens.float(), dim=-1)
    assert cosine.min() > 0.999


def test_auto_precision_follows_the_hardware(monkeypatch):
    cpu = torch.device("cpu")
    assert choose_precision("auto", cpu) == ("bf16" if multiplies_bf16(cpu) else "fp32")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False})
    assert choose_precision("auto", cpu) == "fp32"
    assert choose_precision("bf16", cpu) == "bf16"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: not run")
def test_cuda_agrees_with_cpu(tmp_path):
    folder = tiny_artifact(tmp_path / "a", border=RegisterBorder(seed=1))
    batch = images(2, 3, 64, 64)

    (cpu,) = open_model(folder, precision="fp32").encode(batch)
    (cuda,) = open_model(folder, precision="fp32", device="cuda").encode(batch)

    torch.testing.assert_close(cuda.tokens.cpu(), cpu.tokens, atol=1e-3, rtol=1e-3)
