"""The recipe: every number of the method, by one name.

A recipe is a TOML file (`trainer.recipe_file` reads it); what it leaves out has the value that the
paper states. Sections are passed down to the code that uses them, and a field has the name of the
argument it becomes.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from backbone.encoder import Precision
from backbone.registers import Fill, Rounding
from kernels import Flow
from trainer.errors import RecipeError
from trainer.filters import Criterion

Share = Annotated[float, Field(ge=0, le=1)]
Cosine = Annotated[float, Field(ge=-1, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Section(BaseModel):
    """Part of a recipe: immutable, and closed to unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


class BackboneSection(Section):
    """What is refined."""

    name: str = "vit_so400m_patch16_siglip_512.v2_webli"
    """Entry of the catalogue, timm model name, `local-dir:PATH`, or a folder in timm's format (an
    artifact is one)."""
    weights: str | None = None
    """Checkpoint for the model named above: a file, or a folder with one or with shards; none: the
    weights that belong to the name."""
    random_weights: bool = False
    """Random weights instead of pre-trained ones, for trials."""
    dense_norm: bool | None = None
    """Take dense features after the model's final norm; none: as the catalogue says, else true."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the frozen weights are held in while training. bfloat16 takes half of the memory, and
    needs a run in bf16; the adapter is in float32 all the same."""


class RegistersSection(Section):
    """The register border around the student's image."""

    r_reg: Count = 32
    """Image tokens per register token of border width; 37 for DINOv2 at 518 px."""
    rounding: Rounding = "ceil"
    """How the border width is rounded; the release uses `floor`."""
    fill: Fill = "gaussian"
    """What the border's pixels are: noise, `zeros` (release), or `learnable` (an ablation)."""
    seed: Seed = 0
    """Seed of the border that the artifact is served with."""


class CropsSection(Section):
    """Proposals, and the reference image they are joined with."""

    num_crops: Count = 3
    """Proposals per image, K."""
    area: tuple[Share, Share] = (0.25, 0.5)
    """Smallest and largest share of the image's area."""
    aspect: tuple[Positive, Positive] = (2 / 3, 3 / 2)
    """Smallest and largest width over height."""
    strip_share: float = Field(0.35, gt=0, le=1)
    """Width of the reference strip over the crop's."""
    reference: str | None = None
    """File of the reference image; none: the abstract picture that ships with the trainer."""

    @model_validator(mode="after")
    def _ranges_ascend(self) -> Self:
        for name, (low, high) in (("area", self.area), ("aspect", self.aspect)):
            if low > high:
                raise ValueError(f"{name} is {low}..{high}; give the smaller number first")
        if self.area[0] == 0:
            raise ValueError("area starts at 0, and a crop without area shows nothing")
        return self


class FpGpSection(Section):
    """The similarity path: fixed patterns and global proxies."""

    enabled: bool = True
    """Use the filter."""
    criterion: Criterion = "cosine"
    """`cosine`: threshold is a cosine. `zscore`: standard deviations above the sample's mean."""
    threshold: float = Field(0.5, ge=-10, le=10)
    """tau, or sigma for the criterion `zscore`."""
    candidate_share: float = Field(0.4, gt=0, le=1)
    """Share of highest-scoring crop tokens from which candidates for absorption are drawn."""


class RegisterGuidedSection(Section):
    """Closing the loop: the student's registers as detectors."""

    enabled: bool = True
    """Use the filter."""
    threshold: Cosine = 0.6
    """tau_reg; 0.55 in the release's recipes."""
    detector_share: float = Field(1 / 3, gt=0, le=1)
    """Share of an image's register tokens that are detectors in a step; at least one is."""


