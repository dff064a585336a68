"""Results in artifacts: manifest and card."""

import json
import logging
import os

import pytest
import timm
import torch

from backbone import load_artifact, open_model
from backbone.errors import ArtifactError
from tests.support import tiny_artifact
from trainer.evaluate.errors import EvaluationError
from trainer.evaluate.record import END, START, record, recorded
from trainer.evaluate.results import Result, Row, new_result, score


@pytest.fixture
def folder(tmp_path):
    card = "# tiny\n\nWhat it is.\n\n## Use\n\nHow to.\n"
    return tiny_artifact(tmp_path / "a", model_card=card)


def result_of(folder, miou=50.0, *, task="segmentation", dataset="camvid", size=(64, 64), seeds=1):
    values = [miou] * seeds
    digests = {"raw": "0" * 64, "refined": load_artifact(folder).manifest.digest}
    rows = [
        Row(
            subject=name,
            spec=name,
            digest=digest,
            scores=(score("mIoU", values, better="higher", unit="percent"),),
        )
        for name, digest in digests.items()
    ]
    return new_result(
        task=task,
        dataset=dataset,
        protocol="Measured.",
        settings={"size": list(size)},
        rows=rows,
        seconds=1.0,
    )


def card_of(folder):
    return (folder / "README.md").read_text()


def test_a_result_goes_into_manifest_and_card_and_weights_stay(folder):
    before = load_artifact(folder).manifest

    record(folder, result_of(folder, 51.25))

    after = load_artifact(folder).manifest
    assert after.digest == before.digest
    assert after.model_copy(update={"evaluations": ()}) == before
    (found,) = recorded(after.evaluations)
    assert found.rows[1].scores[0].interval.mean == 51.25
    card = card_of(folder)
    assert card.index("## Measured") < card.index("51.25") < card.index("## Use")
    assert card.startswith("# tiny\n\nWhat it is.\n\n## Measured\n\n")
    assert card.endswith("\n## Use\n\nHow to.\n")


def test_the_same_again_takes_its_place_and_others_stand_beside_it(folder):
    record(folder, result_of(folder, 10.0))
    record(folder, result_of(folder, 20.0, size=(32, 32)))
    record(folder, result_of(folder, 30.0, dataset="voc"))
    record(folder, result_of(folder, 40.0))

    evaluations = load_artifact(folder).manifest.evaluations
    assert [r.rows[1].scores[0].interval.mean for r in recorded(evaluations)] == [20, 30, 40]
    card = card_of(folder)
    assert card.count("## Measured\n") == card.count(START) == card.count(END) == 1
    assert "10.00" not in card
    assert all(number in card for number in ("20.00", "30.00", "40.00"))
    assert card.endswith("How to.\n")


def test_what_is_replaced_is_said_with_what_differs(folder, caplog):
    caplog.set_level(logging.INFO)
    first = result_of(folder, 10.0, task="spurious")
    layers = {"by_layer": [{"layer": 0, "FP": 1.0}]}
    rows = tuple(row.model_copy(update={"details": layers}) for row in first.rows)
    first = first.model_copy(
        update={"settings": {**first.settings, "images": 64}, "rows": rows, "date": "2026-01-02T03"}
    )
    fewer = result_of(folder, 20.0, task="spurious")
    fewer = fewer.model_copy(update={"settings": {**fewer.settings, "images": 5}})

    record(folder, first)
    assert not caplog.records
    record(folder, first)
    record(folder, fewer)

    same, other = caplog.records
    assert (same.levelname, other.levelname) == ("INFO", "WARNING")
    assert same.getMessage().endswith("of 64 images of 2026-01-02: the same settings")
    assert other.getMessage() == (
        "recorded; replaces the result of 64 images of 2026-01-02: images 64 before, 5 now; its "
        "table by block is gone"
    )
    assert len(load_artifact(folder).manifest.evaluations) == 1


