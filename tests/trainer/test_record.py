"""What a run tells while it goes: boards, pictures, warnings."""

import io
import json
import sys
import types

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from trainer.boards import WANDB_ID_FILE, check_boards
from trainer.config import RunSection
from trainer.errors import TrainerError
from trainer.record import Recorder
from trainer.watch import WINDOW

VALUES = {"loss": 1.5, "clean": 0.5, "images_per_second": 2.0, "seconds_per_step": 0.5}
VALUES |= {"memory_gib": 1.0}


@pytest.fixture
def wandb(monkeypatch):
    """A module like W&B's that remembers what it is told."""
    fake = types.ModuleType("wandb")
    fake.started, fake.logged, fake.ended = [], [], []

    class Run:
        def log(self, values, step):
            fake.logged.append((step, values))

        def finish(self, exit_code):
            fake.ended.append(exit_code)

    def init(**arguments):
        fake.started.append(arguments)
        return Run()

    fake.init, fake.Image, fake.Error = init, lambda picture: ("picture", picture.size), KeyError
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return fake


def recorder(output, first_step=0, snapshots=None, **settings):
    output.mkdir(exist_ok=True)
    return Recorder(
        output,
        RunSection(**settings),
        num_steps=100,
        first_step=first_step,
        console=Console(stderr=True),
        snapshots=snapshots,
    )


class Pictures:
    """Snapshots without a backbone."""

    def __init__(self):
        self.taken = []

    def take(self, step):
        self.taken.append(step)
        return Image.new("RGB", (8, 6), (10 * step, 0, 0))


def test_values_go_to_weights_and_biases_when_asked_for(tmp_path, wandb):
    with recorder(tmp_path / "siglip", wandb=True) as records:
        records.step(1, VALUES)
        records.step(2, VALUES | {"loss": 1.25})

    (started,) = wandb.started
    assert (started["project"], started["name"]) == ("vit-refinery", "siglip")
    assert started["dir"] == str(tmp_path / "siglip")
    assert wandb.logged == [(1, VALUES), (2, VALUES | {"loss": 1.25})]
    assert wandb.ended == [0]
    assert len((tmp_path / "siglip" / "metrics.jsonl").read_text().splitlines()) == 2


def test_nothing_is_imported_or_sent_when_not_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)

    with recorder(tmp_path / "run") as records:
        records.step(1, VALUES)

    assert not (tmp_path / "run" / WANDB_ID_FILE).exists()


def test_a_run_that_fails_ends_so_on_weights_and_biases(tmp_path, wandb):
    with pytest.raises(ZeroDivisionError), recorder(tmp_path / "run", wandb=True):
        raise ZeroDivisionError

    assert wandb.ended == [1]


def test_a_resumed_run_is_the_same_run_on_weights_and_biases(tmp_path, wandb):
    for output, first_step in (("a", 0), ("a", 1), ("b", 0)):
        with recorder(tmp_path / output, first_step, wandb=True) as records:
            records.step(first_step + 1, VALUES)

    ids = [started["id"] for started in wandb.started]
    assert ids[0] == ids[1] != ids[2]
    assert {started["resume"] for started in wandb.started} == {"allow"}


def test_the_variables_of_weights_and_biases_are_in_force(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_NAME", "first try")
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    monkeypatch.setenv("WANDB_MODE", "offline")

    with recorder(tmp_path / "run", wandb=True):
        pass

    (started,) = wandb.started
    assert (started["project"], started["name"], started["id"]) == ("mine", "first try", "abc")
    assert "mode" not in started  # WANDB_MODE is read by wandb itself


def test_without_wandb_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)

    with pytest.raises(TrainerError, match=r"pip install 'vit-refinery\[wandb\]'"):
        recorder(tmp_path / "run", wandb=True)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_run_without_its_board_is_refused_before_anything_is_loaded(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)

    check_boards(RunSection())
    with pytest.raises(TrainerError, match=rf"vit-refinery\[{name}\]"):
        check_boards(RunSection(**{name: True}))


def test_a_login_that_is_missing_is_an_error_with_what_to_do(tmp_path, wandb):
    def refuse(**_):
        raise KeyError("no API key")

    wandb.init = refuse

    with pytest.raises(TrainerError, match=r"no API key.*WANDB_MODE=offline"):
        recorder(tmp_path / "run", wandb=True)


def test_pictures_are_taken_every_so_many_steps_and_go_to_the_boards(tmp_path, wandb):
    pictures = Pictures()

    with recorder(tmp_path / "run", snapshots=pictures, snapshot_every=2, wandb=True) as records:
        for step in range(1, 6):
            records.step(step, VALUES)

    assert pictures.taken == [2, 4]
    sent = [entry for entry in wandb.logged if "snapshot" in entry[1]]
    assert sent == [(2, {"snapshot": ("picture", (8, 6))}), (4, {"snapshot": ("picture", (8, 6))})]


def test_pictures_go_to_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {"snapshot_every": 1, "tensorboard": True}
    with recorder(tmp_path / "run", snapshots=Pictures(), **settings) as records:
        records.step(1, VALUES)

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    (event,) = events.Images("snapshot")
    assert event.step == 1
    shown = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    assert shown.shape == (6, 8, 3)
    assert tuple(shown[0, 0]) == (10, 0, 0)
    assert events.Scalars("loss")[0].value == 1.5


def test_a_filter_that_keeps_nothing_is_told_by_the_recorder(tmp_path, caplog):
    with recorder(tmp_path / "run") as records:
        for step in range(1, WINDOW + 1):
            records.step(step, VALUES | {"clean_global_proxy": 0.0})

    assert "global_proxy keeps 0.0 %" in caplog.text


def test_metrics_of_a_run_are_written_at_each_step(tmp_path):
    with recorder(tmp_path / "run") as records:
        records.step(1, VALUES)
        written = (tmp_path / "run" / "metrics.jsonl").read_text()

    assert json.loads(written) == {"step": 1, **VALUES}
