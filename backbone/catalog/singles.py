"""Backbones each with its own facts, and those that timm has no entry for."""

from collections.abc import Iterator
from dataclasses import replace

from backbone.architectures import CLIP, IMAGENET
from backbone.catalog.entry import Entry
from backbone.catalog.families import HALF


def siglip2() -> Iterator[Entry]:
    so400m = "vit_so400m_patch16_siglip_512.v2_webli"
    giant = "vit_giantopt_patch16_siglip_384.v2_webli"
    yield Entry(
        name="siglip2-so400m",
        timm=so400m,
        depth=27,
        width=1152,
        heads=16,
        hidden=4304,
        patch=16,
        prefix=0,
        native_size=512,
        size=512,
        hijack_layers=(10, 15),
        licence="Apache-2.0",
        hub=(f"timm/{so400m}", "google/siglip2-so400m-patch16-512"),
        statistics=HALF,
    )
    yield Entry(
        name="siglip2-giant",
        timm=giant,
        depth=40,
        width=1536,
        heads=16,
        hidden=6144,
        patch=16,
        prefix=0,
        native_size=384,
        size=512,
        hijack_layers=(20, 25),
        licence="Apache-2.0",
        hub=(f"timm/{giant}", "google/siglip2-giant-opt-patch16-384"),
        statistics=HALF,
    )


def clip() -> Iterator[Entry]:
    laion = "vit_giant_patch14_clip_224.laion2b"
    yield Entry(
        name="laion-g",
        timm=laion,
        depth=40,
        width=1408,
        heads=16,
        hidden=6144,
        patch=14,
        prefix=1,
        native_size=224,
        size=448,
        licence="MIT",
        hub=(f"timm/{laion}", "laion/CLIP-ViT-g-14-laion2B-s12B-b42K"),
        statistics=CLIP,
    )
    for letter, word, patch, side, depth, width, heads in (
        ("b", "base", 16, 224, 12, 768, 12),
        ("l", "large", 14, 336, 24, 1024, 16),
    ):
        published = f"openai/clip-vit-{word}-patch{patch}" + ("-336" if side == 336 else "")
        yield Entry(
            name=f"openai-clip-{letter}",
            # Without quickgelu in the name timm runs these weights with another activation.
            timm=f"vit_{word}_patch{patch}_clip_quickgelu_{side}.openai",
            depth=depth,
            width=width,
            heads=heads,
            hidden=4 * width,
            patch=patch,
            prefix=1,
            native_size=side,
            size=32 * patch,
            licence="MIT",
            hub=(f"timm/vit_{word}_patch{patch}_clip_{side}.openai", published),
            statistics=CLIP,
        )
    for letter, timm_name, patch, side, depth, width, heads, hidden in (
        ("b", "eva02_base_patch16_clip_224.merged2b", 16, 224, 12, 768, 12, 2048),
        ("l", "eva02_large_patch14_clip_336.merged2b", 14, 336, 24, 1024, 16, 2730),
    ):
        yield Entry(
            name=f"eva02-clip-{letter}",
            timm=timm_name,
            depth=depth,
            width=width,
            heads=heads,
            hidden=hidden,
            patch=patch,
            prefix=1,
            native_size=side,
            size=32 * patch,
            licence="MIT",
            hub=(f"timm/{timm_name}", "QuanSun/EVA-CLIP"),
            statistics=CLIP,
        )


def large() -> Iterator[Entry]:
    """What timm has no entry for, and InternViT's small sister."""
    yield Entry(
        name="eva-clip-8b-448",
        constructor="eva_clip_8b_patch14_448",
        depth=32,
        width=4096,
        heads=32,
        hidden=20480,
        patch=14,
        prefix=1,
        native_size=448,
        size=448,
        dense_norm=False,
        hijack_layers=(10, 15),
        licence="Apache-2.0",
        hub=("BAAI/EVA-CLIP-8B-448",),
        notes="33 GB in float32, of which 30 GB are the vision tower: load in bfloat16",
        statistics=CLIP,
    )
    yield Entry(
        name="eva-clip-18b",
        constructor="eva_clip_18b_patch14_224",
        depth=48,
        width=5120,
        heads=40,
        hidden=25600,
        patch=14,
        prefix=1,
        native_size=224,
        size=448,
        dense_norm=False,
        licence="Apache-2.0",
        hub=("BAAI/EVA-CLIP-18B",),
        notes="33 GiB of weights in bfloat16",
        statistics=CLIP,
    )
    internvit = Entry(
        name="internvit-6b-448-v2.5",
        constructor="internvit_6b_patch14_448",
        depth=45,
        width=3200,
        heads=25,
        hidden=12800,
        patch=14,
        prefix=1,
        native_size=448,
        size=448,
        dense_norm=False,
        hijack_layers=(29, 31),
        licence="MIT",
        hub=("OpenGVLab/InternViT-6B-448px-V2_5",),
        notes="its checkpoint already ends at block 45; no final norm",
        statistics=IMAGENET,
    )
    yield internvit
    yield replace(
        internvit,
        name="internvit-6b-224",
        constructor="internvit_6b_patch14_224",
        native_size=224,
        dropped_blocks=3,
        hub=("OpenGVLab/InternViT-6B-224px",),
        notes="its checkpoint has 48 blocks, of which the last three are dropped; no final norm",
    )
    intern300m = "vit_intern300m_patch14_448.ogvl_2pt5"
    yield Entry(
        name="internvit-300m",
        timm=intern300m,
        depth=24,
        width=1024,
        heads=16,
        hidden=4096,
        patch=14,
        prefix=1,
        native_size=448,
        size=448,
        dense_norm=False,
        licence="MIT",
        hub=(f"timm/{intern300m}", "OpenGVLab/InternViT-300M-448px-V2_5"),
        notes="no final norm",
        statistics=IMAGENET,
    )
    yield Entry(
        name="rice-l-560",
        constructor="rice_large_patch14_560",
        depth=24,
        width=1024,
        heads=16,
        hidden=4096,
        patch=14,
        prefix=1,
        native_size=560,
        size=560,
        dense_norm=False,
        hijack_layers=(9, 11),
        licence="not confirmed: read the model card",
        hub=("DeepGlint-AI/rice-vit-large-patch14-560",),
        statistics=CLIP,
    )
