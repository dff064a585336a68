"""The command line of a sweep, and one sweep with real runs."""

import contextlib
import json
import logging
import shlex
import warnings

import pytest

from tests.trainer.ablate.sweeps import FakeRunner, sweep_arguments
from tests.trainer.refining import SMALL
from trainer.__main__ import main as train
from trainer.ablate.__main__ import main
from trainer.ablate.variants import VARIANTS
from trainer.evaluate.__main__ import main as evaluate


def test_the_list_spells_out_what_every_variant_sets(capsys):
    assert main(["--recipe", "dinov2-g", "--list"]) == 0

    shown = capsys.readouterr().out
    assert all(variant.name in shown and variant.about in shown for variant in VARIANTS)
    assert "loss.lambda_uni=0" in shown
    assert "registers.r_reg=19" in shown
    assert "--variant release: registers.rounding=floor registers.fill=zeros" in shown
    assert "skipped: equals the full recipe" in shown
    assert "--register-width 2" in shown


def test_the_list_says_which_way_r_reg_counts(capsys):
    assert main(["--recipe", "dinov2-g", "--variants", "wide-registers", "--list"]) == 0

    assert "r_reg divides the grid: a smaller number is a wider border" in capsys.readouterr().out


@pytest.mark.parametrize("mode", [["--list"], ["--dry-run"], []])
@pytest.mark.parametrize("missing", ["name", "weights"])
def test_a_backbone_that_is_not_here_ends_the_sweep_before_it_starts(
    tmp_path, monkeypatch, capsys, mode, missing
):
    arguments = sweep_arguments(tmp_path, "--variants", "no-uni", *mode)
    arguments += ["--set", f"backbone.{missing}=models/gone"]
    monkeypatch.chdir(tmp_path)
    runner = FakeRunner()

    code = main(arguments, runner=runner)

    shown = capsys.readouterr().err.replace("\n", " ")
    assert (code, runner.commands) == (2, [])
    assert "the backbone of recipe paper cannot be found" in shown
    assert "models/gone" in shown
    assert "--set backbone.name=PATH" in shown
    assert not (tmp_path / "out").exists()


def test_the_backbone_may_be_given_as_to_the_trainer(tmp_path):
    runner = FakeRunner()
    arguments = sweep_arguments(tmp_path, "--variants", "full")
    at = arguments.index("--segmentation")
    arguments[at - 2 : at] = ["--backbone", str(tmp_path / "model")]

    assert main(arguments, runner=runner) == 0

    assert f'backbone.name="{tmp_path / "model"}"' in runner.commands[0]


def test_a_dry_run_counts_and_writes_nothing(tmp_path, capsys):
    runner = FakeRunner()
    more = ("--variants", "no-uni,with-ah,served-width-2", "--seeds", "2", "--dry-run")

    assert main(sweep_arguments(tmp_path, *more), runner=runner) == 0

    shown = capsys.readouterr().out
    assert "4 training runs and 6 evaluations, 0 of these 10 steps finished already" in shown
    assert "1 variants skipped" in shown
    assert "to do  no-uni seed-1 segmentation scenes" in shown
    assert "skip   with-ah: equals" in shown
    assert runner.commands == []
    assert not (tmp_path / "out").exists()


