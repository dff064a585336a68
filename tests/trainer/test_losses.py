"""The losses against the authors' values and gradients, and what each of them may move."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from trainer.losses import (
    absorption_loss,
    consistency_loss,
    match_targets,
    refinement_loss,
    register_uniformity_loss,
    sparsity_level,
    usable,
)

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
STRENGTH = {
    "losses_full_u0.3": 0.3,
    "losses_full_u1.0": 1.0,
    "losses_crop_u0.3": 0.3,
    "losses_crop_u1.0": 1.0,
    "losses_nothing_clean": 1.0,
}
STUDENT = ("student_crop", "student_full", "student_register")
close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-7)


def golden_losses(name):
    """The golden file, with gradients to be taken of the student's tokens, and the losses of it."""
    golden = load_file(GOLDEN / f"{name}.safetensors")
    for key in STUDENT:
        golden[key].requires_grad_()
    sparsity = sparsity_level(golden["teacher_target"], golden["clean"])
    refinement = refinement_loss(
        golden["student_crop"],
        golden["teacher_target"],
        golden.get("negative_pool", golden["teacher_full"]),
        golden["clean"],
        temperature=0.2,
        uniformity=STRENGTH[name],
        sparsity=sparsity,
    )
    uniformity = register_uniformity_loss(
        golden["student_full"], golden["student_register"], temperature=0.2, affinity_floor=0.55
    )
    absorption = absorption_loss(
        golden["student_register"],
        golden["student_crop"],
        golden["spurious_candidates"],
        golden["teacher_full"],
        temperature=0.2,
        sparsity=sparsity,
    )
    return golden, sparsity, refinement, uniformity, absorption


@pytest.mark.parametrize("name", STRENGTH)
def test_values_equal_the_authors(name):
    golden, sparsity, refinement, uniformity, absorption = golden_losses(name)

    if "sparsity_threshold" in golden:
        close(sparsity, golden["sparsity_threshold"])
    close(refinement.alignment, golden["mean_alignment"])
    close(uniformity, golden["register_uniformity"])
    # The authors' refinement includes the register uniformity.
    close(refinement.total + uniformity, golden["refinement"])
    close(absorption, golden["absorption"])


@pytest.mark.parametrize("name", [name for name in STRENGTH if "nothing" not in name])
def test_gradients_equal_the_authors(name):
    golden, _, refinement, uniformity, absorption = golden_losses(name)

    (refinement.total + uniformity + 0.1 * absorption).backward()

    for key in STUDENT:
        close(golden[key].grad, golden[f"grad_{key}"])


@pytest.mark.parametrize("name", [name for name in STRENGTH if "nothing" not in name])
def test_matching_equals_the_authors(name):
    golden = load_file(GOLDEN / f"{name}.safetensors")

    matched = match_targets(golden["spurious_candidates"], golden["teacher_full"])

    assert torch.equal(matched, golden["rematched_spurious"])


def test_spatial_consistency_equals_the_authors_in_value_and_gradient():
    golden = load_file(GOLDEN / "spatial_consistency.safetensors")
    student = golden["student_crop"].requires_grad_()

    loss = consistency_loss(student, golden["target"], temperature=0.2)
    loss.backward()

    close(loss, golden["loss"])
    close(student.grad, golden["grad_student_crop"])