class AttentionHijackSection(Section):
    """The attention-flow path: hijacked tokens."""

    enabled: bool = True
    """Use the filter."""
    variant: Flow = "paper"
    """Which attention is summed: per head and scaled (`paper`), or heads joined (`release`)."""
    threshold: float = Field(-0.5, ge=-10, le=10)
    """tau_ah: standard deviations above the mean inflow that a clean token exceeds."""
    layers: tuple[int, int] | None = None
    """First and last block, counted from 0; none: `depth_range` of whatever the depth is."""
    depth_range: tuple[Share, Share] = (0.37, 0.56)
    """Layers as shares of the depth, rounded: blocks 10 to 15 of 27."""

    def layer_range(self, depth: int) -> range:
        """Blocks whose attention is summed, of a backbone with `depth` of them.

        Raises:
            RecipeError: the backbone has no such blocks.
        """
        first, last = self.layers or (
            min(round(share * depth), depth - 1) for share in self.depth_range
        )
        if not 0 <= first <= last < depth:
            raise RecipeError(
                f"filters.attention_hijack: layers {first}..{last}, but the backbone's blocks are "
                f"0..{depth - 1}; set filters.attention_hijack.layers, or .enabled=false"
            )
        return range(first, last + 1)


class FiltersSection(Section):
    """Spurious-token filters."""

    fp_gp: FpGpSection = FpGpSection()
    """Fixed patterns and global proxies."""
    register_guided: RegisterGuidedSection = RegisterGuidedSection()
    """Tokens that resemble registers."""
    attention_hijack: AttentionHijackSection = AttentionHijackSection()
    """Tokens without a say."""


class LossSection(Section):
    """Losses and their weights."""

    temperature: Positive = 0.2
    """t, of every loss."""
    matched: bool = True
    """Targets are the nearest tokens of the teacher's full image; else the crop's own tokens."""
    uniformity: NotNegative = 0.3
    """u, strength of the uniformity part of L_regu."""
    lambda_uni: NotNegative = 1.0
    """Weight of L_uni, which keeps image and register tokens apart."""
    lambda_spu: NotNegative = 0.1
    """Weight of L_spu, with which registers absorb spurious tokens."""
    affinity_floor: Cosine = 0.55
    """Image and register tokens less similar than this are far enough apart."""
    crop_weight: NotNegative = 0.2
    """L_spu: weight of the pull between some registers and the crop tokens they are like."""
    crop_top: float = Field(0.1, gt=0, le=1)
    """L_spu: share of registers which that pull is for."""
    sparsity_margin: NotNegative = 0.1
    """L_spu: dissimilar pairs count as the sparsity level plus this."""
    lambda_con: NotNegative = 0.0
    """Weight of spatial consistency; 0.4 in the release."""
    consistency_start: Share = 0.1
    """Part of the training after which spatial consistency starts."""
    consistency_width: Count = 4
    """Border width in patches around the consistency target's crops, at least."""


class ChannelsSection(Section):
    """Search for channels that swamp every cosine, before training."""

    max_channels: int = Field(5, ge=0)
    """Channels masked at most; 0 switches the search off."""
    num_images: int = Field(64, ge=2)
    """Images in the bank; fewer where there are fewer."""
    num_tokens: int = Field(128, ge=2)
    """Random tokens of each image; fewer where an image has fewer."""
    threshold: Cosine = 0.2
    """Cross-image cosine that is low enough."""
    min_gain: NotNegative = 0.005
    """Smallest fall of that cosine worth a channel."""
    candidate_pool: Count = 16
    """Best-scoring channels tried in a round."""


class LoraSection(Section):
    """The adapter, on every linear layer of the blocks."""

    rank: int = Field(8, ge=1, le=1024)
    """Rank of an update."""
    alpha: Positive = 16.0
    """Updates are scaled by alpha / rank."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout on the adapters' input."""


class OptimSection(Section):
    """AdamW and its schedule."""

    lr: Positive = 1e-4
    """Learning rate at a global batch of `reference_batch`; scales linearly with the batch."""
    reference_batch: Count = 16
    """Images per optimiser step that `lr` is for."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.98,
    )
    """Decay of the moment estimates."""
    eps: Positive = 1e-6
    """Added to the root of the second moment."""
    weight_decay: NotNegative = 0.1
    """For tensors of two dimensions and more; others have none."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Course of the learning rate after the warm-up."""
    warmup: Share = 0.0
    """Part of the training over which the learning rate rises from zero."""
    final_lr: Share = 0.0
    """End of the cosine, as a share of `lr`."""
    lora_plus_ratio: Positive = 1.0
    """Learning rate of lora_B over that of lora_A; 4 for LoRA+."""
    clip_norm: NotNegative = 1.0
    """Gradients longer than this are scaled down to it; 0 switches it off. Not in the paper."""


