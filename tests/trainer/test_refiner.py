"""One step: a pure function of weights, images and draws, in which every knob counts."""

import dataclasses

import pytest
import torch

from tests.support import tiny_backbone
from tests.trainer.refining import one_step, random_images, small_recipe, small_refiner
from trainer.config import Recipe
from trainer.distributed import Ranks
from trainer.recipe_file import field_names

# A recipe in which every part of a step has work to do; random weights make odd tokens.
BUSY = [
    "filters.fp_gp.criterion=zscore",
    "filters.fp_gp.threshold=1.5",
    "filters.register_guided.threshold=0.3",
    "filters.attention_hijack.layers=[0, 1]",
    "loss.lambda_con=0.4",
    "loss.uniformity=0.5",
    "loss.affinity_floor=0.2",
    "registers.r_reg=2",
]
# Another value of every field that a step depends on.
KNOBS = [
    "registers.r_reg=4",
    "registers.fill=zeros",
    "registers.fill=uniform",
    "registers.fill=learnable",
    "crops.num_crops=2",
    "crops.area=[0.3, 0.4]",
    "crops.aspect=[0.9, 1.1]",
    "crops.strip_share=1.0",
    "filters.fp_gp.enabled=false",
    "filters.fp_gp.criterion=cosine",
    "filters.fp_gp.threshold=1.0",
    "filters.fp_gp.candidate_share=0.1",
    "filters.register_guided.enabled=false",
    "filters.register_guided.threshold=0.2",
    "filters.register_guided.detector_share=0.9",
    "filters.attention_hijack.enabled=false",
    "filters.attention_hijack.variant=release",
    "filters.attention_hijack.threshold=0.5",
    "filters.attention_hijack.layers=[0, 0]",
    "loss.temperature=0.3",
    "loss.matched=false",
    "loss.uniformity=1.0",
    "loss.lambda_uni=0.5",
    "loss.lambda_spu=0.5",
    "loss.affinity_floor=0.4",
    "loss.crop_weight=0.5",
    "loss.crop_top=0.5",
    "loss.sparsity_margin=0.3",
    "loss.lambda_con=0.0",
    "loss.consistency_start=0.9",
    "loss.consistency_width=3",
    "lora.rank=4",
    "lora.alpha=8",
    "lora.dropout=0.3",
]
ELSEWHERE = {
    "registers.rounding": "needs a grid that r_reg does not divide, see below",
    "registers.seed": "of the artifact, see test_run",
    "crops.reference": "see test_run",
    "filters.attention_hijack.depth_range": "see below",
}


def lively_backbone():
    """Random weights as timm draws them make attention all but uniform; these do not."""
    backbone = tiny_backbone()
    with torch.no_grad():
        for block in backbone.vit.blocks:
            block.attn.qkv.weight.mul_(20)
    return backbone


def signature(settings, progress=0.5):
    refiner = small_refiner(small_recipe(*BUSY, *settings), backbone=lively_backbone())
    loss, _, gradients = one_step(refiner, random_images(), progress=progress)
    return [loss.item(), *(g.norm().item() for g in gradients.values())]


@pytest.fixture(scope="module")
def busy_signature():
    return signature([])


@pytest.mark.parametrize("setting", KNOBS)
def test_every_knob_of_a_step_changes_it(setting, busy_signature):
    assert signature([setting]) != busy_signature


def test_no_knob_of_a_step_was_forgotten():
    sections = ("registers", "crops", "filters", "loss", "lora")
    fields = {name for name in field_names(Recipe) if name.split(".")[0] in sections}

    assert {setting.partition("=")[0] for setting in KNOBS} | ELSEWHERE.keys() == fields


def test_depth_range_chooses_layers_where_none_are_named(busy_signature):
    settings = ["filters.attention_hijack.layers=none"]

    first = signature([*settings, "filters.attention_hijack.depth_range=[0, 0.1]"])
    both = signature([*settings, "filters.attention_hijack.depth_range=[0, 1]"])

    assert first != both == busy_signature


def test_rounding_decides_the_border_where_r_reg_does_not_divide_the_grid():
    widths = [
        small_refiner(small_recipe("registers.r_reg=3", f"registers.rounding={rounding}")).width
        for rounding in ("ceil", "floor")
    ]

    assert widths == [2, 1]


@pytest.mark.parametrize("recipe", ["paper", "release"])
def test_replayed_draws_give_the_same_loss_and_gradients(recipe):
    settings = ["lora.dropout=0.5", "filters.attention_hijack.layers=[0, 1]"]
    refiner = small_refiner(small_recipe(*settings, name=recipe))

    loss, terms, gradients = one_step(refiner, random_images(), seed=1)
    torch.rand(3)  # the global generator has moved on
    again, terms_again, gradients_again = one_step(refiner, random_images(), seed=1)
    other, _, _ = one_step(refiner, random_images(), seed=2)

    assert torch.equal(loss, again)
    assert not torch.equal(loss, other)
    assert terms.keys() == terms_again.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, gradients_again[name])


