"""A sweep over a fake runner: what is done, what stays, what is refused, what fails alone."""

import json
import shutil
import signal
from pathlib import Path

import pytest

from tests.support import tiny_artifact
from tests.trainer.ablate.sweeps import (
    FakeRunner,
    finish_training,
    sweep_arguments,
    value,
)
from tests.trainer.refining import model_folder
from trainer.ablate.__main__ import main
from trainer.ablate.sweep import as_duration, only_one
from trainer.errors import TrainerError

VARIANTS = ("--variants", "no-uni,no-spu,served-width-3")


def table_of(tmp_path):
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    return {row["name"]: row for row in table["rows"]}


def test_every_variant_is_trained_and_measured_and_the_raw_backbone_once(tmp_path, capsys):
    runner = FakeRunner()

    code = main(sweep_arguments(tmp_path, *VARIANTS, "--seeds", "2"), runner=runner)

    assert code == 0
    assert runner.done == [
        *("train full/seed-0", "segmentation full/seed-0"),
        *("train full/seed-1", "segmentation full/seed-1"),
        *("train no-uni/seed-0", "segmentation no-uni/seed-0"),
        *("train no-uni/seed-1", "segmentation no-uni/seed-1"),
        *("train no-spu/seed-0", "segmentation no-spu/seed-0"),
        *("train no-spu/seed-1", "segmentation no-spu/seed-1"),
        *("segmentation full/seed-0 width 3", "segmentation full/seed-1 width 3"),
    ]
    measured = [words for words in runner.commands if words[2] == "trainer.evaluate"]
    assert [words for words in measured if "--baseline" not in words] == measured[:1]
    assert {value(words, "--size") for words in measured} == {"64"}
    progress = capsys.readouterr().err
    assert "[1/14] full seed-0 training: " in progress
    assert "left" in progress
    assert list(table_of(tmp_path)) == ["raw", "full", "no-uni", "no-spu", "served-width-3"]
    assert not list((tmp_path / "out" / "features").glob("*"))


def test_overrides_reach_the_commands_that_train(tmp_path):
    runner = FakeRunner()
    more = ("--variants", "no-uni,release", "--variant", "hot:loss.temperature=0.5")
    arguments = sweep_arguments(tmp_path, *more, "--max-steps", "7", "--device", "cpu")

    # `paper` is a method and nothing else, so that its other one is the recipe `release`.
    assert main(arguments, runner=runner) == 0

    trained = {Path(value(words, "--output")).parent.name: words for words in runner.commands[::2]}
    for name, setting in {"no-uni": "loss.lambda_uni=0", "hot": "loss.temperature=0.5"}.items():
        assert setting in trained[name]
        assert value(trained[name], "--recipe") == "paper"
    assert value(trained["release"], "--recipe") == "release"
    for words in trained.values():
        assert "run.max_steps=7" in words
        assert "run.seed=0" in words
        assert value(words, "--device") == "cpu"
        assert "data.size=64" in words


def test_the_same_command_repeats_nothing(tmp_path, capsys):
    main(sweep_arguments(tmp_path, *VARIANTS), runner=FakeRunner())
    before = (tmp_path / "out" / "table.md").read_text()
    runner = FakeRunner()

    code = main(sweep_arguments(tmp_path, *VARIANTS), runner=runner)

    assert (code, runner.commands) == (0, [])
    assert "7 of 7 steps were finished before" in capsys.readouterr().err
    assert (tmp_path / "out" / "table.md").read_text() == before


def test_more_rows_and_more_measurements_leave_finished_runs_alone(tmp_path):
    main(sweep_arguments(tmp_path, "--variants", "no-uni"), runner=FakeRunner())
    runner = FakeRunner()

    more = ("--variants", "no-uni,no-spu", "--probe-seeds", "5")
    main(sweep_arguments(tmp_path, *more), runner=runner)

    assert [done for done in runner.done if done.startswith("train")] == ["train no-spu/seed-0"]
    assert len(runner.done) == 4, "5 probe seeds are another measurement than 3"


def test_settings_that_change_no_number_may_be_others(tmp_path):
    main(sweep_arguments(tmp_path, *VARIANTS), runner=FakeRunner())
    runner = FakeRunner()

    code = main(sweep_arguments(tmp_path, *VARIANTS, "--set", "data.workers=1"), runner=runner)

    assert (code, runner.commands) == (0, [])