class DataSection(Section):
    """Images and batches."""

    size: Count | None = None
    """Side of the square training images in pixels; none: the backbone's own."""
    other_sizes: tuple[Count, ...] = ()
    """Sides that are trained at too: every optimiser step takes one of all of them at random."""
    fit: Literal["crop", "stretch"] = "crop"
    """How an image becomes square: its central square, or stretched."""
    batch_size: Count = 16
    """Images per forward."""
    accumulate: Count = 1
    """Forwards whose gradients are averaged into one optimiser step."""
    epochs: Positive = 2.0
    """Passes over the images."""
    max_images: Count | None = 5000
    """Images used at most, chosen at random by `run.seed`; none: all."""
    max_pixels: Count = 40_000_000
    """Largest image that is read, in pixels."""
    max_bad_share: Share = 0.05
    """Largest share of unreadable images that --skip-bad-images skips; one it always does."""
    workers: Count = 4
    """Threads that decode images."""
    resize: Literal["host", "device"] = "host"
    """Where images get their size: in the threads, or on the device, where CUDA's pixels are within
    one level of the CPU's."""


class RunSection(Section):
    """What does not change the method."""

    seed: Seed = 0
    """Seed of everything random in a run."""
    max_steps: Count | None = None
    """Optimiser steps at most; none: as many as `data.epochs` makes."""
    precision: Precision = "auto"
    """`auto`: bf16 where the hardware has matrix units for it; losses are in fp32 anyway."""
    deterministic: bool = False
    """Only algorithms that give the same bits again; what has none is an error. Slower on a GPU."""
    gradient_checkpointing: bool = False
    """Recompute the student's blocks in the backward pass: less memory, more time."""
    checkpoint_every: Count = 100
    """Optimiser steps between checkpoints."""
    log_every: Count = 10
    """Optimiser steps between log lines where there is no terminal for a progress bar."""
    tensorboard: bool = False
    """Write TensorBoard events too (extra `tensorboard`)."""
    wandb: bool = False
    """Log to Weights & Biases too (extra `wandb`); its WANDB_* variables are in force."""
    snapshot_every: int = Field(0, ge=0)
    """Optimiser steps between pictures of the student in OUTPUT/snapshots; 0: none."""
    preview_images: Count = 4
    """Images in preview.png and in snapshots."""
    measure_images: int = Field(16, ge=0)
    """Images on which the artifact is measured when it is written, for its card; 0: none."""
    weights_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """What the artifact's weights are stored in."""


class Recipe(Section):
    """Everything that decides what a run computes, but for images and code."""

    name: str = "paper"
    """What the recipe is called."""
    backbone: BackboneSection = BackboneSection()
    """What is refined."""
    registers: RegistersSection = RegistersSection()
    """The register border."""
    crops: CropsSection = CropsSection()
    """Proposals and reference image."""
    filters: FiltersSection = FiltersSection()
    """Spurious-token filters."""
    loss: LossSection = LossSection()
    """Losses."""
    channels: ChannelsSection = ChannelsSection()
    """Channel mask."""
    lora: LoraSection = LoraSection()
    """Adapter."""
    optim: OptimSection = OptimSection()
    """Optimiser."""
    data: DataSection = DataSection()
    """Images and batches."""
    run: RunSection = RunSection()
    """Seed, precision, records."""

    @model_validator(mode="after")
    def _learned_border_has_one_size(self) -> Self:
        if self.data.other_sizes and self.registers.fill == "learnable":
            raise ValueError(
                "data.other_sizes: a learnable border is made for one size; leave the other sizes "
                "out, or set another registers.fill"
            )
        return self

    @property
    def global_batch(self) -> int:
        """Images per optimiser step."""
        return self.data.batch_size * self.data.accumulate
