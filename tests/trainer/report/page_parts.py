"""Small inputs of reports, and a reader of their pages."""

from html.parser import HTMLParser
from pathlib import Path

from backbone import Backbone, RegisterBorder, save_artifact
from backbone.artifact import Manifest, read_manifest
from tests.support import tiny_backbone
from tests.trainer.refining import image_folder, model_folder
from trainer.evaluate.results import CLASS_IOU, Result, Row, new_result, score

VOID = ("meta", "img", "line", "circle", "path", "polyline", "br")


class Page(HTMLParser):
    """What a page says: its text, its tags, attributes that refer to something, ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.alts: list[str] = []
        self.handlers: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "srcset", "data", "poster"):
                self.sources.append(value)
            elif name in ("href", "xlink:href", "action"):
                self.links.append(value)
            elif name == "id":
                self.ids.append(value)
            elif name == "alt":
                self.alts.append(value)
            elif name.startswith("on"):
                self.handlers.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def refined_artifact(folder: Path, raw: Path, **changes) -> Manifest:
    """An artifact whose weights differ from the raw model's, and whose recipe names it."""
    arguments = {
        "border": RegisterBorder(seed=7),
        "model_card": "---\nlicense: mit\n---\n# tiny, refined\n\nIts **card**.\n",
        "recipe": {"name": "tiny", "backbone": {"name": str(raw)}},
    }
    return save_artifact(folder, refined_backbone(), **(arguments | changes))


def refined_backbone() -> Backbone:
    return tiny_backbone(seed=1)


def place_of_models(folder: Path) -> Path:
    """`images`, `raw` and `run/refined` in a folder."""
    image_folder(folder / "images", count=3, side=64)
    model_folder(folder / "raw")
    refined_artifact(folder / "run" / "refined", folder / "raw")
    return folder


def segmentation_result(
    raw: list[float],
    refined: list[float],
    *,
    digest: str = "",
    dataset: str = "streets",
    classes: dict[str, float] | None = None,
) -> Result:
    """mIoU of two backbones, with the IoU of classes."""
    rows = [
        Row(
            subject=name,
            spec=name,
            digest=digest if name == "refined" else "",
            scores=(score("mIoU", values, better="higher", unit="percent"),),
            details={CLASS_IOU: dict(classes)} if classes else {},
        )
        for name, values in (("raw", raw), ("refined", refined))
    ]
    return new_result(
        task="segmentation",
        dataset=dataset,
        protocol="A linear layer.",
        settings={"size": [64, 64]},
        rows=rows,
        seconds=1.0,
    )


def digest_of(folder: Path) -> str:
    return read_manifest(folder).digest
