"""Uploads of revisions in chunks. The header is checked against the limits before any content is stored, and the
content against the header while it arrives. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence

import safetensors
from backpack_lm.patch import AddEdit, Cell, Edit, ModelShape, PatchLimits, SetEdit, Vector
from backpack_proto.v1 import interventions_pb2 as pb

from backpack_serving.errors import InvalidRequest
from backpack_serving.interventions.ledger import IdempotencyKey
from backpack_serving.wire.edits import FORMS

CHUNK = 2**20
"""Most bytes of content in a message."""

LONGEST_HEADER = 64 * 1024
"""Most bytes of a safetensors file's own header. The library accepts a hundred megabytes."""

_KINDS = (pb.EDIT_KIND_ADD, pb.EDIT_KIND_SET)
_TENSORS = {"F32": "f", "F16": "e", "I32": "i", "I64": "q"}


class Upload:
    """Collects the messages of one upload. Every method raises InvalidRequest for invalid input."""

    def __init__(self, shape: ModelShape, limits: PatchLimits) -> None:
        self._shape, self._limits = shape, limits
        self._content = bytearray()
        self.header = pb.UploadHeader()

    def begin(self, message: pb.UploadRevisionRequest) -> None:
        """Check the first message, the header."""
        if message.WhichOneof("part") != "header":
            raise InvalidRequest.at("header", "MISSING_HEADER", "the first message must be the header")
        self.header = header = message.header
        if header.kind not in _KINDS:
            raise InvalidRequest.at("header.kind", "UNKNOWN_VALUE", f"{header.kind}; use ADD or SET")
        if not 0 < header.size <= self._limits.blob_bytes:
            raise InvalidRequest.at(
                "header.size", "TOO_LARGE", f"{header.size} bytes; 1 to {self._limits.blob_bytes} may come"
            )
        match header.WhichOneof("format"):
            case "packed":
                self._check_packed(header.packed)
            case None:
                raise InvalidRequest.at("header.format", "UNKNOWN_KIND", "say safetensors or packed")

    def take(self, message: pb.UploadRevisionRequest) -> None:
        """Add a further message, which is content."""
        if message.WhichOneof("part") != "chunk":
            raise InvalidRequest.at("chunk", "SECOND_HEADER", "after the first message there is only content")
        if len(message.chunk) > CHUNK:
            raise InvalidRequest.at("chunk", "TOO_LARGE", f"{len(message.chunk)} bytes; at most {CHUNK} a message")
        if len(self._content) + len(message.chunk) > self.header.size:
            raise InvalidRequest.at("chunk", "TOO_LARGE", f"more than the {self.header.size} bytes of the header")
        self._content += message.chunk
        if self.header.WhichOneof("format") == "safetensors" and len(self._content) >= 8:
            (size,) = struct.unpack("<Q", self._content[:8])
            if size > LONGEST_HEADER:
                raise InvalidRequest.at(
                    "content",
                    "HEADER_TOO_LARGE",
                    f"no safetensors file, or one with a header of {size} bytes; at most {LONGEST_HEADER}",
                )

    def edits(self) -> list[Edit]:
        """Parse the complete upload. Takes a second for the largest."""
        if len(self._content) != self.header.size:
            raise InvalidRequest.at(
                "content", "INCOMPLETE", f"{len(self._content)} bytes came, the header said {self.header.size}"
            )
        if self.header.WhichOneof("format") == "packed":
            packed = self.header.packed
            cells: Iterator[Cell] = map(Cell, packed.tokens, packed.senses)
            rows = self._vector_rows(bytes(self._content), FORMS[packed.dtype])
        else:
            cells, rows = self._tensors()
        pairs = zip(cells, map(Vector.of, rows), strict=True)
        if self.header.kind == pb.EDIT_KIND_ADD:
            return [AddEdit((cell,), vector) for cell, vector in pairs]
        return [SetEdit((cell,), vector) for cell, vector in pairs]

    def request(self) -> IdempotencyKey:
        """Identifies the upload when it is repeated."""
        body = hashlib.sha256(self.header.SerializeToString(deterministic=True) + self._content)
        return IdempotencyKey(self.header.request_id, body.hexdigest())

    def _check_packed(self, packed: pb.PackedFormat) -> None:
        if packed.dtype not in FORMS:
            raise InvalidRequest.at("header.packed.dtype", "UNKNOWN_VALUE", f"{packed.dtype}; use FLOAT32 or FLOAT16")
        if len(packed.tokens) != len(packed.senses):
            raise InvalidRequest.at(
                "header.packed", "WRONG_SHAPE", f"{len(packed.tokens)} tokens, but {len(packed.senses)} senses"
            )
        self._check_count("header.packed.tokens", len(packed.tokens))
        expected = len(packed.tokens) * self._shape.width * struct.calcsize(FORMS[packed.dtype])
        if self.header.size != expected:
            raise InvalidRequest.at(
                "header.size",
                "WRONG_SHAPE",
                f"{self.header.size} bytes; {len(packed.tokens)} vectors of {self._shape.width} are {expected}",
            )

    def _check_count(self, field: str, count: int) -> None:
        if not 0 < count <= self._limits.cells:
            raise InvalidRequest.at(field, "TOO_MANY_CELLS", f"{count} cells; 1 to {self._limits.cells}")

    def _tensors(self) -> tuple[Iterator[Cell], Iterator[Sequence[float]]]:
        try:
            read = safetensors.deserialize(bytes(self._content))  # type: ignore[no-untyped-call]
        except safetensors.SafetensorError as error:
            raise InvalidRequest.at("content", "NOT_SAFETENSORS", f"not a safetensors file: {error}") from None
        found = {name: (tensor["dtype"], list(tensor["shape"]), bytes(tensor["data"])) for name, tensor in read}
        if found.keys() != {"tokens", "senses", "vectors"}:
            raise InvalidRequest.at(
                "content", "WRONG_TENSORS", f"{', '.join(sorted(found)) or 'none'}; use tokens, senses and vectors"
            )
        count = found["tokens"][1][0] if found["tokens"][1] else 0
        self._check_count("content.tokens", count)
        numbers: dict[str, tuple[int, ...]] = {}
        for name, types, shape in (
            ("tokens", ("I32", "I64"), [count]),
            ("senses", ("I32", "I64"), [count]),
            ("vectors", ("F32", "F16"), [count, self._shape.width]),
        ):
            dtype, is_shape, data = found[name]
            if dtype not in types or is_shape != shape:
                raise InvalidRequest.at(
                    f"content.{name}", "WRONG_SHAPE", f"{dtype} {is_shape}; use {' or '.join(types)} {shape}"
                )
            if name != "vectors":
                numbers[name] = struct.unpack(f"<{count}{_TENSORS[dtype]}", data)
        cells = map(Cell, numbers["tokens"], numbers["senses"])
        return cells, self._vector_rows(found["vectors"][2], _TENSORS[found["vectors"][0]])

    def _vector_rows(self, data: bytes, form: str) -> Iterator[Sequence[float]]:
        return struct.iter_unpack(f"<{self._shape.width}{form}", data)