def unit(*shape, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    # A common direction, so that some pairs lie above the sparsity level and some below.
    return F.normalize(torch.randn(*shape, generator=generator, dtype=dtype) + 0.4, dim=-1)


class Batch:
    """Two images, three crops each: tokens as the losses take them."""

    def __init__(self, dtype=torch.float32):
        self.student_full = unit(2, 20, 8, seed=0, dtype=dtype)
        self.registers = unit(2, 12, 8, seed=1, dtype=dtype)
        self.teacher_full = unit(2, 20, 8, seed=2, dtype=dtype)
        self.student_crop = unit(6, 16, 8, seed=3, dtype=dtype)
        self.targets = unit(6, 16, 8, seed=4, dtype=dtype)
        self.candidates = unit(6, 24, 8, seed=5, dtype=dtype)
        self.clean = torch.rand(6, 16, generator=torch.Generator().manual_seed(6)) < 0.6

    def per_crop(self, name):
        return getattr(self, name).repeat_interleave(3, dim=0)

    def refinement(self, **changes):
        given = {"student_crop": self.student_crop, "clean": self.clean, "uniformity": 0.3}
        given |= {"pool": self.teacher_full, "targets": self.targets, "sparsity": 0.2} | changes
        return refinement_loss(
            given["student_crop"],
            given["targets"],
            given["pool"],
            given["clean"],
            temperature=0.2,
            uniformity=given["uniformity"],
            sparsity=given["sparsity"],
        )

    def absorption(self, **changes):
        given = {"registers": self.registers, "student_crop": self.student_crop, "sparsity": 0.2}
        given |= {"teacher_full": self.teacher_full} | changes
        return absorption_loss(
            given["registers"],
            given["student_crop"],
            self.candidates,
            given["teacher_full"],
            temperature=0.2,
            sparsity=given["sparsity"],
        )


def test_tokens_of_an_image_may_come_once_or_once_per_crop():
    batch = Batch()
    full, registers = batch.per_crop("teacher_full"), batch.per_crop("registers")
    image = batch.per_crop("student_full")
    settings = {"temperature": 0.2, "affinity_floor": 0.3}

    close(match_targets(batch.targets, full), match_targets(batch.targets, batch.teacher_full))
    close(batch.refinement(pool=full).total, batch.refinement().total)
    close(batch.absorption(registers=registers, teacher_full=full), batch.absorption())
    close(
        register_uniformity_loss(image, registers, **settings),
        register_uniformity_loss(batch.student_full, batch.registers, **settings),
    )


def test_crops_that_do_not_belong_evenly_to_images_are_refused():
    with pytest.raises(ValueError, match="6 crops do not belong evenly to 4 images"):
        Batch().absorption(registers=unit(4, 12, 8, seed=0))


def test_matched_targets_are_the_nearest_tokens_of_the_same_image():
    batch = Batch()

    matched = match_targets(batch.targets, batch.teacher_full)

    for crop in range(6):
        table = batch.targets[crop] @ batch.teacher_full[crop // 3].T
        close((matched[crop] * batch.targets[crop]).sum(-1), table.amax(-1))


def test_refinement_is_its_parts():
    loss = Batch().refinement(uniformity=0.7)

    close(loss.total, -loss.alignment / 0.2 + 0.7 * loss.uniformity)


def test_refinement_hears_nothing_of_rejected_tokens():
    batch = Batch()
    student = batch.student_crop.clone().requires_grad_()

    batch.refinement(student_crop=student).total.backward()

    assert not student.grad[~batch.clean].any()
    assert student.grad[batch.clean].abs().sum(-1).min() > 0


def test_refinement_trains_neither_targets_nor_pool():
    batch = Batch()
    targets, pool = batch.targets.requires_grad_(), batch.teacher_full.requires_grad_()
    student = batch.student_crop.requires_grad_()

    batch.refinement(student_crop=student, targets=targets, pool=pool).total.backward()

    assert targets.grad is None
    assert pool.grad is None


def test_absorption_moves_only_the_registers():
    batch = Batch()
    registers = batch.registers.requires_grad_()
    crop, full = batch.student_crop.requires_grad_(), batch.teacher_full.requires_grad_()

    batch.absorption().backward()

    assert registers.grad.abs().sum(-1).min() > 0
    assert crop.grad is None
    assert full.grad is None


def test_no_register_close_to_a_crop_token_leaves_the_crop_out_of_absorption():
    batch = Batch()

    # No cosine exceeds 1, so every pair counts as the constant 1.5 + 0.1 and no register is close.
    loss = batch.absorption(sparsity=1.5)

    absorbed = match_targets(batch.candidates, batch.teacher_full)
    nearest = (batch.per_crop("registers") @ absorbed.mT).amax(-1).mean()
    constant = torch.full((12,), 1.6 / 0.2).logsumexp(0)
    close(loss, -nearest / 0.2 + constant)


def test_uniformity_of_registers_moves_image_and_registers_unless_they_are_apart():
    batch = Batch()
    image, registers = batch.student_full.requires_grad_(), batch.registers.requires_grad_()

    loss = register_uniformity_loss(image, registers, temperature=0.2, affinity_floor=-1.0)
    apart = register_uniformity_loss(image, registers, temperature=0.2, affinity_floor=1.1)
    loss.backward()

    close(loss, apart)
    assert image.grad.abs().sum() > 0
    assert registers.grad.abs().sum() > 0
    for gradient in torch.autograd.grad(apart, (image, registers)):
        assert not gradient.any()


def test_the_mask_that_rejects_everything_counts_as_the_mask_that_rejects_nothing():
    batch = Batch()
    nothing, everything = torch.zeros_like(batch.clean), torch.ones_like(batch.clean)

    assert torch.equal(usable(nothing), everything)
    assert torch.equal(usable(batch.clean), batch.clean)
    close(batch.refinement(clean=nothing).total, batch.refinement(clean=everything).total)
    close(sparsity_level(batch.targets, nothing), sparsity_level(batch.targets, everything))


def test_sparsity_pairs_the_list_of_clean_targets_with_itself_in_reverse():
    targets = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.6, 0.8], [1.0, 0.0]]])
    clean = torch.tensor([[True, False], [True, True]])

    # The list is (1, 0), (0.6, 0.8), (1, 0): the outer ones pair with each other.
    close(sparsity_level(targets, clean), torch.tensor(1.0))


