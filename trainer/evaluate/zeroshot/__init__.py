"""Open-vocabulary segmentation: patches compared with the embeddings of class names.

tower = open_text_tower(files := find_tower("openai/clip-vit-base-patch16"))
subject = AlignedSubject(local, read_head(files, tower.family), "attention")
names = make_vocabulary(dataset)
embeddings = ClassEmbeddings(tower, read_templates("imagenet80")).embed(names.names)
result = evaluate_zeroshot(dataset, names, embeddings, [subject], settings=settings)
"""

from trainer.evaluate.zeroshot.aligned import AlignedSubject, default_path
from trainer.evaluate.zeroshot.embeddings import ClassEmbeddings
from trainer.evaluate.zeroshot.errors import ZeroshotError
from trainer.evaluate.zeroshot.evaluate import (
    ZeroshotSettings,
    benchmark_table,
    evaluate_zeroshot,
)
from trainer.evaluate.zeroshot.heads import check_pair, read_head
from trainer.evaluate.zeroshot.sources import find_tower
from trainer.evaluate.zeroshot.templates import NAMED, read_templates
from trainer.evaluate.zeroshot.text import TextTower, open_text_tower
from trainer.evaluate.zeroshot.vocabulary import (
    Vocabulary,
    make_vocabulary,
    read_lines,
)

__all__ = [
    "NAMED",
    "AlignedSubject",
    "ClassEmbeddings",
    "TextTower",
    "Vocabulary",
    "ZeroshotError",
    "ZeroshotSettings",
    "benchmark_table",
    "check_pair",
    "default_path",
    "evaluate_zeroshot",
    "find_tower",
    "make_vocabulary",
    "open_text_tower",
    "read_head",
    "read_lines",
    "read_templates",
]
