import pytest
import torch
from torch.nn import functional as F

from tests.trainer.evaluate.zeroshot import towers
from trainer.evaluate.zeroshot import (
    ClassEmbeddings,
    ZeroshotError,
    find_tower,
    open_text_tower,
)

TEMPLATES = ("a photo of a {}.", "the {}.")


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    towers.write_clip(folder)
    return open_text_tower(find_tower(str(folder)))


def test_an_embedding_is_the_mean_over_templates(tower):
    found = ClassEmbeddings(tower, TEMPLATES).embed(["cat", "dog", "cat"])

    cat = tower.embed(["a photo of a cat.", "the cat."]).mean(dim=0)
    torch.testing.assert_close(found[0], F.normalize(cat, dim=0))
    assert found.shape == (3, towers.DIM)
    assert torch.equal(found[0], found[2])


def test_embeddings_are_kept_by_tower_names_and_templates(tower, tmp_path, monkeypatch):
    first = ClassEmbeddings(tower, TEMPLATES, tmp_path / "text").embed(["cat", "dog"])
    (damaged, *_), count = sorted((tmp_path / "text").iterdir()), 2
    assert len(list((tmp_path / "text").iterdir())) == count

    embedded = []
    original = type(tower).embed_tokens

    def embed_tokens(self, tokens):
        embedded.append(tokens)
        return original(self, tokens)

    monkeypatch.setattr(type(tower), "embed_tokens", embed_tokens)
    again = ClassEmbeddings(tower, TEMPLATES, tmp_path / "text").embed(["cat", "dog"])
    assert torch.equal(again, first)
    assert not embedded

    damaged.write_bytes(damaged.read_bytes()[:20])  # is computed again
    assert torch.equal(
        ClassEmbeddings(tower, TEMPLATES, tmp_path / "text").embed(["cat", "dog"]), first
    )
    assert len(embedded) == 1
    other = ClassEmbeddings(tower, TEMPLATES[:1], tmp_path / "text").embed(["cat"])
    assert not torch.allclose(other[0], first[0])
    assert len(embedded) == 2


def test_a_folder_that_cannot_be_written_is_said(tower, tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(ZeroshotError, match="--text-cache none"):
        ClassEmbeddings(tower, TEMPLATES, tmp_path / "file").embed(["cat"])