def test_consistency_asks_nothing_of_equal_relations_but_their_entropy():
    tokens = unit(2, 9, 4, seed=0).requires_grad_()

    loss = consistency_loss(tokens, tokens.detach(), temperature=0.2)
    (gradient,) = torch.autograd.grad(loss, tokens)

    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-6)


def test_consistency_of_identical_tokens_is_finite():
    tokens = torch.ones(1, 4, 2).div(2**0.5).requires_grad_()

    loss = consistency_loss(tokens, tokens.detach(), temperature=0.2)
    loss.backward()

    assert loss.isfinite()
    assert tokens.grad.isfinite().all()


def test_gradcheck():
    # Sparsity below every cosine: a detached value is no derivative of anything.
    batch = Batch(torch.float64)
    inputs = [
        tensor[:, :5].clone().requires_grad_()
        for tensor in (batch.student_crop, batch.registers, batch.student_full)
    ]
    batch.targets, batch.clean = batch.targets[:, :5], batch.clean[:, :5]

    def losses(student_crop, registers, student_full):
        uniformity = register_uniformity_loss(
            student_full, registers, temperature=0.2, affinity_floor=-2.0
        )
        refinement = batch.refinement(student_crop=student_crop, sparsity=-2.0)
        return refinement.total, uniformity, batch.absorption(registers=registers, sparsity=-2.0)

    assert torch.autograd.gradcheck(losses, inputs, fast_mode=True)


def test_losses_of_sixteen_bit_tokens_are_computed_in_float32_under_autocast():
    halves = Batch(torch.bfloat16)
    wide = Batch()
    for name, tensor in vars(halves).items():
        setattr(wide, name, tensor.float() if tensor.is_floating_point() else tensor)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = all_losses(halves)

    for result, exact in zip(results, all_losses(wide), strict=True):
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, exact, rtol=1e-6, atol=1e-6)


def all_losses(batch):
    uniformity = register_uniformity_loss(
        batch.student_full, batch.registers, temperature=0.2, affinity_floor=0.3
    )
    return (
        sparsity_level(batch.targets, batch.clean),
        match_targets(batch.targets, batch.teacher_full),
        *batch.refinement(),
        uniformity,
        batch.absorption(),
        consistency_loss(batch.student_crop, batch.targets, temperature=0.2),
    )