def test_a_step_leaves_the_global_generator_alone():
    refiner = small_refiner()
    torch.manual_seed(0)
    expected = torch.rand(2)

    torch.manual_seed(0)
    one_step(refiner, random_images())

    assert torch.equal(torch.rand(2), expected)


def test_draws_are_drawn_from_the_generator_alone():
    refiner = small_refiner(small_recipe("loss.lambda_con=0.4"))

    def draw(seed):
        torch.manual_seed(seed + 10)
        generator = torch.Generator().manual_seed(seed)
        return dataclasses.asdict(refiner.draw(3, progress=1.0, generator=generator))

    one, same, other = draw(0), draw(0), draw(1)

    assert all(torch.as_tensor(one[name] == same[name]).all() for name in one)
    assert not torch.equal(one["boxes_BK4"], other["boxes_BK4"])
    assert one["detectors_BD"].shape == (3, refiner.num_registers // 3)
    assert one["candidates_2BKR"].shape == (2, 3, 3, refiner.num_registers)
    assert one["border"].shape == (3, 3, 96, 96)
    assert one["consistency_border"].shape == (9, 3, 192, 192)


@pytest.mark.parametrize(("fill", "mean", "std"), [("gaussian", 0, 1), ("uniform", 0.5, 12**-0.5)])
def test_the_border_is_noise_of_its_kind_all_around_and_different_for_every_image(fill, mean, std):
    refiner = small_refiner(small_recipe(f"registers.fill={fill}"))

    border = refiner.draw(2, progress=0, generator=torch.Generator().manual_seed(0)).border

    rim = torch.ones(96, 96, dtype=torch.bool)
    rim[16:80, 16:80] = False
    noise = border[:, :, rim]
    assert not border[:, :, ~rim].any()
    assert (noise != 0).all()
    assert not torch.equal(noise[0], noise[1])
    assert noise.mean() == pytest.approx(mean, abs=0.02)
    assert noise.std() == pytest.approx(std, abs=0.02)


def test_consistency_starts_when_its_part_of_the_training_is_done():
    refiner = small_refiner(small_recipe("loss.lambda_con=0.4"))

    terms = [one_step(refiner, random_images(), progress=p)[1] for p in (0.0, 0.09, 0.1)]

    assert ["consistency" in t for t in terms] == [False, False, True]


def test_terms_are_named_and_shares_are_shares():
    _, terms, _ = one_step(small_refiner(small_recipe(*BUSY)), random_images())

    assert set(terms) == {
        "loss",
        "refinement",
        "alignment",
        "uniformity",
        "register_uniformity",
        "absorption",
        "consistency",
        "sparsity",
        "clean",
        "clean_fixed_pattern",
        "clean_global_proxy",
        "clean_register_guided",
        "clean_attention_hijack",
    }
    assert all(0 <= terms[n] <= 1 for n in terms if n.startswith("clean"))
    assert 0 < terms["clean"] <= min(terms[n] for n in terms if n.startswith("clean_fixed"))
    assert not any(term.requires_grad for term in terms.values())


def test_the_loss_is_the_weighted_sum_of_its_terms():
    recipe = small_recipe(*BUSY, "loss.lambda_uni=0.7", "loss.lambda_spu=0.3")

    loss, terms, _ = one_step(small_refiner(recipe), random_images())

    expected = (
        -terms["alignment"] / 0.2
        + 0.5 * terms["uniformity"]
        + 0.7 * terms["register_uniformity"]
        + 0.3 * terms["absorption"]
        + 0.4 * terms["consistency"]
    )
    torch.testing.assert_close(loss, expected)


def test_a_step_goes_on_when_every_token_is_rejected():
    recipe = small_recipe("filters.fp_gp.threshold=-1.0")

    loss, terms, _ = one_step(small_refiner(recipe), random_images())

    assert terms["clean"] == 0
    assert loss.isfinite()


def test_the_teacher_gets_no_gradient_and_the_reference_is_encoded_once():
    refiner = small_refiner()
    calls = []
    refiner.backbone.vit.patch_embed.register_forward_hook(
        lambda _module, inputs, _output: calls.append(tuple(inputs[0].shape))
    )

    for _ in range(2):
        one_step(refiner, random_images())

    sizes = [shape[0] for shape in calls]
    # In the first step the reference; full images, composites of three crops each, student.
    assert sizes == [1, 2, 6, 2, 2, 6, 2]
    assert calls[3][2:] == (96, 96)
    assert not any(tensor.requires_grad for tensor in refiner.reference(64))


def test_what_trains_is_the_adapter_and_with_a_learnable_border_the_border():
    noise = small_refiner()
    learned = small_refiner(small_recipe("registers.fill=learnable"))

    names = [{n for n, p in r.named_parameters() if p.requires_grad} for r in (noise, learned)]

    assert all("lora_" in name for name in names[0])
    assert names[1] - names[0] == {"border.patches"}
    _, _, gradients = one_step(learned, random_images())
    assert gradients["border.patches"].abs().sum() > 0


def test_the_backbone_stays_in_evaluation_mode():
    refiner = small_refiner(backbone=tiny_backbone(drop_path_rate=0.5)).train()

    training = {n for n, m in refiner.backbone.named_modules() if m.training}

    assert training
    assert all("lora_dropout" in name for name in training)
    assert not any(m.training for m in refiner.eval().modules())


def test_masked_channels_count_for_nothing():
    def loss_with(scale, channels):
        backbone = tiny_backbone()
        with torch.no_grad():
            backbone.vit.norm.bias[5] = scale
        refiner = small_refiner(backbone=backbone)
        refiner.channels = torch.tensor(channels) if channels else None
        return one_step(refiner, random_images())[0].item()

    assert loss_with(50.0, [5]) == pytest.approx(loss_with(0.0, [5]), abs=1e-4)
    assert loss_with(50.0, []) != pytest.approx(loss_with(0.0, []), abs=1e-1)


def test_gradient_checkpointing_changes_no_gradient():
    plain, checkpointed = small_refiner(), small_refiner()
    checkpointed.backbone.vit.set_grad_checkpointing()

    _, _, expected = one_step(plain, random_images())
    _, _, gradients = one_step(checkpointed, random_images())

    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name])


