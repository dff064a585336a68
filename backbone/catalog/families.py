"""Backbones that come in several sizes of one pattern; timm has all of them."""

from collections.abc import Iterator
from dataclasses import replace

from backbone.architectures import CLIP, IMAGENET, Statistics
from backbone.catalog.entry import Entry

HALF = Statistics((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
SAT493M = Statistics((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))


def dinov2() -> Iterator[Entry]:
    sizes = {
        "s": ("small", 12, 384, 6, 1536),
        "b": ("base", 12, 768, 12, 3072),
        "l": ("large", 24, 1024, 16, 4096),
        "g": ("giant", 40, 1536, 24, 4096),
    }
    for letter, (word, depth, width, heads, hidden) in sizes.items():
        plain = Entry(
            name=f"dinov2-{letter}",
            timm=f"vit_{word}_patch14_dinov2.lvd142m",
            depth=depth,
            width=width,
            heads=heads,
            hidden=hidden,
            patch=14,
            prefix=1,
            native_size=518,
            size=518,
            r_reg=37,
            licence="Apache-2.0",
            hub=(f"timm/vit_{word}_patch14_dinov2.lvd142m", f"facebook/dinov2-{word}"),
            statistics=IMAGENET,
        )
        yield plain
        registers = f"vit_{word}_patch14_reg4_dinov2.lvd142m"
        yield replace(
            plain,
            name=f"dinov2-{letter}-reg",
            timm=registers,
            prefix=5,
            hub=(f"timm/{registers}", f"facebook/dinov2-with-registers-{word}"),
        )


def dinov3() -> Iterator[Entry]:
    sizes = {
        "s": ("small", "s16", 12, 384, 6, 1536),
        "s-plus": ("small_plus", "s16plus", 12, 384, 6, 1536),
        "b": ("base", "b16", 12, 768, 12, 3072),
        "l": ("large", "l16", 24, 1024, 16, 4096),
        "h-plus": ("huge_plus", "h16plus", 32, 1280, 20, 5120),
        "7b": ("7b", "7b16", 40, 4096, 32, 8192),
    }
    for letter, (word, short, depth, width, heads, hidden) in sizes.items():
        timm_name = f"vit_{word}_patch16_dinov3.lvd1689m"
        web = Entry(
            name=f"dinov3-{letter}",
            timm=timm_name,
            depth=depth,
            width=width,
            heads=heads,
            hidden=hidden,
            patch=16,
            prefix=5,
            native_size=256,
            size=512,
            licence="DINOv3 licence",
            hub=(f"timm/{timm_name}", f"facebook/dinov3-vit{short}-pretrain-lvd1689m"),
            notes="facebook/* asks for a contact form first",
            statistics=IMAGENET,
        )
        yield web
        if letter in ("l", "7b"):
            satellite = timm_name.replace("lvd1689m", "sat493m")
            yield replace(
                web,
                name=f"dinov3-{letter}-sat",
                timm=satellite,
                hub=(f"timm/{satellite}", f"facebook/dinov3-vit{short}-pretrain-sat493m"),
                statistics=SAT493M,
            )


def aimv2() -> Iterator[Entry]:
    sizes = {
        "l": ("large", 1024, 8, 2816),
        "h": ("huge", 1536, 12, 4096),
        "1b": ("1b", 2048, 16, 5632),
        "3b": ("3b", 3072, 24, 8192),
    }
    for letter, (word, width, heads, hidden) in sizes.items():
        yield Entry(
            name=f"aimv2-{letter}",
            timm=f"aimv2_{word}_patch14_448.apple_pt",
            depth=24,
            width=width,
            heads=heads,
            hidden=hidden,
            patch=14,
            prefix=0,
            native_size=448,
            size=448,
            licence="Apple sample code licence",
            hub=(f"timm/aimv2_{word}_patch14_448.apple_pt", f"apple/aimv2-{word}-patch14-448"),
            statistics=CLIP,
        )


def pe_spatial() -> Iterator[Entry]:
    sizes = {
        "t": ("tiny", "T16-512", 12, 192, 3, 768),
        "s": ("small", "S16-512", 12, 384, 6, 1536),
        "b": ("base", "B16-512", 12, 768, 12, 3072),
        "l": ("large", "L14-448", 24, 1024, 16, 4096),
        "g": ("gigantic", "G14-448", 50, 1536, 16, 8960),
    }
    for letter, (word, short, depth, width, heads, hidden) in sizes.items():
        patch, side = int(short[1:3]), int(short[-3:])
        timm_name = f"vit_pe_spatial_{word}_patch{patch}_{side}.fb"
        yield Entry(
            name=f"pe-spatial-{letter}",
            timm=timm_name,
            depth=depth,
            width=width,
            heads=heads,
            hidden=hidden,
            patch=patch,
            prefix=0 if letter == "g" else 1,
            native_size=side,
            size=side,
            licence="Apache-2.0",
            hub=(f"timm/{timm_name}", f"facebook/PE-Spatial-{short}"),
            notes="no final norm",
            statistics=HALF,
        )


def c_radio() -> Iterator[Entry]:
    sizes = {
        "v3-b": ("base", "B", 12, 768, 12, 3072, 8),
        "v3-l": ("large", "L", 24, 1024, 16, 4096, 8),
        "v3-h": ("huge", "H", 32, 1280, 16, 5120, 8),
        "v3-g": ("giant", "g", 40, 1536, 24, 6144, 8),
        "v4-so400m": ("so400m", "SO400M", 27, 1152, 16, 4304, 10),
        "v4-h": ("huge", "H", 32, 1280, 16, 5120, 10),
    }
    for short, (word, hub, depth, width, heads, hidden, prefix) in sizes.items():
        timm_name = f"vit_{word}_patch16_radio_{short[:2]}.c_radio"
        yield Entry(
            name=f"c-radio-{short}",
            timm=timm_name,
            depth=depth,
            width=width,
            heads=heads,
            hidden=hidden,
            patch=16,
            prefix=prefix,
            native_size=512,
            size=512,
            licence="NVIDIA open model licence",
            hub=(f"timm/{timm_name}", f"nvidia/C-RADIO{short[:2]}-{hub}"),
            notes="no final norm; position embeddings are exact at 512 px, and at other sizes "
            "resampled from there, where the original resamples from its 128 x 128 grid",
            statistics=CLIP,
        )