def test_a_run_with_other_settings_is_refused_before_anything_is_done(tmp_path, capsys):
    main(sweep_arguments(tmp_path, *VARIANTS), runner=FakeRunner())
    runner = FakeRunner()

    code = main(sweep_arguments(tmp_path, *VARIANTS, "--max-steps", "3"), runner=runner)

    message = capsys.readouterr().err
    assert (code, runner.commands) == (2, [])
    assert "made with other values (run.max_steps None there, 3 here)" in message
    assert "and 2 more such folders" in message


def test_a_run_with_other_images_is_refused(tmp_path, capsys):
    main(sweep_arguments(tmp_path, *VARIANTS), runner=FakeRunner())
    (tmp_path / "images" / "000.png").unlink()

    code = main(sweep_arguments(tmp_path, *VARIANTS), runner=FakeRunner())

    assert code == 2
    assert "made with other images" in capsys.readouterr().err


def test_a_run_of_a_backbone_that_was_trained_again_is_refused(tmp_path, capsys):
    main(sweep_arguments(tmp_path, *VARIANTS), runner=FakeRunner())
    (tmp_path / "model" / "README.md").write_text("Of no matter.")
    assert main(sweep_arguments(tmp_path, *VARIANTS), runner=FakeRunner()) == 0
    model_folder(tmp_path / "other", seed=1)
    (tmp_path / "other" / "model.safetensors").replace(tmp_path / "model" / "model.safetensors")

    code = main(sweep_arguments(tmp_path, *VARIANTS), runner=FakeRunner())

    assert code == 2
    assert "made with other weights of the same name" in capsys.readouterr().err


def test_a_record_of_before_weights_were_kept_is_still_one(tmp_path):
    main(sweep_arguments(tmp_path, *VARIANTS), runner=FakeRunner())
    for path in (tmp_path / "out").rglob("ablation.json"):
        content = json.loads(path.read_text())
        assert content.pop("weights")
        content["recipe"]["data"]["max_bad_share"] = 0.5  # decides nothing, and was kept too
        path.write_text(json.dumps(content))
    runner = FakeRunner()

    assert main(sweep_arguments(tmp_path, *VARIANTS), runner=runner) == 0
    assert runner.commands == []


def test_results_of_a_run_that_was_made_anew_are_not_reused(tmp_path):
    main(sweep_arguments(tmp_path, *VARIANTS), runner=FakeRunner())
    run = tmp_path / "out" / "no-uni" / "seed-0"
    shutil.rmtree(run / "refined")
    again = FakeRunner()

    assert main(sweep_arguments(tmp_path, *VARIANTS), runner=again) == 0
    assert again.done == ["train no-uni/seed-0"], "the same weights: the result is of them"
    shutil.rmtree(run / "refined")
    tiny_artifact(run / "refined", seed=1)
    other = FakeRunner()

    assert main(sweep_arguments(tmp_path, *VARIANTS), runner=other) == 0
    assert other.done == ["segmentation no-uni/seed-0"]


def test_a_damaged_result_is_measured_again(tmp_path):
    main(sweep_arguments(tmp_path, *VARIANTS), runner=FakeRunner())
    (product,) = (tmp_path / "out" / "no-spu" / "seed-0").glob("segmentation-*.json")
    product.write_text("{")
    runner = FakeRunner()

    assert main(sweep_arguments(tmp_path, *VARIANTS), runner=runner) == 0
    assert runner.done == ["segmentation no-spu/seed-0"]


def test_a_run_that_no_sweep_made_is_refused(tmp_path, capsys):
    finish_training(tmp_path / "out" / "no-uni" / "seed-0")

    code = main(sweep_arguments(tmp_path, *VARIANTS), runner=FakeRunner())

    assert code == 2
    assert "holds a run without a readable ablation.json" in capsys.readouterr().err


def stop_in(name, runner_signum=None):
    """Stops in the training of a variant, whose run has written a checkpoint."""

    def behave(words, _log):
        if words[2] != "trainer" or f"/{name}/" not in value(words, "--output"):
            return None
        (Path(value(words, "--output")) / "checkpoint.pt").write_text("")
        runner.signum = runner_signum
        return 75

    runner = FakeRunner(behave)
    return runner


