"""A folder is there whole, or as it was before."""

from __future__ import annotations

from pathlib import Path

import pytest
from backpack_lm.whole_folder import whole


def _files(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def test_a_new_folder_appears_with_all_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "model"
    with whole(folder, "last") as scratch:
        (scratch / "last").write_text("1")
        (scratch / "other").write_text("2")
        assert not folder.exists()
    assert _files(tmp_path) == {"a/model/last": "1", "a/model/other": "2"}


@pytest.mark.parametrize("there", [True, False])
def test_an_error_leaves_what_was_there(tmp_path: Path, there: bool) -> None:
    folder = tmp_path / "model"
    if there:
        folder.mkdir()
        (folder / "last").write_text("old")
    before = _files(tmp_path)
    with pytest.raises(RuntimeError), whole(folder, "last") as scratch:
        (scratch / "last").write_text("new")
        raise RuntimeError
    assert _files(tmp_path) == before
    assert folder.exists() is there


def test_files_of_a_folder_that_is_there_are_replaced_and_others_stay(tmp_path: Path) -> None:
    for name in ("last", "kept", "other"):
        (tmp_path / name).write_text("old")
    with whole(tmp_path, "last") as scratch:
        for name in ("last", "other"):
            (scratch / name).write_text("new")
    assert _files(tmp_path) == {"last": "new", "kept": "old", "other": "new"}


def test_what_a_killed_process_left_is_not_taken_over(tmp_path: Path) -> None:
    left = tmp_path / ".model.partial"
    left.mkdir()
    (left / "half").write_text("made")
    with whole(tmp_path / "model", "last") as scratch:
        (scratch / "last").write_text("1")
    assert _files(tmp_path) == {"model/last": "1"}


def test_two_who_write_one_folder_are_told_so(tmp_path: Path) -> None:
    with whole(tmp_path / "model", "last"):
        with pytest.raises(OSError, match="model is being written by another process"):
            with whole(tmp_path / "model", "last"):
                raise AssertionError("both write")
