"""Train a linear head on served features to segment street scenes.

    python -m service --model models/demo --port 8123 &
    python examples/segment_camvid.py --data camvid --url http://127.0.0.1:8123 --output runs/camvid

DATA is laid out as for `python -m trainer.evaluate segmentation`: classes.json, and in train/ and
val/ the folders images/ and labels/ (PNG, one class number per pixel, 255 = ignore). Features are
fetched once, several requests in flight, and kept in OUTPUT; a second run trains at once. Prints
the mIoU of the val part and draws OUTPUT/prediction.png.

Dimension key: B = images, H, W = pixels of a label map, h, w = patch grid, X = any number of
patches, C = channels, K = classes.
"""

import argparse
import colorsys
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from service.client import FeatureClient, FeatureError
from service.client.feature_file import FeatureFile

IGNORE = 255


def say(line: str) -> None:
    """Show progress at once, also through a pipe."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def fetch(client: FeatureClient, images: list[Path], size: int, cache: Path) -> Tensor:
    """Features of the images, float16 [B, h, w, C]; asked for only if they are not in `cache`."""
    names = [image.name for image in images]
    if not is_cached(cache, names, size, client.info()["model"]["digest"]):
        started = time.monotonic()
        with FeatureFile(cache) as file:
            for index, found in client.stream(images, size=size):
                if isinstance(found, FeatureError):
                    raise found
                file.add(names[index], found)
            file.save()
        seconds = time.monotonic() - started
        say(f"fetched {len(images)} images in {seconds:.1f} s, {len(images) / seconds:.1f}/s")
    with safe_open(cache, "pt") as saved:
        return torch.stack([saved.get_tensor(name) for name in names])


def is_cached(cache: Path, names: list[str], size: int, digest: str) -> bool:
    """Whether a file holds these images at this size by the model that is served now."""
    if not cache.exists():
        return False
    with safe_open(cache, "pt") as saved:
        described = saved.metadata()
        known = {image["name"]: image for image in json.loads(described["images"])}
    return described["model_digest"] == digest and all(
        name in known and max(known[name]["resized_to"]) == size for name in names
    )


def read_labels(images: list[Path]) -> list[Tensor]:
    """Label maps, uint8 [H, W], of images of the folder beside theirs."""
    paths = [image.parents[1] / "labels" / f"{image.stem}.png" for image in images]
    return [torch.from_numpy(np.array(Image.open(path))) for path in paths]


def class_shares(label_HW: Tensor, num_classes: int, grid: tuple[int, int]) -> Tensor:
    """How much of each patch each class covers, [h, w, K]; pixels to ignore count for none."""
    one_hot_HWK = F.one_hot(label_HW.long().clamp(max=num_classes), num_classes + 1)
    shares_Khw = F.adaptive_avg_pool2d(one_hot_HWK.permute(2, 0, 1).float(), grid)
    return shares_Khw[:num_classes].permute(1, 2, 0)


class Head(nn.Module):
    """A linear layer on channels of unit variance: [..., C] -> [..., K]."""

    mean_C: Tensor
    std_C: Tensor

    def __init__(self, vectors_XC: Tensor, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("mean_C", vectors_XC.mean(dim=0))
        self.register_buffer("std_C", vectors_XC.std(dim=0) + 1e-6)
        self.linear = nn.Linear(vectors_XC.shape[1], num_classes)

    def forward(self, vectors_XC: Tensor) -> Tensor:
        logits_XK: Tensor = self.linear((vectors_XC - self.mean_C) / self.std_C)
        return logits_XK


def train(vectors_XC: Tensor, shares_XK: Tensor, *, epochs: int, batch_size: int) -> Head:
    """Fit a head to what patches really hold: no need to upsample while training."""
    head = Head(vectors_XC, shares_XK.shape[1])
    # Else poles and signs, a hundredth of all pixels, would never be named.
    weight_K = shares_XK.mean(dim=0).clamp(min=1e-6).rsqrt()
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=1e-3)
    steps = epochs * -(-len(vectors_XC) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(epochs):
        losses = []
        for batch in torch.split(torch.randperm(len(vectors_XC)), batch_size):
            log_shares_XK = head(vectors_XC[batch]).log_softmax(dim=-1)
            wanted_XK = shares_XK[batch] * weight_K
            loss = -(wanted_XK * log_shares_XK).sum() / wanted_XK.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        say(f"epoch {epoch} loss {sum(losses) / len(losses):.4f}")
    return head


@torch.inference_mode()
def predict(head: Head, features_hwC: Tensor, size: tuple[int, int]) -> Tensor:
    """Class numbers [H, W] of one image."""
    logits_1Khw = head(features_hwC.float()).permute(2, 0, 1)[None]
    upsampled_1KHW = F.interpolate(logits_1Khw, size=size, mode="bilinear", align_corners=False)
    return upsampled_1KHW[0].argmax(dim=0)


def class_iou(predictions: list[Tensor], labels: list[Tensor], num_classes: int) -> Tensor:
    """Intersection over union of each class, [K]; not a number for one that never occurs."""
    confusion_KK = torch.zeros(num_classes, num_classes)
    for predicted_HW, label_HW in zip(predictions, labels, strict=True):
        known = label_HW != IGNORE
        pairs = label_HW[known].long() * num_classes + predicted_HW[known]
        confusion_KK += torch.bincount(pairs, minlength=num_classes**2).view(confusion_KK.shape)
    correct_K = confusion_KK.diag()
    return correct_K / (confusion_KK.sum(dim=0) + confusion_KK.sum(dim=1) - correct_K)


def draw(image: Path, label_HW: Tensor, predicted_HW: Tensor, num_classes: int) -> Image.Image:
    """Photograph, truth and prediction side by side."""
    hues = [colorsys.hsv_to_rgb(k / num_classes, 0.75, 0.9) for k in range(num_classes)]
    palette = np.zeros((256, 3), dtype=np.uint8)  # black: to ignore
    palette[:num_classes] = np.array(hues) * 255
    height, width = label_HW.shape
    photograph = Image.open(image).convert("RGB").resize((width, height))
    panels = [np.asarray(photograph), palette[label_HW.numpy()], palette[predicted_HW.numpy()]]
    return Image.fromarray(np.concatenate(panels, axis=1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder as described above")
    parser.add_argument("--output", type=Path, required=True, help="folder for what is made")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the service")
    parser.add_argument("--size", type=int, default=480, help="longest side, whole patches")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4096, help="patches in a step")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(1)  # steps as small as these only wait for threads
    classes = list(json.loads((arguments.data / "classes.json").read_text()).values())
    arguments.output.mkdir(parents=True, exist_ok=True)
    parts = {}
    with FeatureClient(arguments.url) as client:
        for part in ("train", "val"):
            images = sorted((arguments.data / part / "images").iterdir())
            cache = arguments.output / f"{part}.safetensors"
            features_BhwC = fetch(client, images, arguments.size, cache)
            parts[part] = (images, features_BhwC, read_labels(images))

    _, features_BhwC, labels = parts["train"]
    grid = (features_BhwC.shape[1], features_BhwC.shape[2])
    shares_BhwK = torch.stack([class_shares(label, len(classes), grid) for label in labels])
    started = time.monotonic()
    head = train(
        features_BhwC.flatten(0, 2).float(),
        shares_BhwK.flatten(0, 2),
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
    )
    say(f"trained in {time.monotonic() - started:.1f} s")

    images, features_BhwC, labels = parts["val"]
    predictions = [
        predict(head, features_hwC, (label.shape[0], label.shape[1]))
        for features_hwC, label in zip(features_BhwC, labels, strict=True)
    ]
    iou_K = class_iou(predictions, labels, len(classes))
    for name, iou in zip(classes, iou_K.tolist(), strict=True):
        say(f"{name:>12} {100 * iou:5.1f}")
    say(f"mIoU {100 * iou_K.nanmean().item():.1f} on {len(images)} images")
    picture = draw(images[0], labels[0], predictions[0], len(classes))
    picture.save(arguments.output / "prediction.png")


if __name__ == "__main__":
    main()
