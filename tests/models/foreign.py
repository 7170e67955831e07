"""A library of another architecture in place of a `ctypes.CDLL`, its functions called by caller.cpp under an emulator.

The memory that a call reaches is sent there and copied back: tensors whose address was asked for since the library
was opened, numpy arrays, and ctypes structures, whose pointers are sent as what they lead to.
"""

from __future__ import annotations

import ctypes
import struct
import subprocess
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from backpack_lm.kernels import structs

NOT_A_POINTER = 2**64 - 1
SECONDS = 60
RECORDS = {("MixState", "topics"): (structs.TOPIC, "levels")}
"""Fields that point to records which contain pointers themselves: the records' layout, and which field it is."""


class ForeignLibrary:
    """`command` is the emulator, the compiled caller.cpp and the library."""

    def __init__(self, command: Sequence[str], patch: pytest.MonkeyPatch) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._functions: dict[str, _Function] = {}
        self.storages: dict[int, torch.UntypedStorage] = {}
        """Of tensors, by their addresses; kept, so that none of these is given to another tensor."""
        data_ptr = torch.Tensor.data_ptr

        def recorded(tensor: torch.Tensor) -> int:
            storage = tensor.untyped_storage()
            self.storages[storage.data_ptr()] = storage
            return data_ptr(tensor)

        patch.setattr(torch.Tensor, "data_ptr", recorded)

    def __getattr__(self, name: str) -> _Function:
        return self._functions.setdefault(name, _Function(self, name))

    def exchange(self, call: bytes, sizes: Sequence[int], has_text: bool) -> tuple[bytes, list[bytes]]:
        """Send a call; returns its text, if it has one, and the contents of its blocks."""
        assert self._process.stdin
        self._process.stdin.write(call)
        self._process.stdin.flush()
        text = self._read(*struct.unpack("<Q", self._read(8))) if has_text else b""
        return text, [self._read(size) for size in sizes]

    def close(self) -> None:
        self._process.communicate(timeout=SECONDS)
        assert self._process.returncode == 0

    def _read(self, size: int) -> bytes:
        assert self._process.stdout
        found = self._process.stdout.read(size)
        assert len(found) == size, "the emulated process has ended; its stderr says why"
        return found


class _Function:
    def __init__(self, library: ForeignLibrary, name: str) -> None:
        self._library, self._name = library, name.encode()
        self.restype: object = None

    def __call__(self, *arguments: object) -> bytes:
        memory = _Memory(self._library.storages)
        floats = [struct.unpack("<I", bytes(each))[0] for each in arguments if isinstance(each, ctypes.c_float)]
        whole = [memory.whole(each) for each in arguments if not isinstance(each, ctypes.c_float)]
        has_text = self.restype is ctypes.c_char_p
        parts = [_numbers(len(self._name)), self._name, _numbers(len(memory.blocks))]
        for address, size, _ in memory.blocks:
            parts += _numbers(size), ctypes.string_at(address, size)
        for rows in (memory.pointers, whole, [(bits,) for bits in floats]):
            parts.append(_numbers(len(rows), *(number for row in rows for number in row)))
        parts.append(_numbers(has_text))
        text, contents = self._library.exchange(b"".join(parts), [size for _, size, _ in memory.blocks], has_text)
        for (address, size, writable), content in zip(memory.blocks, contents, strict=True):
            if writable:
                ctypes.memmove(address, content, size)
        return text


def _numbers(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}Q", *numbers)


class _Memory:
    """What one call reaches."""

    def __init__(self, storages: dict[int, torch.UntypedStorage]) -> None:
        self._storages = storages
        self._known: dict[int, int] = {}
        self.blocks: list[tuple[int, int, bool]] = []
        """Addresses, sizes, and whether they hold numbers alone, which the call may change."""
        self.pointers: list[tuple[int, int, int, int]] = []
        """Block and offset of each pointer, block and offset of what it points to."""

    def whole(self, argument: object) -> tuple[int, int]:
        """An argument that is no float: (block, offset), or (NOT_A_POINTER, value)."""
        if argument is None or isinstance(argument, int):
            return NOT_A_POINTER, int(argument or 0) % 2**64
        if isinstance(argument, ctypes.c_void_p):
            return self._at(argument.value, getattr(argument, "_arr", None)) if argument.value else (NOT_A_POINTER, 0)
        pointed = argument._obj  # type: ignore[attr-defined]  # of ctypes.byref
        block = self._block(ctypes.addressof(pointed), ctypes.sizeof(pointed), False)
        self._follow(pointed, block, 0, pointed)
        return block, 0

    def _block(self, address: int, size: int, writable: bool) -> int:
        if address not in self._known:
            self._known[address] = len(self.blocks)
            self.blocks.append((address, size, writable))
        return self._known[address]

    def _at(self, address: int, kept: object) -> tuple[int, int]:
        """Block and offset of an address in a tensor, or in what was kept alive together with the pointer."""
        for start, storage in self._storages.items():
            if start <= address < start + storage.nbytes():
                return self._block(start, storage.nbytes(), True), address - start
        for each in _within(kept):
            if isinstance(each, np.ndarray) and each.ctypes.data == address:
                return self._block(address, each.nbytes, True), 0
            if isinstance(each, bytes) and ctypes.cast(each, ctypes.c_void_p).value == address:
                return self._block(address, len(each), False), 0
        raise AssertionError(f"nothing is known of the memory at {address:#x}: pass a tensor's, or keep what it is of")

    def _follow(self, at: ctypes.Structure, block: int, offset: int, root: ctypes.Structure) -> None:
        """The pointers of a structure, which is at an offset in a block and in the structure `root`."""
        for name, kind in at._fields_:
            value, where = getattr(at, name), offset + getattr(type(at), name).offset
            if issubclass(kind, ctypes.Structure):
                self._follow(value, block, where, root)
            elif issubclass(kind, ctypes.c_void_p) and value:
                target, inside = self._at(value, root._objects)
                self.pointers.append((block, where, target, inside))
                if records := RECORDS.get((type(at).__name__, name)):
                    self._follow_records(*records, target)
            elif issubclass(kind, ctypes._Pointer):
                arrays = (each for each in _within(root._objects) if isinstance(each, ctypes.Array))
                array = next(each for each in arrays if each._type_ is kind._type_)
                if not len(array):
                    continue
                target = self._block(ctypes.addressof(array), ctypes.sizeof(array), False)
                self.pointers.append((block, where, target, 0))
                for n, each in enumerate(array):
                    self._follow(each, target, n * ctypes.sizeof(each), each)

    def _follow_records(self, layout: np.dtype[np.void], field: str, block: int) -> None:
        address, size, _ = self.blocks[block]
        for n, record in enumerate(np.frombuffer(ctypes.string_at(address, size), layout)):
            target, inside = self._at(int(record[field]), None)
            self.pointers.append((block, n * layout.itemsize + layout.fields[field][1], target, inside))


def _within(kept: object) -> Iterator[object]:
    """What ctypes keeps alive, out of its nested dicts and tuples."""
    if isinstance(kept, dict | tuple):
        for each in kept.values() if isinstance(kept, dict) else kept:
            yield from _within(each)
    else:
        yield kept
