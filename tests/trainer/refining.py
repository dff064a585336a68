"""Small runs for the trainer's tests: a folder of images, a model folder, a refiner."""

import io
import tarfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf

from backbone import Backbone
from tests.support import noise_image, tiny_backbone, tiny_vit
from trainer.config import Recipe
from trainer.lora import Adapter
from trainer.recipe_file import load_recipe
from trainer.refiner import Refiner

SIZE = 64
SMALL = [
    f"data.size={SIZE}",
    "data.batch_size=2",
    "data.workers=2",
    "run.precision=fp32",
    "channels.max_channels=0",
    "run.preview_images=1",
    "run.measure_images=0",
]


def small_recipe(*settings: str, name: str = "paper") -> Recipe:
    return load_recipe(name, [*SMALL, *settings])


def image_folder(folder: Path, count: int = 6, side: int = 80) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        noise_image(side, side + 10, seed=number).save(folder / f"{number:03}.png")
    return folder


def model_folder(folder: Path, name: str = "vit_tiny_patch16_224", seed: int = 0) -> Path:
    """A pre-trained backbone as timm's local-dir format has it."""
    folder.mkdir(parents=True)
    vit = tiny_vit(name, seed)
    save_config_for_hf(vit, str(folder / "config.json"))
    save_file(vit.state_dict(), folder / "model.safetensors")
    return folder


def small_refiner(
    recipe: Recipe | None = None, *, backbone: Backbone | None = None, trained: bool = True
) -> Refiner:
    """A refiner of a tiny backbone; `trained` gives the adapter weights that change something."""
    recipe = recipe or small_recipe()
    backbone = backbone or tiny_backbone()
    adapter = Adapter.attach(backbone, recipe.lora, seed=0)
    if trained:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in backbone.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    reference = torch.randint(
        256, (3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(2)
    )
    refiner = Refiner(backbone, adapter, recipe, size=SIZE, reference_3SS=reference)
    return refiner.train()


def random_images(count: int = 2, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)


def one_step(refiner: Refiner, images: torch.Tensor, seed: int = 4, progress: float = 0.5) -> Any:
    """Loss, terms and gradients of one step."""
    draws = refiner.draw(
        len(images), progress=progress, generator=torch.Generator().manual_seed(seed)
    )
    refiner.zero_grad()
    output = refiner(images, draws)
    output.loss.backward()
    gradients = {n: p.grad for n, p in refiner.named_parameters() if p.requires_grad}
    return output.loss.detach(), output.terms, gradients


def write_shard(path: Path, content: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    """A tar file with these members, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path
