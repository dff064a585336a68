import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from backbone import DenseEncoder
from backbone.value_path import encode_value_path
from tests.support import tiny_backbone
from tests.trainer.evaluate.zeroshot import towers
from trainer.evaluate.subjects import LocalSubject
from trainer.evaluate.zeroshot import (
    AlignedSubject,
    ZeroshotError,
    check_pair,
    default_path,
    find_tower,
    read_head,
)

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    return folder, towers.write_clip(folder)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip")
    return folder, towers.write_siglip(folder)


@pytest.fixture(scope="module")
def eva(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eva-clip")
    return folder, towers.write_eva_clip(folder)[0]


def images(side=64):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=generator)


def aligned(backbone, folder, family, path=None):
    encoder = DenseEncoder(backbone, digest="d", precision="fp32")
    head = read_head(find_tower(str(folder)), family)
    return encoder, AlignedSubject(LocalSubject(encoder), head, path or default_path(family))


@torch.no_grad()
def test_clips_dense_embeddings_are_transformers_value_path(clip):
    folder, model = clip
    encoder, subject = aligned(towers.clip_backbone(folder), folder, "clip")

    found = subject.encode(images())

    vision = model.vision_model
    states = vision(encoder.canvas(images(), 0), output_hidden_states=True).hidden_states
    last = vision.encoder.layers[-1]
    values = last.self_attn.out_proj(last.self_attn.v_proj(last.layer_norm1(states[-2])))
    expected = model.visual_projection(vision.post_layernorm(values))[:, 1:]
    torch.testing.assert_close(found, F.normalize(expected, dim=-1), **CLOSE)


@torch.no_grad()
def test_one_patch_is_pooled_as_the_image_is(siglip):
    # With a single token attention is the identity: the pooled image is its value path.
    folder, model = siglip
    backbone = towers.siglip_backbone(folder)
    encoder, subject = aligned(backbone, folder, "siglip")

    tokens = encode_value_path(encoder, images(), path="none").tokens
    found = read_head(find_tower(str(folder)), "siglip")(tokens[:, :1])

    expected = model.vision_model.head(tokens[:, :1])
    torch.testing.assert_close(found[:, 0], expected, **CLOSE)
    states = model.vision_model(encoder.canvas(images(), 0)).last_hidden_state
    each = torch.stack([model.vision_model.head(states[:, [n]]) for n in range(16)], dim=1)
    torch.testing.assert_close(subject.encode(images()), F.normalize(each, dim=-1), **CLOSE)


@torch.no_grad()
def test_eva_clips_dense_embeddings(eva, tmp_path):
    folder, reference = eva
    encoder, subject = aligned(towers.eva_backbone(folder), folder, "clip")
    canvas = encoder.canvas(images(56), 0)

    found = subject.encode(images(56))

    tower = reference.vision_model
    patches = tower.embeddings.patch_embedding(canvas).flatten(2).transpose(1, 2)
    first = tower.embeddings.class_embedding.expand(len(canvas), 1, -1)
    x = torch.cat([first, patches], dim=1) + tower.embeddings.position_embedding.weight
    before = tower.encoder.layers[0](x)
    last = tower.encoder.layers[1]
    values = last.self_attn.out_proj(last.self_attn.v_proj(last.layer_norm1(before)))
    expected = reference.visual_projection(tower.post_layernorm(values))[:, 1:]
    torch.testing.assert_close(found, F.normalize(expected, dim=-1), **CLOSE)
    torch.save(reference.in_the_authors_names(), tmp_path / "EVA.pt")
    theirs = read_head(find_tower(str(tmp_path / "EVA.pt")), "clip")
    assert theirs.digest == read_head(find_tower(str(folder)), "clip").digest


def test_heads_are_read_by_every_name_they_have(clip, siglip, tmp_path):
    weight = load_file(clip[0] / "model.safetensors")["visual_projection.weight"]
    expected = read_head(find_tower(str(clip[0])), "clip")
    for name, tensor in {"visual.proj": weight.T, "head.weight": weight}.items():
        save_file({name: tensor.contiguous()}, tmp_path / "head.safetensors")
        found = read_head(find_tower(str(tmp_path / "head.safetensors")), "clip")
        assert found.digest == expected.digest
        assert (found.channels, found.dim) == (32, towers.DIM)

    bias = torch.arange(float(towers.DIM))
    save_file({"visual.head.weight": weight, "visual.head.bias": bias}, tmp_path / "b.safetensors")
    with_bias = read_head(find_tower(str(tmp_path / "b.safetensors")), "clip")
    tokens = torch.randn(1, 3, 32)
    torch.testing.assert_close(with_bias(tokens), expected(tokens) + bias)

    vit = towers.siglip_backbone(siglip[0]).vit  # timm's names
    save_file(vit.state_dict(), tmp_path / "timm.safetensors")
    timm_head = read_head(find_tower(str(tmp_path / "timm.safetensors")), "siglip")
    pooling = read_head(find_tower(str(siglip[0])), "siglip")
    assert timm_head.digest == pooling.digest
    assert (pooling.channels, pooling.dim) == (32, 32)


def test_a_checkpoint_without_a_head_is_refused(clip, siglip, tmp_path):
    with pytest.raises(ZeroshotError, match="with --projection"):
        read_head(find_tower(str(clip[0])), "siglip")
    with pytest.raises(ZeroshotError, match="has not a visual projection"):
        read_head(find_tower(str(siglip[0])), "clip")
    tensors = load_file(siglip[0] / "model.safetensors")
    del tensors["vision_model.head.mlp.fc2.bias"]
    save_file(tensors, tmp_path / "cut.safetensors")
    with pytest.raises(ZeroshotError, match="lacks fc2.bias"):
        read_head(find_tower(str(tmp_path / "cut.safetensors")), "siglip")


def refusal(backbone, folder, family, text_dim=towers.DIM, **options):
    files = find_tower(str(folder))
    head = read_head(files, "clip" if family == "clip" or folder.name.startswith("c") else family)
    with pytest.raises(ZeroshotError) as caught:
        check_pair(backbone, head, files, family=family, text_dim=text_dim, **options)
    return str(caught.value)


def test_towers_that_do_not_belong_together_are_refused(clip, siglip):
    folder, backbone = clip[0], towers.clip_backbone(clip[0])
    files = find_tower(str(folder))
    head = read_head(files, "clip")
    check_pair(backbone, head, files, family="clip", text_dim=towers.DIM)
    backbone.name = "something"  # its weights are known all the same
    check_pair(backbone, head, files, family="clip", text_dim=towers.DIM)

    assert "gives 8 channels and the text tower 9" in refusal(backbone, folder, "clip", text_dim=9)
    other = towers.siglip_backbone(siglip[0])
    assert "is of the siglip family and the text tower of the clip" in refusal(
        other, folder, "clip"
    )
    dino = tiny_backbone("vit_base_patch14_dinov2", img_size=56)
    assert "trainer.evaluate segmentation" in refusal(dino, folder, "clip")
    name = "vit_base_patch16_clip_quickgelu_224"
    assert "--unrelated-towers" in refusal(tiny_backbone(name), folder, "clip")
    check_pair(
        tiny_backbone(name), head, files, family="clip", text_dim=towers.DIM, are_unrelated=True
    )
    assert "has 64 channels and the visual projection" in refusal(
        tiny_backbone(name, embed_dim=64), folder, "clip", are_unrelated=True
    )
