"""The command line: python -m trainer.report."""

import base64
import hashlib
import json
import logging
import re
import tomllib
from fnmatch import fnmatch

import pytest

from tests.support import ROOT, noise_image
from tests.trainer.refining import model_folder
from tests.trainer.report.page_parts import (
    Page,
    digest_of,
    place_of_models,
    refined_artifact,
    segmentation_result,
)
from trainer.evaluate.record import record
from trainer.evaluate.results import write
from trainer.report import main


@pytest.fixture(autouse=True)
def _leave_logging_alone(monkeypatch):
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return place_of_models(tmp_path_factory.mktemp("report"))


def report(place, output, *more, model=None, images=None):
    arguments = ["--model", model or place / "run" / "refined", "--output", output]
    arguments += ["--images", *(images or [place / "images"]), "--size", "64", "--device", "cpu"]
    arguments += ["--precision", "fp32", "--num-images", "1", *more]
    return main([str(argument) for argument in arguments])


def written(place, output, *more, **changes):
    assert report(place, output, *more, **changes) == 0
    return output.read_text()


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """A page with every part, and what it was made of."""
    folder = tmp_path_factory.mktemp("whole")
    run = folder / "run"
    run.mkdir()
    steps = [{"step": n, "loss": 7.0 - n / 10, "clean": 0.5, "lr": 1e-4} for n in range(1, 13)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    digest = digest_of(place / "run" / "refined")
    result = segmentation_result(
        [40.0, 41.0, 42.0], [43.1, 44.2, 45.0], digest=digest, classes={"road": 81.25}
    )
    write(result, folder / "streets.json")
    (folder / "table.json").write_text(
        json.dumps(
            {
                "recipe": "tiny",
                "training_seeds": [0],
                "probe_seeds": 3,
                "command": "python -m trainer.ablate",
                "versions": {},
                "dates": [],
                "rows": [
                    {"name": "full", "about": "all of it", "status": "done", "cells": []},
                    {"name": "no-uni", "about": "without", "status": "skipped", "reasons": ["why"]},
                ],
            }
        )
    )
    arguments = ["--run", run, "--results", folder / "streets.json"]
    arguments += ["--ablation", folder / "table.json", "--attention-layers", "0", "1"]
    text = written(place, folder / "report.html", *arguments)
    return text, Page(text), result


def test_a_page_is_whole_and_loads_nothing(whole):
    text, page, _ = whole

    assert page.open == []
    assert page.sources
    assert all(source.startswith("data:image/") for source in page.sources)
    assert all(link.startswith("#") for link in page.links)
    assert "link" not in page.tags
    assert not re.search(r"url\(|@import|https?://", re.sub(r'"data:[^"]*"', "", text))
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links} <= set(page.ids)


def test_only_the_page_s_own_script_may_run(whole):
    text, _, _ = whole

    (allowed,) = re.findall(r"script-src '(.*?)'", text)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert allowed == f"sha256-{digest}"


def test_every_part_that_was_given_is_shown(whole):
    _, page, _ = whole

    sections = ["verdict", "images", "measured", "ablation", "training", "card", "facts"]
    assert [name for name in page.ids if not name.startswith("image-")] == sections
    for words in ("Fixed patterns", "Global proxies", "Attention hijackees", "Token norm"):
        assert words in page.text
    assert "register border of 1" in page.text
    assert "Its card ." in page.text
    assert "skipped why" in page.text
    assert "The headline counts spurious tokens (FP or GP)" in page.text
    assert "Of the 1 shown here only" in page.text


def test_values_are_those_of_the_results(whole):
    _, page, result = whole

    raw, refined, difference = (row.scores[0].interval for row in result.rows)
    for interval in (raw, refined):
        assert f"{interval.mean:.2f} {interval.low:.2f} to {interval.high:.2f}" in page.text
    change = f"+{difference.mean:.2f} +{difference.low:.2f} to +{difference.high:.2f}"
    assert change in page.text
    assert "road 81.25 81.25 +0.00" in page.text
    assert "mIoU on streets" in page.text
    assert "better" in page.text


def test_every_picture_says_what_it_shows(whole):
    _, page, _ = whole

    assert page.tags.count("img") == len(page.alts) == 1 + 2 * 6
    assert all(page.alts)


def test_what_was_not_given_is_left_out(place, tmp_path):
    page = Page(written(place, tmp_path / "report.html"))

    assert [name for name in page.ids if not name.startswith("image-")] == [
        "verdict", "images", "card", "facts",
    ]  # fmt: skip
    assert "Attention hijackees" not in page.text


def test_one_backbone_alone_has_nothing_to_be_compared_with(place, tmp_path, capsys):
    text = written(place, tmp_path / "report.html", "--baseline", "none")

    page = Page(text)
    assert "Nothing to compare" in page.text
    assert "the image below" not in page.text
    assert page.tags.count("img") == 1 + 5
    assert "is better" not in capsys.readouterr().out


