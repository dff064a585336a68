"""Where a run may be written, and what it continues from."""

import pytest

from tests.support import tiny_artifact
from trainer.errors import TrainerError
from trainer.place import find_checkpoint, make_folder


def test_an_output_among_the_images_is_refused(tmp_path):
    with pytest.raises(TrainerError, match="outside of it"):
        find_checkpoint(tmp_path / "images" / "out", tmp_path / "images", resume=False)


@pytest.mark.parametrize("resume", [False, True])
def test_what_is_not_an_artifact_is_found_before_training(tmp_path, resume):
    (tmp_path / "out" / "refined").mkdir(parents=True)

    with pytest.raises(TrainerError, match="is not an artifact"):
        find_checkpoint(tmp_path / "out", tmp_path / "images", resume=resume)


def test_an_artifact_without_checkpoint_is_not_replaced_by_a_resumed_run(tmp_path):
    tiny_artifact(tmp_path / "out" / "refined")

    with pytest.raises(TrainerError, match="no checkpoint to resume from"):
        find_checkpoint(tmp_path / "out", tmp_path / "images", resume=True)


def test_a_file_in_the_folders_place_is_named(tmp_path):
    (tmp_path / "out").write_text("")

    with pytest.raises(TrainerError, match="out cannot be made"):
        make_folder(tmp_path / "out")


def test_other_files_in_the_folder_do_not_matter(tmp_path):
    make_folder(tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("")

    assert find_checkpoint(tmp_path / "out", tmp_path / "images", resume=False) is None
    make_folder(tmp_path / "out")
