"""Computed costs, against figures computed elsewhere and against counts of tiny models."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from backbone import Backbone
from backbone.catalog import CATALOG
from backbone.errors import ModelError
from tests.support import tiny_vit
from tests.trainer.refining import (
    model_folder,
    one_step,
    random_images,
    small_recipe,
    small_refiner,
)
from trainer import architecture
from trainer.architecture import architecture_of, inspect_model
from trainer.config import LoraSection
from trainer.errors import RecipeError
from trainer.estimates import GIB, GPUS, estimate
from trainer.lora import Adapter
from trainer.recipe_file import load_recipe, recipe_names

# Counted by FakeTensor on the real architectures: student's side in px; TFLOP of a forward of the
# plain image, of the student's, of a composite, of a crop with a border of 4; TFLOP of a training
# step per image with consistency; GiB of the inputs of all blocks; M parameters of the adapter.
MEASURED = {
    "eva-clip-8b": (476, (15.96, 18.10, 22.23, 25.42), 197, 0.28, 20.97),
    "internvit-6b-448": (476, (11.94, 13.57, 16.73, 19.19), 148, 0.31, 18.43),
    "dinov3-7b": (544, (14.51, 16.47, 20.28, 23.24), 180, 0.35, 19.66),
    "dinov2-g": (546, (3.57, 4.02, 4.92, 5.60), 43.6, 0.17, 7.86),
    "siglip2-giant": (544, (2.58, 2.95, 3.68, 4.26), 32.6, 0.13, 7.86),
    "laion-g": (476, (2.31, 2.64, 3.29, 3.81), 29.2, 0.12, 7.54),
    "dinov3-h-plus": (544, (1.90, 2.17, 2.70, 3.12), 23.9, 0.09, 6.88),
    "rice-l": (588, (1.22, 1.37, 1.77, 1.92), 15.2, 0.08, 3.54),
    "siglip2-so400m": (544, (0.97, 1.12, 1.41, 1.64), 12.5, 0.07, 3.85),
    "dinov3-l": (544, (0.73, 0.84, 1.05, 1.23), 9.3, 0.05, 3.15),
    "internvit-300m": (476, (0.73, 0.84, 1.05, 1.23), 9.3, 0.05, 3.15),
    "dinov2-b": (546, (0.30, 0.35, 0.43, 0.50), 3.8, 0.03, 1.18),
}


def cost_of(name, *settings, variant="paper", checkpointing=None):
    recipe = load_recipe(name, settings, variant=variant)
    return estimate(recipe, architecture_of(recipe.backbone.name), checkpointing=checkpointing)


@pytest.mark.parametrize("name", MEASURED)
def test_flops_and_adapters_are_those_of_the_real_models(name):
    student_px, forwards, step, kept, adapter = MEASURED[name]
    recipe = load_recipe(name, ["loss.consistency_start=0"], variant="release")
    model = architecture_of(recipe.backbone.name)
    side, student = recipe.data.size // model.patch, student_px // model.patch
    strip = (side * 35 // 100 + 1) // 2 * 2
    grids = [(side, side), (student, student), (side, side + strip), (side + 8, side + 8)]

    computed = [model.forward_flops(model.num_tokens(*grid)) / 1e12 for grid in grids]
    cost = estimate(recipe, model)

    assert computed == pytest.approx(forwards, rel=0.02)  # the figures have two digits
    assert cost.flops_per_image / 1e12 == pytest.approx(step, rel=0.01)
    assert cost.adapter_parameters / 1e6 == pytest.approx(adapter, rel=0.005)
    inputs = 2 * model.depth * model.num_tokens(student, student) * model.width / GIB
    assert inputs == pytest.approx(kept, abs=0.006)


def test_checkpointing_costs_a_forward_of_the_student_and_saves_activations():
    plain = cost_of("eva-clip-8b", checkpointing=False)
    checkpointed = cost_of("eva-clip-8b", checkpointing=True)

    extra = (checkpointed.flops_per_image - plain.flops_per_image) / 1e12
    assert extra == pytest.approx(18.10, rel=0.01)
    assert checkpointed.bytes_per_image < plain.bytes_per_image / 3
    assert cost_of("eva-clip-8b", "run.gradient_checkpointing=true") == checkpointed


def test_consistency_costs_its_crops_for_its_part_of_the_run():
    paper, release = cost_of("siglip2-so400m"), cost_of("siglip2-so400m", variant="release")

    extra = (release.flops_per_image - paper.flops_per_image) / 1e12
    assert extra == pytest.approx(3 * 1.64 * 0.9, rel=0.01)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
@pytest.mark.parametrize(
    "settings", [[], ["loss.lambda_con=0.4", "loss.consistency_start=0"]], ids=["paper", "release"]
)
def test_the_flops_of_a_step_are_those_that_torch_counts(name, settings):
    shape = {"embed_dim": 192, "depth": 3, "num_heads": 3}
    backbone = Backbone(tiny_vit(name, **shape), name=name)
    model = inspect_model(backbone.vit)
    recipe = small_recipe("lora.rank=1", *settings)  # a wide adapter is not small on a small model
    refiner = small_refiner(recipe, backbone=backbone)
    one_step(refiner, random_images())  # the reference image is encoded once

    with FlopCounterMode(display=False) as counter:
        one_step(refiner, random_images())

    computed = 2 * estimate(recipe, model).flops_per_image
    assert computed == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize(
    "name",
    [
        "siglip2-so400m",
        "dinov2-g",  # gate and value in one layer
        "dinov3-l",  # rotary
        "dinov3-7b",  # a gate of its own, rotary
        "eva02-clip-l",  # q, k, v in three layers, rotary, inner norms
        "rice-l-560",  # q, k, v in three layers, rotary
        "pe-spatial-g",
    ],
)
def test_a_block_keeps_the_numbers_that_autograd_saves(name, monkeypatch):
    entry = CATALOG[name]
    shape = {"embed_dim": 96, "num_heads": 2, "img_size": 8 * entry.patch}
    models = [entry.build(depth=depth, **shape) for depth in (1, 2)]
    # Here all is in bfloat16; on a GPU autocast leaves norms' inputs in float32.
    monkeypatch.setattr(architecture, "_NORM_COPIES", 0)
    expected = inspect_model(models[0]).block_numbers()

    slopes = []  # bytes per token: what does not grow with tokens drops out
    for vit in models:
        backbone = Backbone(vit.to(torch.bfloat16), name=name)
        section = LoraSection(rank=1, dropout=0)  # a CPU keeps dropout's mask, a GPU does not
        Adapter.attach(backbone, section, seed=0).train_dropout(True)
        small, large = saved_bytes(backbone, 8), saved_bytes(backbone, 12)
        slopes.append((large - small) / (12**2 - 8**2))

    assert (slopes[1] - slopes[0]) / 2 == pytest.approx(expected, rel=0.03)


def saved_bytes(backbone, side):
    """Bytes of the storages that the graph of a forward keeps, weights aside."""
    pixels = torch.zeros(1, 3, *[side * backbone.patch_size] * 2, dtype=torch.bfloat16)
    saved = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = backbone.encode(pixels)
        weights = {p.untyped_storage().data_ptr() for p in backbone.parameters()}
        kept = sum(size for place, size in saved.items() if place not in weights)
    del output
    return kept


def test_an_entry_is_read_off_one_block_as_off_the_whole_model():
    entry = CATALOG["eva02-clip-b"]

    read = architecture_of("eva02-clip-b")

    with torch.device("meta"):
        whole = entry.build()
    assert read == inspect_model(whole)
    assert read.parameters == sum(p.numel() for p in whole.parameters())
    numbers = (read.depth, read.width, read.hidden, read.patch, read.prefix)
    assert numbers == (entry.depth, entry.width, entry.hidden, entry.patch, entry.prefix)


@pytest.mark.parametrize("name", sorted(CATALOG))
def test_architectures_are_those_of_the_catalogue(name):
    entry, read = CATALOG[name], architecture_of(name)

    numbers = (read.depth, read.width, read.hidden, read.patch, read.prefix)
    assert numbers == (entry.depth, entry.width, entry.hidden, entry.patch, entry.prefix)
    assert read.native_size == entry.native_size


def test_a_timm_name_and_a_folder_have_costs_too(tmp_path):
    folder = model_folder(tmp_path / "model")

    assert architecture_of("vit_tiny_patch16_224").parameters == 5_524_416
    assert architecture_of(str(folder)).depth == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18", "a timm model of the VisionTransformer or Eva family"),
        ("vit_base_patch16_18x2_224", "blocks of the class ParallelThingsBlock are not known here"),
        ("vit_tiny_patch16_225", "no timm model and no folder"),
    ],
)
def test_what_is_no_vision_transformer_has_no_costs(name, message):
    with pytest.raises(ModelError, match=message):
        architecture_of(name)


def test_memory_grows_by_the_image_and_the_largest_batch_is_the_last_that_fits():
    cost, gpu = cost_of("eva-clip-8b"), GPUS["H100"]

    largest = cost.largest_batch(gpu)

    limit = 0.95 * gpu.memory_gib
    assert cost.memory_gib(largest) <= limit < cost.memory_gib(largest + 1)
    assert 2 * 7.5e9 < cost.fixed_bytes < 3 * 7.5e9  # the weights, once, in bfloat16
    in_float32 = cost_of("eva-clip-8b", 'backbone.dtype="float32"')
    assert in_float32.fixed_bytes - cost.fixed_bytes == 2 * cost.parameters
    assert cost_of("eva-clip-18b").largest_batch(GPUS["RTX4090"]) == 0


def test_the_largest_of_several_sizes_decides_the_memory_and_their_mean_the_time():
    small, large = (cost_of("siglip2-so400m", f"data.size={size}") for size in (512, 768))

    both = cost_of("siglip2-so400m", "data.other_sizes=[768]")

    assert both.bytes_per_image == large.bytes_per_image > small.bytes_per_image
    mean = (small.flops_per_image + large.flops_per_image) / 2
    assert both.flops_per_image == pytest.approx(mean)


def test_time_is_work_over_the_assumed_part_of_the_peak():
    cost, gpu = cost_of("siglip2-so400m"), GPUS["A100"]

    assert cost.seconds(gpu, num_images=1000) == pytest.approx(
        1000 * cost.flops_per_image / (0.4 * 312e12)
    )
    in_fp32 = cost_of("siglip2-so400m", "run.precision=fp32")
    assert in_fp32.seconds(gpu, num_images=1000) > 10 * cost.seconds(gpu, num_images=1000)
    assert in_fp32.bytes_per_image > 1.7 * cost.bytes_per_image  # losses are in float32 anyway


def test_layers_that_a_backbone_does_not_have_are_refused():
    recipe = load_recipe("internvit-6b")

    with pytest.raises(RecipeError, match=r"layers 29..31, but the backbone's blocks are 0..11"):
        estimate(recipe, architecture_of("dinov2-b"))


@pytest.mark.parametrize("variant", ["paper", "release"])
def test_every_recipe_of_a_backbone_fits_a_gpu_of_80_gb(variant):
    names = [name for name in recipe_names() if name not in ("paper", "release", "demo")]

    too_large = [
        name
        for name in names
        if cost_of(name, variant=variant).largest_batch(GPUS["H100"])
        < load_recipe(name).data.batch_size
    ]

    assert too_large == []
