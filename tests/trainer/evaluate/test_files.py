import os

import pytest

from trainer.evaluate.files import replace_file


def test_a_file_takes_the_place_of_the_old_one_and_can_be_read_by_others(tmp_path):
    path = tmp_path / "new" / "file"
    replace_file(path, b"old")

    replace_file(path, b"new")

    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o644
    assert [each.name for each in path.parent.iterdir()] == ["file"]


def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path):
    (tmp_path / "folder").mkdir()

    with pytest.raises(OSError, match="folder"):
        replace_file(tmp_path / "folder", b"new")

    assert [each.name for each in tmp_path.iterdir()] == ["folder"]


def test_the_content_is_on_the_disk_before_the_name_is_taken(tmp_path, monkeypatch):
    done = []
    sync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (done.append("sync"), sync(number)))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("rename"), rename(*paths)))

    replace_file(tmp_path / "file", b"new")

    assert done == ["sync", "rename"]
