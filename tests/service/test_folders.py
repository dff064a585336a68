"""Folders that cannot be used are named before a library fails in the midst of its import."""

import mmap
import tempfile

import pytest

from service.folders import check_folders
from service.settings import SettingsError


def test_folders_that_can_be_written_are_taken_and_left_empty(tmp_path):
    check_folders({"TRITON_CACHE_DIR": str(tmp_path / "new" / "triton")}, must_execute=True)

    assert list((tmp_path / "new" / "triton").iterdir()) == []


def test_nothing_is_checked_where_nothing_is_set():
    check_folders({"TRITON_CACHE_DIR": ""}, must_execute=True)


def test_a_folder_that_cannot_be_made_is_named_with_its_variable(tmp_path):
    (tmp_path / "file").touch()

    with pytest.raises(
        SettingsError, match=r"TORCHINDUCTOR_CACHE_DIR is .*file/in.*mount a volume"
    ):
        check_folders(
            {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "file" / "in")}, must_execute=False
        )


def test_a_folder_that_forbids_execution_is_refused_where_code_is_loaded_from_it(
    tmp_path, monkeypatch
):
    def refuse(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(mmap, "mmap", refuse)
    folder = {"TRITON_CACHE_DIR": str(tmp_path)}

    check_folders(folder, must_execute=False)
    with pytest.raises(SettingsError, match="noexec"):
        check_folders(folder, must_execute=True)


def test_no_folder_for_temporary_files_is_an_error_with_what_to_do(monkeypatch):
    def refuse():
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", refuse)

    with pytest.raises(SettingsError, match="mount a writable /tmp"):
        check_folders({}, must_execute=False)