def test_names_that_are_html_stay_text(place, tmp_path):
    evil = "<img src=x onerror=alert(1)>\"'&"
    images = tmp_path / "images"
    images.mkdir()
    noise_image(64, 48).save(images / "a<b onerror=alert(2)>.png")
    manifest = refined_artifact(
        tmp_path / "<i>model",
        place / "raw",
        model_card=f"# {evil}\n\n| a |\n|---|\n| {evil} |\n",
        recipe={"name": evil, "backbone": {"name": str(place / "raw")}},
    )
    result = segmentation_result(
        [1.0, 2.0], [1.0, 2.0], digest=manifest.digest, dataset=evil, classes={evil: 5.0}
    )
    write(result, tmp_path / "r.json")

    text = written(
        place,
        tmp_path / "report.html",
        "--results",
        tmp_path / "r.json",
        model=tmp_path / "<i>model",
        images=[images],
    )

    page = Page(text)
    assert page.handlers == []
    assert page.tags.count("i") == 2  # the scales of colours
    assert page.tags.count("script") == 2
    assert evil in page.text
    assert "a<b onerror=alert(2)>.png" in page.text


def test_results_in_the_artifact_are_shown_and_a_file_takes_their_place(place, tmp_path):
    folder = tmp_path / "refined"
    manifest = refined_artifact(folder, place / "raw")
    record(folder, segmentation_result([1.0], [31.25], digest=manifest.digest))
    recorded = Page(written(place, tmp_path / "a.html", model=folder))
    write(segmentation_result([1.0], [62.5], digest=manifest.digest), tmp_path / "r.json")

    page = Page(written(place, tmp_path / "b.html", "--results", tmp_path / "r.json", model=folder))

    assert "31.25" in recorded.text
    assert "See the results above." in recorded.text
    assert "62.50" in page.text
    assert "31.25" not in page.text


def test_results_of_other_weights_are_warned_of_and_decide_nothing(place, tmp_path, capsys):
    write(segmentation_result([1.0, 2.0], [8.0, 9.0], digest="f" * 64), tmp_path / "r.json")

    page = Page(written(place, tmp_path / "report.html", "--results", tmp_path / "r.json"))

    captured = capsys.readouterr()
    assert "of other weights than this report shows: digest ffffffffffff" in page.text
    assert "Not counted here" in page.text
    assert "mIoU" not in captured.out
    assert "ffffffffffff" in captured.err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "Invalid JSON"),
        ('{"task": "segmentation"}', "dataset"),
        (None, "No such file"),
    ],
)
def test_a_result_that_cannot_be_read_is_an_error_that_says_why(
    place, tmp_path, capsys, content, said
):
    if content is not None:
        (tmp_path / "r.json").write_text(content)

    code = report(place, tmp_path / "report.html", "--results", tmp_path / "r.json")

    assert code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_what_a_user_can_mend_is_an_error(place, tmp_path, capsys):
    (tmp_path / "none").mkdir()
    (tmp_path / "table.json").write_text('{"rows": 1}')
    model_folder(place / "patch8", "vit_small_patch8_224")
    output = tmp_path / "report.html"
    cases = [
        ({"images": [tmp_path / "none"]}, (), "no images under"),
        ({"images": [tmp_path / "nothing.png"]}, (), "does not exist"),
        ({}, ("--ablation", tmp_path / "table.json"), "recipe: Field required"),
        ({}, ("--run", tmp_path), "has no metrics.jsonl"),
        ({}, ("--attention-layers", "1", "2"), "blocks 0 to 1"),
        ({}, ("--size", "8"), "less than one 16 px patch"),
        ({}, ("--baseline", place / "patch8"), "patches of 8 px"),
        ({}, ("--reference", tmp_path / "nothing.png"), "reference image"),
    ]
    for changes, more, said in cases:
        assert report(place, output, *more, **changes) == 2
        assert said in capsys.readouterr().err.replace("\n", " ")
    assert report(place, tmp_path) == 2
    assert "give --output a file" in capsys.readouterr().err


def test_a_seed_chooses_the_images_and_their_aspect_is_kept(place, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(6):
        noise_image(40, 80, seed=number).save(images / f"{number}.png")

    def names(seed):
        text = written(place, tmp_path / "p.html", "--seed", seed, images=[images])
        return re.findall(r"<h3>(\d\.png)", text), text

    first, text = names(1)

    assert names(1)[0] == first
    assert any(names(seed)[0] != first for seed in (2, 3, 4))
    assert "64 × 32 px, 4 × 2 patches" in text


def test_a_run_is_found_beside_its_artifact(place, tmp_path):
    refined_artifact(tmp_path / "refined", place / "raw")
    line = {"step": 1, "loss": 6.5, "lr": 0.1}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")

    page = Page(written(place, tmp_path / "report.html", model=tmp_path / "refined"))

    assert "training" in page.ids


def test_the_style_and_the_script_belong_to_the_package():
    # They are read beside the modules: an installation without them could not write a page.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["trainer"]

    for file in (ROOT / "trainer" / "report").iterdir():
        if file.suffix in (".css", ".js"):
            assert any(fnmatch(f"report/{file.name}", pattern) for pattern in patterns)