@pytest.mark.parametrize(
    ("signum", "code"), [(None, 75), (signal.SIGTERM, 75), (signal.SIGINT, 130)]
)
def test_a_stopped_sweep_goes_on_with_the_run_that_was_stopped(tmp_path, capsys, signum, code):
    stopped = stop_in("no-uni", signum)

    assert main(sweep_arguments(tmp_path, *VARIANTS), runner=stopped) == code
    assert stopped.done[-1] == "train no-uni/seed-0"
    assert "the same command goes on from here" in capsys.readouterr().err
    rows = table_of(tmp_path)
    assert (rows["full"]["status"], rows["no-uni"]["status"]) == ("done", "not yet")
    runner = FakeRunner()
    assert main(sweep_arguments(tmp_path, *VARIANTS), runner=runner) == 0

    assert runner.done[:2] == ["train no-uni/seed-0 resumed", "segmentation no-uni/seed-0"]


def test_a_measurement_that_was_stopped_is_made_again(tmp_path):
    def behave(words, _log):
        if words[2] == "trainer.evaluate":
            runner.signum = signal.SIGTERM
            return -signal.SIGTERM
        return None

    runner = FakeRunner(behave)
    assert main(sweep_arguments(tmp_path, *VARIANTS), runner=runner) == 75
    after = FakeRunner()
    assert main(sweep_arguments(tmp_path, *VARIANTS), runner=after) == 0

    assert after.done[0] == "segmentation full/seed-0"


def test_results_are_found_again_wherever_the_folder_is_named_from(tmp_path, monkeypatch):
    arguments = sweep_arguments(tmp_path, *VARIANTS)
    main(arguments, runner=FakeRunner())
    monkeypatch.chdir(tmp_path)
    runner = FakeRunner()

    names = {str(tmp_path / name): name for name in ("images", "out", "scenes")}
    code = main([names.get(word, word) for word in arguments], runner=runner)

    assert (code, runner.commands) == (0, [])


def fail_in(name, text="error: no memory is left"):
    def behave(words, log):
        is_it = words[2] == "trainer" and f"/{name}/" in value(words, "--output")
        if is_it:
            log.write_text(f"\n$ python -m trainer\nstep 1\n{text}\n")
        return 2 if is_it else None

    return FakeRunner(behave)


def test_a_variant_that_fails_is_a_row_that_says_so_and_the_others_are_done(tmp_path, capsys):
    runner = fail_in("no-uni")

    code = main(sweep_arguments(tmp_path, *VARIANTS), runner=runner)

    rows = table_of(tmp_path)
    assert code == 1
    assert [rows[name]["status"] for name in rows] == ["done", "done", "failed", "done", "done"]
    reason = "no-uni seed-0 training: exit code 2: error: no memory is left"
    assert rows["no-uni"]["reasons"] == [f"{reason}; log no-uni/seed-0/training.log"]
    page = (tmp_path / "out" / "table.md").read_text()
    assert "## Failed" in page
    assert f"- {reason}; log no-uni/seed-0/training.log" in page
    assert "FAILED" in capsys.readouterr().err
    again = FakeRunner()
    assert main(sweep_arguments(tmp_path, *VARIANTS), runner=again) == 0
    assert again.done == ["train no-uni/seed-0", "segmentation no-uni/seed-0"]


def test_rows_that_need_the_full_run_say_that_it_failed(tmp_path):
    assert main(sweep_arguments(tmp_path, *VARIANTS), runner=fail_in("full")) == 1

    rows = table_of(tmp_path)
    assert rows["raw"]["reasons"] == ["measured beside full seed-0, see there"]
    assert rows["served-width-3"]["reasons"] == [
        "served-width-3 seed-0: there is no refined backbone of full seed-0"
    ]
    assert rows["no-spu"]["status"] == "done"
    assert rows["no-spu"]["cells"][0]["difference"] is None


def test_an_evaluation_that_fails_costs_its_own_row_alone(tmp_path):
    def behave(words, _log):
        is_it = words[2] == "trainer.evaluate" and "/no-uni/" in value(words, "--model")
        return -signal.SIGKILL if is_it else None

    assert main(sweep_arguments(tmp_path, *VARIANTS), runner=FakeRunner(behave)) == 1

    rows = table_of(tmp_path)
    assert "killed by SIGKILL" in rows["no-uni"]["reasons"][0]
    assert rows["no-uni"]["minutes"] == 1.0
    assert rows["no-spu"]["status"] == "done"


def test_two_sweeps_do_not_share_a_folder(tmp_path):
    with (
        only_one(tmp_path / "out"),
        pytest.raises(TrainerError, match="another sweep is at work"),
        only_one(tmp_path / "out"),
    ):
        raise AssertionError("both got in")


def test_durations_are_for_people():
    assert [as_duration(s) for s in (7.4, 99, 600, 11100)] == [
        *("7 s", "99 s", "10 min", "3 h 05 min")
    ]
