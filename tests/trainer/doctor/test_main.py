"""The command line: python -m trainer doctor."""

import logging
import re
from html.parser import HTMLParser

import pytest
import torch

from backbone import RegisterBorder
from backbone.registers import LearnableBorder
from tests.support import tiny_artifact
from tests.trainer.refining import image_folder, model_folder
from trainer.doctor import main
from trainer.recipe_file import load_recipe


@pytest.fixture(autouse=True)
def _leave_logging_alone(monkeypatch):
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doctor")
    image_folder(folder / "images", count=3)
    model_folder(folder / "model")
    return folder


def examine(place, output, *more, backbone=None, images=None):
    arguments = ["--backbone", backbone or place / "model", "--images", images or place / "images"]
    arguments += ["--output", output, "--device", "cpu", "--set", "data.size=64", *more]
    arguments += ["--set", "run.precision=fp32"]
    return main([str(argument) for argument in arguments])


class Page(HTMLParser):
    """Tags that were opened and not closed, and what attributes refer to."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.references = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [v for n, v in attributes if n in ("src", "href", "xlink:href")]
        if tag not in ("meta", "img", "line", "rect", "polygon"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):  # noqa: ARG002
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_page_and_a_summary_with_flags_are_written(place, tmp_path, capsys):
    code = examine(place, tmp_path / "report.html", "--set", "filters.fp_gp.threshold=0.01")

    shown = capsys.readouterr().out
    assert code == 0
    (line,) = re.findall(r"suggested: (--set .*)", shown)
    flags = line.replace("--set ", "").split(" ")
    assert any(flag.startswith("filters.fp_gp.") for flag in flags)
    recipe = load_recipe("paper", flags)
    assert recipe.filters.fp_gp.threshold != 0.01
    text = (tmp_path / "report.html").read_text()
    assert all(flag in text for flag in flags)
    assert str(place / "model") in text
    assert "fixed pattern" in shown


def test_the_page_is_whole_and_loads_nothing(place, tmp_path):
    examine(place, tmp_path / "report.html")

    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert "http://" not in text
    assert "https://" not in text
    assert len(page.references) == 3 * 7
    assert all(reference.startswith("data:image/jpeg;base64,") for reference in page.references)
    assert page.tags.count("svg") == 3


def test_the_suggestions_do_what_was_promised(place, tmp_path, capsys):
    strict = ["--set", "filters.fp_gp.threshold=0.01"]
    examine(place, tmp_path / "first.html", *strict)
    first = capsys.readouterr().out
    (flags,) = re.findall(r"suggested: (--set .*)", first)
    examine(place, tmp_path / "second.html", *strict, *flags.split())
    second = capsys.readouterr().out

    ((before, promised),) = re.findall(r"^clean +([\d.]+) +([\d.]+)", first, re.MULTILINE)
    after = re.findall(r"^clean +([\d.]+)", second, re.MULTILINE)
    assert float(before) == 0
    assert after == [promised]
    assert float(promised) > 10


def test_a_refined_backbone_is_measured_with_its_own_border(place, tmp_path, capsys):
    artifact = tiny_artifact(tmp_path / "refined")

    code = examine(place, tmp_path / "report.html", backbone=artifact)

    assert code == 0
    assert "untrained here" not in capsys.readouterr().out


def test_a_learned_border_is_measured_as_it_was_trained(place, tmp_path):
    border = RegisterBorder(fill="learnable")
    learned = LearnableBorder((96, 96), 1, 16)
    artifact = tiny_artifact(tmp_path / "refined", border=border, learned_border=learned)

    assert examine(place, tmp_path / "report.html", backbone=artifact) == 0


@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch16_siglip_224",  # no prefix token
        "vit_small_patch16_dinov3_qkvb",  # rotary embedding, registers of its own
        "eva02_base_patch16_clip_224",  # separate projections
    ],
)
def test_other_families_are_measured_too(place, tmp_path, name):
    model = model_folder(tmp_path / "model", name)

    assert examine(place, tmp_path / "report.html", "--num-images", 1, backbone=model) == 0


def test_a_single_image_is_enough_and_channels_are_not_searched(place, tmp_path, capsys):
    code = examine(place, tmp_path / "report.html", "--num-images", 1)

    assert code == 0
    assert "channels masked" not in capsys.readouterr().out
    assert "Not searched" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--recipe", "papr"], "no recipe is called 'papr'"),
        (["--backbone", "/no/such/model"], "/no/such/model is not a model folder"),
        (["--images", "/no/such/folder"], "/no/such/folder"),
        (["--set", "data.size=60"], "not a whole number of 16 px patches"),
        (["--set", "filters.attention_hijack.layers=[7, 8]"], "layers 7..8, but the backbone's"),
        (["--output", "/no/such/folder/report.html"], "give --output a file"),
        (["--device", "tpu"], "no device is called 'tpu'"),
    ],
)
def test_a_mistake_is_named_in_one_message(place, tmp_path, capsys, more, message):
    code = examine(place, tmp_path / "report.html", *more)

    shown = capsys.readouterr().err.replace("\n", " ")
    assert code == 2
    assert message in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "report.html").exists()


def test_numbers_of_images_are_positive(place, tmp_path, capsys):
    with pytest.raises(SystemExit):
        examine(place, tmp_path / "report.html", "--num-images", "0")

    assert "give 1 or more" in capsys.readouterr().err


def test_the_global_generator_is_left_alone(place, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)

    examine(place, tmp_path / "report.html")

    assert torch.equal(torch.rand(1), expected)


def test_a_page_that_cannot_be_written_is_told_in_one_message(tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainer.doctor.examine", lambda *_, **__: None)
    monkeypatch.setattr("trainer.doctor.write_page", lambda _: "page")
    monkeypatch.setattr("pathlib.Path.write_text", full)

    code = main(["--images", str(tmp_path), "--device", "cpu", "--output", f"{tmp_path}/a.html"])

    assert code == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_page_may_name_files_that_are_no_text(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.doctor.examine", lambda *_, **__: None)
    monkeypatch.setattr("trainer.doctor.write_page", lambda _: "caf\u00e9 of bad\udcff name")
    monkeypatch.setattr("trainer.doctor._print_report", lambda *_: None)
    output = tmp_path / "page.html"

    code = main(["--images", str(tmp_path), "--device", "cpu", "--output", str(output)])

    assert code == 0
    assert output.read_bytes() == b"caf\xc3\xa9 of bad\\udcff name"


def test_layers_of_a_filter_that_is_off_may_be_another_backbone_s(place, tmp_path):
    settings = ["--set", "filters.attention_hijack.layers=[10, 15]"]
    off = ["--set", "filters.attention_hijack.enabled=false"]

    assert examine(place, tmp_path / "page.html", *settings, *off) == 0
    assert examine(place, tmp_path / "page.html", *settings) == 2
