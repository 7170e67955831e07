"""A folder is there whole, or as it was before."""

from __future__ import annotations

import threading
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


def _fill(folder: Path, **files: str) -> None:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def test_a_folder_that_is_there_is_exchanged_at_once(tmp_path: Path) -> None:
    """Whoever looks sees the old or the new one, never one without a file; what others put there stays."""
    folder, ended, missing = tmp_path / "model", threading.Event(), []
    old = {f"f{n}": "old" for n in range(30)}
    _fill(folder, last="old", README="mine", optional="old", **old)
    _fill(folder / "more", file="mine")
    (folder / "link").symlink_to("more/file")
    folder.chmod(0o750)

    def look() -> None:
        while not ended.is_set():
            if not (folder / "last").exists():
                missing.append("last")

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for n in range(20):
            before = folder.stat().st_ino
            with whole(folder, "last", ["optional"]) as scratch:
                _fill(scratch, last=str(n), **dict.fromkeys(old, str(n)))
            assert folder.stat().st_ino != before
    finally:
        ended.set()
        looking.join()
    assert not missing
    others = {"README": "mine", "more/file": "mine", "link": "mine"}
    assert _files(tmp_path) == {
        f"model/{name}": t for name, t in (others | dict.fromkeys([*old, "last"], "19")).items()
    }
    assert (folder / "link").is_symlink()
    assert folder.stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("why", ["the working directory", "a mount point", "a name of a folder"])
def test_where_a_folder_cannot_be_exchanged_its_files_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    folder = tmp_path / "model"
    _fill(folder, last="old", other="old", README="mine", optional="old")
    (tmp_path / "name").symlink_to(folder)
    if why == "the working directory":
        monkeypatch.chdir(folder)
    elif why == "a mount point":
        monkeypatch.setattr(Path, "is_mount", lambda path: path == folder)
    before = folder.stat().st_ino
    with whole(tmp_path / "name" if why == "a name of a folder" else folder, "last", ["optional"]) as scratch:
        _fill(scratch, last="new", other="new")
    assert (folder.stat().st_ino == before) == (why != "a name of a folder"), "a link's folder is exchanged"
    assert (tmp_path / "name").is_symlink()
    assert _files(folder) == {"last": "new", "other": "new", "README": "mine"}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model", "name"]


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