def test_data_sets_may_have_flags_and_stand_twice(tmp_path):
    runner = FakeRunner()
    scenes = tmp_path / "scenes"
    more = ("--variants", "full", "--segmentation", f"{scenes} --size 32 48 --steps 5")
    more += ("--spurious-images", f"{tmp_path / 'images'} --num-images 2")

    assert main(sweep_arguments(tmp_path, *more), runner=runner) == 0

    own, flagged, spurious = (words[3:] for words in runner.commands[1:])
    assert own[own.index("--size") + 1 :][:2] == ["64", "64"]
    assert flagged[:8] == [
        *("segmentation", "--data", str(scenes)),
        *("--size", "32", "48", "--steps", "5"),
    ]
    assert flagged.count("--size") == 1
    assert spurious[:6] == [
        *("spurious", "--images", str(tmp_path / "images")),
        *("--num-images", "2", "--size"),
    ]
    assert "--seeds" not in spurious
    page = (tmp_path / "out" / "table.md").read_text()
    assert "mIoU (%), scenes --size 32 48 --steps 5" in page


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--variants", "no-unii"], "no variant is called 'no-unii'; there are full, learnable"),
        (["--variant", "a:loss.temprature=1"], "variant a: recipe paper: unknown key"),
        (["--recipe", "papr"], "no recipe is called 'papr'"),
        (["--set", "backbone.name=vit_tiny_patch16_225"], "did you mean vit_tiny_patch16_224"),
        (["--set", "backbone.random_weights=true"], "there is no raw backbone to compare with"),
        (["--images", "EMPTY"], "no images under"),
        (["--images", "MISSING"], "is not a folder"),
        (["--output", "INSIDE"], "would become training images"),
        (["--output", "FILE"], "cannot be made or written"),
        (["--segmentation", "MISSING"], "give one to --segmentation, and flags of python -m"),
        (["--segmentation", "SCENES --json x"], "--json is set by the sweep"),
        (["--segmentation", "SCENES --seeds 2"], "leave it out, and give --probe-seeds to the"),
        (["--segmentation", "SCENES"], "is given twice"),
        (["--depth", "SCENES"], "SCENES"),
        (["--spurious-images", "EMPTY"], "no images under"),
    ],
)
def test_a_mistake_is_named_before_anything_is_done(tmp_path, capsys, more, message):
    arguments = sweep_arguments(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    places = {
        "EMPTY": "empty",
        "MISSING": "missing",
        "INSIDE": "images/out",
        "FILE": "file",
        "SCENES": "scenes",
    }
    for name, place in places.items():
        more = [word.replace(name, str(tmp_path / place)) for word in more]
        message = message.replace(name, str(tmp_path / place))
    runner = FakeRunner()

    code = main([*arguments, *more], runner=runner)

    shown = capsys.readouterr().err
    assert (code, runner.commands) == (2, [])
    assert message in shown.replace("\n", " ")
    assert "Traceback" not in shown
    assert not (tmp_path / "out").exists()


def test_flags_that_an_evaluation_does_not_have_are_told_by_it(tmp_path, capsys):
    arguments = sweep_arguments(tmp_path, "--segmentation", f"{tmp_path / 'scenes'} --sise 3")

    with pytest.raises(SystemExit) as ended:
        main(arguments, runner=FakeRunner())

    assert ended.value.code == 2
    assert "--sise" in capsys.readouterr().err


def test_images_and_output_are_needed(capsys):
    with pytest.raises(SystemExit):
        main([])

    assert "--images and --output are needed" in capsys.readouterr().err


def test_help_names_the_variants_and_the_exit_codes(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])

    shown = capsys.readouterr().out
    assert all(variant.name in shown for variant in VARIANTS)
    assert "75 stopped" in shown
    assert "--backbone NAME|PATH" in shown


class InProcess:
    """Runs the real commands here, where torch is imported already."""

    signum = None

    def __init__(self):
        self.commands = []

    def run(self, command, log):
        self.commands.append(command)
        log.parent.mkdir(parents=True, exist_ok=True)
        run = train if command[2] == "trainer" else evaluate
        with (
            log.open("a") as file,
            contextlib.redirect_stderr(file),
            contextlib.redirect_stdout(file),
        ):
            file.write(f"\n$ {shlex.join(command)}\n")
            return run(command[3:])


@pytest.fixture
def restored_logging():
    """The commands set up the process's logging; a test process goes on after them."""
    names = ("trainer", "trainer.data", "backbone", "kernels", "py.warnings")
    root, levels = logging.getLogger(), {name: logging.getLogger(name).level for name in names}
    handlers, level = root.handlers[:], root.level
    with warnings.catch_warnings():
        yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, old in levels.items():
        logging.getLogger(name).setLevel(old)


@pytest.mark.slow
@pytest.mark.usefixtures("restored_logging")
def test_a_sweep_of_two_variants_trains_measures_and_goes_on(tmp_path):
    arguments = sweep_arguments(tmp_path, "--variants", "no-spu", "--max-steps", "2")
    arguments[arguments.index("--segmentation") + 1] += " --steps 5 --batch-size 2"
    arguments += ["--spurious-images", f"{tmp_path / 'images'} --num-images 2", "--device", "cpu"]
    # The tiny backbone has no blocks 8 and 9, which only its run finds.
    arguments += ["--variant", "wrong:filters.attention_hijack.layers=[8, 9]"]
    for setting in (*SMALL, "run.measure_images=0"):
        arguments += ["--set", setting]
    first, second = InProcess(), InProcess()

    codes = [main(arguments, runner=runner) for runner in (first, second)]

    table = json.loads((tmp_path / "out" / "table.json").read_text())
    rows = {row["name"]: row for row in table["rows"]}
    assert codes == [1, 1]
    assert [row["status"] for row in rows.values()] == ["done", "done", "done", "failed"]
    assert "layers 8..9, but the backbone's" in rows["wrong"]["reasons"][0]
    scores = {name: {cell["score"] for cell in row["cells"]} for name, row in rows.items()}
    shown = {"mIoU", "FP or GP", "view retrieval (shift)", "view retrieval (zoom)"}
    assert all(shown <= scores[name] for name in ("raw", "full", "no-spu"))
    assert rows["no-spu"]["cells"][0]["difference"] is not None
    assert rows["full"]["minutes"] > 0
    assert len(first.commands) == 7
    assert len(second.commands) == 1, "only what failed is tried again"
    assert str(tmp_path) not in (tmp_path / "out" / "table.md").read_text()