def test_what_was_written_by_hand_stays(folder):
    (folder / "README.md").write_text("# Mine\n\n## Measured\n\nBy hand.\n\n## Use\n\nHow to.\n")

    record(folder, result_of(folder, 10.0))
    record(folder, result_of(folder, 20.0))

    card = card_of(folder)
    assert card.count("## Measured\n") == 1
    assert card.index("20.00") < card.index("By hand.") < card.index("How to.")
    assert "10.00" not in card


@pytest.mark.parametrize("card", ["# Short\n", None])
def test_a_card_without_sections_gets_one_at_its_end(folder, card):
    (folder / "README.md").unlink()
    if card:
        (folder / "README.md").write_text(card)

    record(folder, result_of(folder, 10.0))

    assert card_of(folder).startswith((card or "# Refined\n") + "\n## Measured\n")
    assert card_of(folder).endswith(f"{END}\n")


def test_an_artifact_with_results_loads_with_timm_and_is_served(folder):
    image = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    before = open_model(folder, precision="fp32").encode(image)[0].tokens

    record(folder, result_of(folder))

    vit = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert vit.embed_dim == 32
    assert torch.equal(open_model(folder, precision="fp32").encode(image)[0].tokens, before)


def test_values_per_image_are_left_out_and_those_per_seed_kept(folder):
    record(folder, result_of(folder, seeds=3))
    record(folder, result_of(folder, seeds=64, task="spurious"))

    seeds, images = recorded(load_artifact(folder).manifest.evaluations)
    assert len(seeds.rows[0].scores[0].values) == 3
    assert images.rows[0].scores[0].values == ()
    assert images.rows[0].scores[0].interval.count == 64


def test_spurious_tokens_have_their_scores_in_lines(folder):
    record(folder, result_of(folder, task="spurious"))

    lines = [" ".join(line.split()) for line in card_of(folder).splitlines()]
    assert "| | raw | refined | refined minus raw |" in lines
    assert "| mIoU (%) | 50.0 | 50.0 | +0.0 |" in lines


def test_a_result_of_other_weights_and_a_folder_without_artifact_are_refused(folder, tmp_path):
    other = tiny_artifact(tmp_path / "other", seed=1)

    with pytest.raises(EvaluationError, match=r"is not of .*other, whose weights have digest"):
        record(other, result_of(folder))
    with pytest.raises(ArtifactError, match=r"has no refinery\.json"):
        record(tmp_path, result_of(folder))
    assert not load_artifact(other).manifest.evaluations


def test_what_is_no_number_stays_out_of_the_manifest(folder):
    before = (folder / "refinery.json").read_bytes()

    with pytest.raises(EvaluationError, match="is not a finite number"):
        record(folder, result_of(folder, float("nan")))

    assert (folder / "refinery.json").read_bytes() == before


def test_a_damaged_card_is_named(folder):
    (folder / "README.md").write_bytes(b"\xff\xfe")

    with pytest.raises(EvaluationError, match="a card or description in .* is damaged"):
        record(folder, result_of(folder))


def test_what_cannot_be_written_leaves_the_artifact_whole(folder, monkeypatch):
    record(folder, result_of(folder, 10.0))
    card, replace = card_of(folder), os.replace

    def fail_at_the_card(source, target):
        if str(target).endswith("README.md"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_at_the_card)
    with pytest.raises(EvaluationError, match="No space left"):
        record(folder, result_of(folder, 20.0))

    assert load_artifact(folder).manifest.evaluations
    assert card_of(folder) == card
    assert not list(folder.glob(".*"))
    monkeypatch.undo()
    record(folder, result_of(folder, 30.0))
    assert "30.00" in card_of(folder)


def test_results_of_another_form_are_kept_in_the_manifest_and_not_shown(folder):
    record(folder, result_of(folder, 10.0))
    path = folder / "refinery.json"
    content = json.loads(path.read_text())
    content["evaluations"].append({"task": "speed", "dataset": "photographs"})
    path.write_text(json.dumps(content))

    record(folder, result_of(folder, 20.0))

    evaluations = load_artifact(folder).manifest.evaluations
    assert [entry["task"] for entry in evaluations] == ["speed", "segmentation"]
    assert len(recorded(evaluations)) == 1
    assert isinstance(recorded(evaluations)[0], Result)