def test_bf16_keeps_losses_in_float32_and_near_those_of_fp32():
    recipe = small_recipe()
    full, half = small_refiner(recipe), small_refiner(recipe)
    half._bf16 = True

    expected, _, _ = one_step(full, random_images())
    loss, terms, _ = one_step(half, random_images())

    assert loss.dtype == torch.float32
    assert all(term.dtype == torch.float32 for term in terms.values())
    # A token near a filter's threshold may fall on its other side.
    torch.testing.assert_close(loss, expected, rtol=0.1, atol=0.1)
    assert not torch.equal(loss, expected)


def test_the_adapter_is_on_again_after_a_failed_teacher_pass(monkeypatch):
    refiner = small_refiner().eval()
    images = torch.randn(1, 3, 64, 64)
    expected = refiner.backbone.encode(images).tokens

    def fail(*_args, **_kwargs):
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(refiner, "_unit_features", fail)
        with pytest.raises(RuntimeError, match="luck"):
            refiner.reference(64)

    assert torch.equal(refiner.backbone.encode(images).tokens, expected)


@pytest.mark.parametrize("size", [32, 96])
def test_a_step_may_have_images_of_another_size(size):
    settings = [*BUSY, "registers.fill=learnable"]
    refiner = small_refiner(small_recipe(*settings), backbone=lively_backbone())
    images = torch.randint(256, (2, 3, size, size), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)

    draws = refiner.draw(2, progress=1, generator=generator, size=size)
    loss, terms = refiner(images, draws)
    loss.backward()

    side = size // 16
    assert draws.detectors_BD.shape[1] == max(1, ((side + 2 * -(-side // 2)) ** 2 - side**2) // 3)
    assert loss.isfinite()
    assert "consistency" in terms
    assert all(p.grad is not None for n, p in refiner.named_parameters() if "lora_B" in n)


def test_draws_of_a_part_are_those_of_the_whole():
    refiner = small_refiner(small_recipe("loss.lambda_con=0.4"))
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    whole = refiner.draw(4, progress=1, generator=generators[0])

    refiner.ranks = Ranks(rank=1, size=2)
    part = refiner.draw(2, progress=1, generator=generators[1])

    assert torch.equal(part.boxes_BK4, whole.boxes_BK4[2:])
    assert torch.equal(part.candidates_2BKR, whole.candidates_2BKR[:, 2:])
    assert torch.equal(part.detectors_BD, whole.detectors_BD[2:])
    assert torch.equal(part.border, whole.border[2:])
    assert torch.equal(part.consistency_border, whole.consistency_border[6:])
    assert part.side == whole.side
    assert part.dropout_seed != whole.dropout_seed  # masks of two parts must not be alike
    assert torch.equal(generators[0].get_state(), generators[1].get_state())
