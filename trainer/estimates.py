"""What a refinement costs, computed before it runs: parameters, FLOPs, GPU memory, time.

    architecture = architecture_of("siglip2-so400m")
    cost = estimate(load_recipe("siglip2-so400m"), architecture)
    cost.memory_gib(16), cost.seconds(GPUS["H100"], num_images=5000)

Formulas over the blocks of the backbone and the sizes of the recipe; nothing is measured. FLOPs are
those of the backbone: filters, losses and reading images are left out, which beside a backbone of
less than 0.1 G parameters may take more time than it does.

Dimension key: K = crops of an image.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, Self

from backbone.errors import ImageSizeError
from backbone.registers import border_width
from trainer.architecture import Architecture
from trainer.config import Recipe
from trainer.crops import strip_width

GIB = 2**30

UTILISATION = 0.4
"""Assumed share of a GPU's peak that a step reaches in its matrix products."""

# Of a student's forward with adapter; the frozen weights need no gradient, so that the backward
# pass is about as long as the forward and not twice as long.
_STUDENT_PASSES = 2.1
# float32 tensors of the size of all crop tokens that filters and losses hold at the peak: unit
# tokens of student and teacher, targets, pool, and gradients.
_LOSS_TENSORS = 8
# CUDA context, cuBLAS workspaces and what the allocator rounds up.
_CONTEXT_BYTES = 1.5 * GIB
# Bytes of a frozen weight; and of a token's channel between blocks, in 16-bit numbers: autocast
# multiplies in bf16 either way, and adds in what the weights are in.
_WEIGHT_BYTES = {"float32": 4, "bfloat16": 2}
_RESIDUAL_NUMBERS = {"float32": 2, "bfloat16": 1}
# float32: a parameter of the adapter, its gradient, two moments.
_ADAPTER_BYTES = 16
# Share of a GPU's memory that a batch may fill by this estimate.
_FILL = 0.95


@dataclass(frozen=True)
class Gpu:
    """A GPU: memory that PyTorch finds, rounded down, and dense peaks of its data sheet."""

    name: str
    memory_gib: float
    bf16_tflops: float
    fp32_tflops: float


# Peaks that a data sheet gives with sparsity alone are halved.
GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        "H100": Gpu("H100 80 GB", 79.0, 989.0, 67.0),  # NVIDIA H100 data sheet, SXM: 1979 / 2
        "H200": Gpu("H200 141 GB", 139.0, 989.0, 67.0),  # NVIDIA H200 data sheet, SXM: 1979 / 2
        "A100": Gpu("A100 80 GB", 79.0, 312.0, 19.5),  # NVIDIA A100 data sheet: 624 / 2
        "L40S": Gpu("L40S 48 GB", 44.0, 362.0, 91.6),  # NVIDIA L40S data sheet
        # Ada architecture white paper, appendix A: bf16 with float32 sums, 330.4 / 2
        "RTX4090": Gpu("RTX 4090 24 GB", 23.5, 165.2, 82.6),
    }
)


@dataclass(frozen=True)
class Cost:
    """What a recipe costs on a backbone, per image and in all.

    Attributes:
        size: Side of the training images in pixels.
        border: Width of the register border in patches.
        parameters, adapter_parameters: Of the backbone, and those that train.
        flops_per_image: Of a training step, spatial consistency at its share of the run.
        fixed_bytes: What memory holds whatever the batch.
        bytes_per_image: At the peak.
        bf16: Whether the backbone runs in bfloat16.
    """

    size: int
    border: int
    parameters: int
    adapter_parameters: int
    flops_per_image: float
    fixed_bytes: float
    bytes_per_image: float
    bf16: bool = True

    def memory_gib(self, batch: int) -> float:
        """Peak memory of a GPU at a batch size."""
        return (self.fixed_bytes + batch * self.bytes_per_image) / GIB

    def largest_batch(self, gpu: Gpu) -> int:
        """The largest batch that fits; 0 where not even one image does."""
        free = _FILL * gpu.memory_gib * GIB - self.fixed_bytes
        return max(0, int(free / self.bytes_per_image))

    def seconds(self, gpu: Gpu, *, num_images: float) -> float:
        """Time of one GPU for so many images, those of every epoch counted."""
        tflops = gpu.bf16_tflops if self.bf16 else gpu.fp32_tflops
        return num_images * self.flops_per_image / (UTILISATION * tflops * 1e12)


