"""The sense table as a file that replicas share."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from backpack_lm import mapped_table
from backpack_lm.config import BackpackConfig
from backpack_lm.installed import folder_of
from backpack_lm.int8 import restore
from backpack_lm.kernels import Precision
from backpack_lm.model import Backpack
from backpack_serving.inference.served_model import ServedModel


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Backpack:
    monkeypatch.setattr(mapped_table, "folder", lambda name: tmp_path)
    monkeypatch.setattr(mapped_table, "CHUNK", 7)
    torch.manual_seed(1)
    return Backpack(BackpackConfig.gpt2(50, 16, 12, n_layer=1, n_head=2, num_senses=3)).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_it_is_the_models_table_with_room_behind(model: Backpack, dtype: torch.dtype) -> None:
    seen: list[tuple[int, int]] = []
    path = mapped_table.prepare(model, "ab" * 32, dtype, lambda done, of: seen.append((done, of)))
    assert seen[-1] == (50, 50)
    table = mapped_table.mapped(path, model.config, dtype, room=5)
    assert table.shape == (50 * 3 + 5, 16 if dtype is torch.int8 else 12)
    wanted = model.sense_table().rows
    off = wanted.abs().amax(-1) / 2**7
    assert bool(((restore(table[:150]).view(50, 3, 12) - wanted).abs().amax(-1) <= off).all())
    assert not table[150:].any()


def test_what_one_replica_writes_another_never_sees(model: Backpack) -> None:
    path = mapped_table.prepare(model, "ab" * 32, torch.float32)
    one, other = (mapped_table.mapped(path, model.config, torch.float32, room) for room in (4, 9))
    before = path.read_bytes()[: 150 * 12 * 4]
    one[150:] = 1.0
    one[0] = 2.0
    assert not other[150:].any()
    assert not torch.equal(other[0], one[0])
    assert path.read_bytes()[: 150 * 12 * 4] == before


def test_one_with_less_room_never_shortens_what_another_has_mapped(
    model: Backpack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it looked at the file before the other made it longer."""
    path = mapped_table.prepare(model, "ab" * 32, torch.float32)
    as_seen = path.stat()
    one = mapped_table.mapped(path, model.config, torch.float32, room=9)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "stat", lambda *_, **__: as_seen)
        other = mapped_table.mapped(path, model.config, torch.float32, room=4)
    assert path.stat().st_size >= one.nbytes, "writing behind the table would be a bus error"
    one[150:] = 1.0
    assert not other[150:].any()


def test_it_is_computed_once(model: Backpack) -> None:
    path = mapped_table.prepare(model, "ab" * 32, torch.float32)
    written = path.stat().st_mtime_ns
    assert mapped_table.prepare(model, "ab" * 32, torch.float32, lambda *_: pytest.fail("computed again")) == path
    assert path.stat().st_mtime_ns == written
    assert mapped_table.prepare(model, "cd" * 32, torch.float32) != path


def test_an_interrupted_preparation_leaves_nothing(model: Backpack, tmp_path: Path) -> None:
    def stop(done: int, of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mapped_table.prepare(model, "ab" * 32, torch.float32, stop)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_removed_and_what_is_being_written_is_not(
    model: Backpack, tmp_path: Path
) -> None:
    left, held = (tmp_path / f"{n}{mapped_table.PARTIAL}" for n in range(2))
    left.write_bytes(b"half")
    with held.open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        path = mapped_table.prepare(model, "ab" * 32, torch.float32)
    assert sorted(tmp_path.iterdir()) == sorted([held, path])


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[:1000],
        lambda whole: whole[:3000] + bytes(100) + whole[3100:],
        lambda whole: whole[:-1] + bytes([whole[-1] ^ 1]),
    ],
    ids=["cut off", "hole", "bit"],
)
def test_a_damaged_file_is_made_anew(model: Backpack, damage: Callable[[bytes], bytes]) -> None:
    path = mapped_table.prepare(model, "ab" * 32, torch.float32)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert mapped_table.prepare(model, "ab" * 32, torch.float32) == path
    assert path.read_bytes() == whole
    assert list(path.parent.iterdir()) == [path]


def test_a_replica_that_can_write_no_cache_keeps_a_table_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> Path:
        raise PermissionError(f"{name} can't be made")

    monkeypatch.setattr(mapped_table, "folder", refuse)
    served = ServedModel.read(folder_of("micro"), Precision.FLOAT32, room=3)
    config = served.manifest.config
    assert len(served.storage) == config.vocab_size * config.num_senses + 3
    assert torch.equal(served.table.rows[17], served.model.sense_table().rows[17])
