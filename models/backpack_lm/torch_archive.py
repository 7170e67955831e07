"""Files of `torch.save`, read without torch's unpickler, one tensor at a time: an optimizer's stay there."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backpack_lm.layouts import CheckpointError
from backpack_lm.pickle_machine import BadPickle, Storage, StoredTensor, unpickle

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_MOST_PICKLE = 2**27
"""Bytes of a pickle, which has names and shapes, and what trainers note. Numbers lie outside of it."""
_AT_A_TIME = 2**24


class TorchArchive:
    """One file, open until `close`."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError, naming the file, if it is none of torch's, OSError if it can't be opened."""
        self._path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except (ValueError, NotImplementedError, zipfile.BadZipFile):
            raise self._refused("it is damaged, cut off, or not a file of torch.save") from None
        names = self._zip.namelist()
        if len(set(names)) < len(names):
            raise self._refused("it has two parts of one name")
        programs = [name for name in names if name.split("/")[-1] == "data.pkl"]
        if len(programs) != 1 or any("/code/" in name for name in names):
            raise self._refused("it isn't what torch.save makes of a state_dict; TorchScript isn't read")
        self._root = programs[0].removesuffix("data.pkl")
        if self._root + "byteorder" in names and self._read_member("byteorder", 16) != b"little":
            raise self._refused("it was saved on a big-endian machine; save it on another")
        self._storages: dict[Storage, Tensor] = {}

    def close(self) -> None:
        self._zip.close()

    def read(self) -> Any:
        """What was saved, with StoredTensor for tensors, and Inert for everything that isn't plain data."""
        try:
            return unpickle(self._read_member("data.pkl", _MOST_PICKLE))
        except BadPickle as error:
            raise self._refused(f"of its pickle: {error}. Ask who made the model for safetensors") from None

    def tensor(self, name: str, stored: StoredTensor) -> Tensor:
        """A tensor; those of one storage share its memory."""
        if not stored.is_within:
            raise self._refused(f"{name} has more numbers than are stored")
        storage = self._storages.get(stored.storage)
        if storage is None:
            storage = self._storages[stored.storage] = self._numbers(name, stored.storage)
        return storage.as_strided(stored.shape, stored.stride, stored.offset)

    def _numbers(self, name: str, storage: Storage) -> Tensor:
        dtype = _DTYPES.get(storage.kind)
        if dtype is None:
            raise self._refused(f"{name} is of torch's {storage.kind[:40]}; save it as float32")
        size = storage.count * dtype.itemsize
        data = self._read_member(f"data/{storage.key}", size)
        if len(data) != size:
            raise self._refused(f"{name} has {len(data)} bytes instead of {size}")
        return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)

    def _read_member(self, name: str, most: int) -> bytearray:
        """The bytes of a part, checked against the archive's checksum."""
        data = bytearray()
        try:
            found = self._zip.getinfo(self._root + name)
            if found.compress_type != zipfile.ZIP_STORED or found.file_size > most:
                raise self._refused(f"its part {name} is compressed or too large, as torch.save writes none")
            with self._zip.open(found) as part:
                while some := part.read(_AT_A_TIME):
                    data += some
        except (KeyError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile):
            raise self._refused(f"its part {name} is damaged or missing; get the file again") from None
        return data

    def _refused(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self._path} can't be read: {why}")