def estimate(
    recipe: Recipe, architecture: Architecture, *, checkpointing: bool | None = None
) -> Cost:
    """Compute what a recipe costs on a backbone.

    Per image a step has the student's forward and backward, K composites and the full image of the
    teacher, and K crops with a wide border where there is spatial consistency; with gradient
    checkpointing one more forward of the student. The base weights are in memory once. Of several
    sizes the largest decides the memory, and the mean the time.

    Args:
        recipe: The precision `auto` counts as bf16.
        architecture: Of its backbone, or another's.
        checkpointing: Recompute the student's blocks; None: as the recipe says.

    Raises:
        RecipeError: layers that the backbone does not have.
        ImageSizeError: images that are not whole patches.
    """
    checkpointed = recipe.run.gradient_checkpointing if checkpointing is None else checkpointing
    size = recipe.data.size or architecture.native_size
    views = [_Views.of(recipe, architecture, side) for side in (size, *recipe.data.other_sizes)]
    flops = [_flops(view, recipe, architecture, checkpointed) for view in views]
    number = 4 if recipe.run.precision == "fp32" else 2
    adapter_parameters = architecture.adapter_parameters(recipe.lora.rank)
    return Cost(
        size=size,
        border=views[0].border,
        parameters=architecture.parameters,
        adapter_parameters=adapter_parameters,
        flops_per_image=sum(flops) / len(flops),
        fixed_bytes=_WEIGHT_BYTES[recipe.backbone.dtype] * architecture.parameters
        + _ADAPTER_BYTES * adapter_parameters
        + _CONTEXT_BYTES,
        bytes_per_image=max(
            _bytes(view, recipe, architecture, checkpointed, number) for view in views
        ),
        bf16=number == 2,
    )


class _Views(NamedTuple):
    """Tokens of everything that a step encodes at a size, and the border's width in patches."""

    border: int
    image: int
    full: int
    student: int
    composite: int
    wide: int

    @classmethod
    def of(cls, recipe: Recipe, architecture: Architecture, size: int) -> Self:
        side, rest = divmod(size, architecture.patch)
        if rest or not side:
            near = max(1, round(size / architecture.patch)) * architecture.patch
            raise ImageSizeError(
                f"data.size is {size} px, which is not a whole number of {architecture.patch} px "
                f"patches; take {near}"
            )
        registers = recipe.registers
        border = border_width((side, side), registers.r_reg, registers.rounding)
        strip = strip_width(side, recipe.crops.strip_share)
        wide = side + 2 * max(border, recipe.loss.consistency_width)
        return cls(
            border=border,
            image=side * side,
            full=architecture.num_tokens(side, side),
            student=architecture.num_tokens(side + 2 * border, side + 2 * border),
            composite=architecture.num_tokens(side, side + strip),
            wide=architecture.num_tokens(wide, wide) if recipe.loss.lambda_con > 0 else 0,
        )


def _flops(views: _Views, recipe: Recipe, architecture: Architecture, checkpointed: bool) -> float:
    crops = recipe.crops.num_crops
    consistent = crops * (1 - recipe.loss.consistency_start) if views.wide else 0.0
    return (
        (_STUDENT_PASSES + checkpointed) * architecture.forward_flops(views.student)
        + crops * architecture.forward_flops(views.composite)
        + architecture.forward_flops(views.full)
        + consistent * architecture.forward_flops(views.wide)
    )


def _bytes(
    views: _Views, recipe: Recipe, architecture: Architecture, checkpointed: bool, number: int
) -> float:
    """Of an image, at the peak of a step."""
    crops, hijack = recipe.crops.num_crops, recipe.filters.attention_hijack
    num_layers = len(hijack.layer_range(architecture.depth)) if hijack.enabled else 0
    block, transient = architecture.block_numbers(), architecture.transient_numbers()
    if checkpointed:
        residual = _RESIDUAL_NUMBERS[recipe.backbone.dtype]
        kept = residual * architecture.depth * architecture.width + block
    else:
        kept = architecture.depth * block
    # The teacher goes first and leaves q and k of crop tokens; the layers' packed q, k and v, strip
    # included, are there until it is done.
    packed = 3 * num_layers * architecture.width
    taps = crops * views.image * 2 * num_layers * architecture.width
    phases = (
        crops * views.composite * (transient + packed),
        crops * views.wide * transient + taps,
        views.student * (kept + transient) + taps,
    )
    losses = _LOSS_TENSORS * crops * views.image * architecture.width
    return number * max(phases) + 4 * losses
