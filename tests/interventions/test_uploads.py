"""Revisions that are uploaded over gRPC, as packed bytes and as safetensors, and what may be wrong with them."""

from __future__ import annotations

import asyncio
import math
import struct
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest
from backpack_lm.installed import folder_of
from backpack_lm.manifest import Manifest
from backpack_lm.patch import AddEdit, Cell, ModelShape, PatchLimits, RevisionContent, SetEdit, Vector
from backpack_proto.v1 import interventions_pb2 as pb
from backpack_proto.v1.inference_pb2 import Word
from backpack_serving import rpc
from backpack_serving.errors import Exhausted, InvalidRequest, NotFound
from backpack_serving.interventions.patch_servicer import UPLOADS
from backpack_serving.interventions.uploads import CHUNK, LONGEST_HEADER, Upload
from google.protobuf.field_mask_pb2 import FieldMask
from safetensors.numpy import save

from tests.interventions.control import Control, control, refused

__all__ = ["control"]

SHAPE = Manifest.read(folder_of("micro")).shape
WIDTH = SHAPE.width

pytestmark = pytest.mark.asyncio(loop_scope="module")


VECTORS = [[float(n + 1) / 64 for _ in range(WIDTH)] for n in range(3)]
CELLS = [(7, 0), (8, 3), (7, 5)]
EDITS = tuple(AddEdit((Cell(t, s),), Vector.of(v)) for (t, s), v in zip(CELLS, VECTORS, strict=True))


def packed(
    kind: int = pb.EDIT_KIND_ADD, form: str = "f", vectors: list[list[float]] = VECTORS, **fields: Any
) -> tuple[pb.UploadHeader, bytes]:
    content = b"".join(struct.pack(f"<{WIDTH}{form}", *v) for v in vectors)
    dtype = pb.DATA_TYPE_FLOAT32 if form == "f" else pb.DATA_TYPE_FLOAT16
    cells = pb.PackedFormat(tokens=[t for t, _ in CELLS], senses=[s for _, s in CELLS], dtype=dtype)
    values = {"parent": "patches/p", "kind": kind, "packed": cells, "size": len(content), **fields}
    return pb.UploadHeader(**values), content


def tensors(**changed: Any) -> tuple[pb.UploadHeader, bytes]:
    """A safetensors file; `changed` tensors in place of the good ones, None for none."""
    arrays = {
        "tokens": np.array([t for t, _ in CELLS], np.int64),
        "senses": np.array([s for _, s in CELLS], np.int32),
        "vectors": np.array(VECTORS, np.float16),
        **changed,
    }
    content = save({name: array for name, array in arrays.items() if array is not None}, {"made": "by a test"})
    header = pb.UploadHeader(
        parent="patches/p", kind=pb.EDIT_KIND_ADD, safetensors=pb.SafetensorsFormat(), size=len(content)
    )
    return header, content


async def upload(control: Control, key: Any, header: pb.UploadHeader, content: bytes, chunk: int = 1000) -> Any:
    async def parts() -> AsyncIterator[pb.UploadRevisionRequest]:
        yield pb.UploadRevisionRequest(header=header)
        for at in range(0, len(content), chunk):
            yield pb.UploadRevisionRequest(chunk=content[at : at + chunk])

    return await control.patches.UploadRevision(parts(), metadata=key)


@pytest.mark.parametrize(
    ("form", "edits"),
    [
        (packed, EDITS),
        (lambda: packed(form="e"), EDITS),
        (lambda: packed(pb.EDIT_KIND_SET), tuple(SetEdit(e.cells, e.delta) for e in EDITS)),
        (tensors, EDITS),
    ],
    ids=["packed", "float16", "set", "safetensors"],
)
async def test_an_upload_is_a_revision_like_another(control: Control, form: Any, edits: Any) -> None:
    _, key, _ = await control.tenant()
    header, content = form()
    header.validate_only = True
    draft = (await upload(control, key, header, content)).revision
    header.validate_only, header.request_id = False, str(uuid.uuid4())
    made = await upload(control, key, header, content)
    assert draft.digest == made.revision.digest == RevisionContent(SHAPE.fingerprint, edits).digest
    assert made.revision.name.endswith("/patches/p/revisions/1")
    again = await upload(control, key, header, content, chunk=77)
    assert (again.revision, again.position) == (made.revision, made.position)
    other = bytes([content[0] ^ 1]) + content[1:] if form is not tensors else content[:-2] + b"\0\0"
    assert (await refused(InvalidRequest, upload(control, key, header, other))).reason == "REQUEST_ID_REUSED"


async def test_the_largest_upload(control: Control) -> None:
    """4,096 cells, each with its vector."""
    _, key, _ = await control.tenant()
    count = 4096
    row = struct.pack(f"<{WIDTH}f", *[0.01] * WIDTH)
    cells = pb.PackedFormat(
        tokens=[n // SHAPE.num_senses for n in range(count)],
        senses=[n % SHAPE.num_senses for n in range(count)],
        dtype=pb.DATA_TYPE_FLOAT32,
    )
    header = pb.UploadHeader(parent="patches/p", kind=pb.EDIT_KIND_ADD, packed=cells, size=count * len(row))
    made = (await upload(control, key, header, row * count, chunk=CHUNK)).revision
    request = pb.GetRevisionRequest(name=made.name, read_mask=FieldMask(paths=["digest"]))
    got = (await control.patches.GetRevision(request, metadata=key)).revision
    assert got.digest == made.digest


async def test_the_largest_upload_of_a_wide_model() -> None:
    """4,096 cells at width 768: three of grpc's default messages, and within the limits."""
    shape = ModelShape("ab" * 32, 50_257, 16, 768, (1.0,) * 16)
    row = struct.pack("<768f", *[0.01] * 768)
    cells = pb.PackedFormat(tokens=range(4096), senses=[0] * 4096, dtype=pb.DATA_TYPE_FLOAT32)
    header = pb.UploadHeader(parent="patches/p", kind=pb.EDIT_KIND_SET, packed=cells, size=4096 * len(row))
    upload = Upload(shape, PatchLimits())
    upload.begin(pb.UploadRevisionRequest(header=header))
    content = memoryview(row * 4096)
    for at in range(0, len(content), CHUNK):
        upload.take(pb.UploadRevisionRequest(chunk=bytes(content[at : at + CHUNK])))
    revision = RevisionContent(shape.fingerprint, tuple(upload.edits()))
    revision.validate(shape)
    assert len(revision.edits) == 4096
    assert 4 * 2**20 < len(revision.to_bytes()) < PatchLimits().blob_bytes


def _long_header() -> tuple[pb.UploadHeader, bytes]:
    content = struct.pack("<Q", LONGEST_HEADER + 1) + b" " * 100
    header, _ = tensors()
    header.size = len(content)
    return header, content


BAD: dict[str, tuple[Callable[[], tuple[pb.UploadHeader, bytes]], str, str]] = {
    "no kind": (lambda: packed(0), "UNKNOWN_VALUE", "header.kind"),
    "too large": (lambda: packed(size=2**34), "TOO_LARGE", "header.size"),
    "negative": (lambda: packed(size=-1), "TOO_LARGE", "header.size"),
    "no format": (
        lambda: (pb.UploadHeader(parent="patches/p", kind=pb.EDIT_KIND_ADD, size=8), b""),
        "UNKNOWN_KIND",
        "header.format",
    ),
    "cells": (
        lambda: packed(packed=pb.PackedFormat(tokens=[1, 2, 3], senses=[1], dtype=1)),
        "WRONG_SHAPE",
        "header.packed",
    ),
    "too many cells": (
        lambda: packed(packed=pb.PackedFormat(tokens=[1] * 4097, senses=[1] * 4097, dtype=1)),
        "TOO_MANY_CELLS",
        "header.packed.tokens",
    ),
    "size": (lambda: packed(size=100), "WRONG_SHAPE", "header.size"),
    "incomplete": (lambda: (packed()[0], packed()[1][:-1]), "INCOMPLETE", "content"),
    "more": (lambda: (packed()[0], packed()[1] + b"x"), "TOO_LARGE", "chunk"),
    "unknown token": (
        lambda: packed(packed=pb.PackedFormat(tokens=[2**31] * 3, senses=[1] * 3, dtype=1)),
        "UNKNOWN_TOKEN",
        "edits[0].cells",
    ),
    "no safetensors": (lambda: (tensors()[0], b"x" * tensors()[0].size), "HEADER_TOO_LARGE", "content"),
    "a broken header": (lambda: (tensors()[0], bytes(tensors()[0].size)), "NOT_SAFETENSORS", "content"),
    "long header": (_long_header, "HEADER_TOO_LARGE", "content"),
    "a tensor less": (lambda: tensors(senses=None), "WRONG_TENSORS", "content"),
    "dtype": (lambda: tensors(tokens=np.zeros(3, np.float32)), "WRONG_SHAPE", "content.tokens"),
    "shape": (lambda: tensors(vectors=np.zeros((3, 2), np.float32)), "WRONG_SHAPE", "content.vectors"),
    "no cells": (lambda: tensors(tokens=np.zeros(0, np.int64)), "TOO_MANY_CELLS", "content.tokens"),
    "negative token": (lambda: tensors(tokens=np.array([-1, 2, 3])), "OUT_OF_RANGE", "edits"),
}


@pytest.mark.parametrize("name", BAD)
async def test_a_bad_upload_is_refused_with_its_place(control: Control, name: str) -> None:
    _, key, _ = await control.tenant()
    make, reason, field = BAD[name]
    header, content = make()
    error = await refused(InvalidRequest, upload(control, key, header, content))
    assert (error.violations[0].reason, error.violations[0].field) == (reason, field)
    listed = await control.patches.ListRevisions(pb.ListRevisionsRequest(parent="patches/p"), metadata=key)
    assert list(listed.revisions) == []


NON_FINITE: dict[str, Callable[[float], tuple[pb.UploadHeader, bytes]]] = {
    "packed": lambda value: packed(vectors=[*VECTORS[:2], [value, *VECTORS[2][1:]]]),
    "packed, set": lambda value: packed(pb.EDIT_KIND_SET, vectors=[*VECTORS[:2], [value, *VECTORS[2][1:]]]),
    "packed float16": lambda value: packed(form="e", vectors=[*VECTORS[:2], [*VECTORS[2][:-1], value]]),
    "safetensors": lambda value: tensors(vectors=np.array([*VECTORS[:2], [value] * WIDTH], np.float32)),
    "safetensors float16": lambda value: tensors(vectors=np.array([*VECTORS[:2], [value] * WIDTH], np.float16)),
}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("way", NON_FINITE)
@pytest.mark.parametrize("chunk", [1000, 7])
async def test_p14_what_is_not_a_number_is_refused_in_every_way_to_upload_it(
    control: Control, way: str, value: float, chunk: int
) -> None:
    """Chunks of 7 bytes cut every number in two."""
    _, key, _ = await control.tenant()
    header, content = NON_FINITE[way](value)
    for header.validate_only in (True, False):
        error = await refused(InvalidRequest, upload(control, key, header, content, chunk))
        (violation,) = error.violations
        assert violation.reason == "NON_FINITE"
        assert violation.field.startswith("edits[2]")
    listed = await control.patches.ListRevisions(pb.ListRevisionsRequest(parent="patches/p"), metadata=key)
    assert list(listed.revisions) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
async def test_p14_what_is_not_a_number_is_refused_in_every_edit(control: Control, value: float) -> None:
    _, key, _ = await control.tenant()
    cells, data = [pb.Cells(word=Word(text="king"), senses=[1])], struct.pack(f"<{WIDTH}f", *[value] * WIDTH)
    vector = pb.Vector(data=data, dtype=pb.DATA_TYPE_FLOAT32, shape=[WIDTH])
    for edit in (
        pb.Edit(add=pb.AddEdit(cells=cells, delta=vector)),
        pb.Edit(set=pb.SetEdit(cells=cells, vector=vector)),
        pb.Edit(scale=pb.ScaleEdit(cells=cells, factor=value)),
    ):
        request = pb.CreateRevisionRequest(parent="patches/p", edits=[edit])
        error = await refused(InvalidRequest, control.patches.CreateRevision(request, metadata=key))
        assert [violation.reason for violation in error.violations] == ["NON_FINITE"]


async def test_uploads_that_do_not_begin_or_go_on_as_they_should(control: Control) -> None:
    _, key, _ = await control.tenant()
    header, content = packed()

    async def send(*messages: pb.UploadRevisionRequest) -> Any:
        return await control.patches.UploadRevision(iter(messages), metadata=key)

    head = pb.UploadRevisionRequest(header=header)
    for messages, reason in (
        ((), "MISSING_HEADER"),
        ((pb.UploadRevisionRequest(chunk=content),), "MISSING_HEADER"),
        ((head, head), "SECOND_HEADER"),
        ((head, pb.UploadRevisionRequest()), "SECOND_HEADER"),
    ):
        assert (await refused(InvalidRequest, send(*messages))).reason == reason
    header.parent = "patches/nothing"
    assert (await refused(NotFound, upload(control, key, header, content))).reason == "NO_SUCH_PATCH"
    header.validate_only = True  # of a patch that may be made when the content is good
    assert (await refused(NotFound, upload(control, key, header, content))).reason == "NO_SUCH_PATCH"
    assert (await refused(InvalidRequest, upload(control, key, header, content[:-4]))).reason == "INCOMPLETE"
    header.parent = "patches/Nothing"  # which none may be called
    assert (await refused(InvalidRequest, upload(control, key, header, content))).reason == "BAD_NAME"
    header.validate_only = False
    _, stranger, _ = await control.tenant((pb.ROLE_RELEASER,))
    header.parent = "patches/p"
    await upload(control, stranger, header, content)


async def test_a_tenant_fills_no_memory_with_uploads_that_it_does_not_finish(control: Control) -> None:
    _, key, _ = await control.tenant()
    _, other, _ = await control.tenant()
    header, content = packed()

    async def until(end: asyncio.Event) -> AsyncIterator[pb.UploadRevisionRequest]:
        yield pb.UploadRevisionRequest(header=header)
        await end.wait()
        yield pb.UploadRevisionRequest(chunk=content)

    end = asyncio.Event()
    running = [asyncio.create_task(_made(control, key, until(end))) for _ in range(UPLOADS + 1)]
    (done,), _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    with pytest.raises(Exhausted) as too_many, rpc.errors():
        await done
    assert too_many.value.reason == "UPLOADS_LIMIT"
    await upload(control, other, header, content)
    end.set()
    await asyncio.gather(*(one for one in running if one is not done))
    await upload(control, key, header, content)


async def _made(control: Control, key: Any, parts: AsyncIterator[pb.UploadRevisionRequest]) -> None:
    await control.patches.UploadRevision(parts, metadata=key)


async def test_an_upload_that_is_repeated_has_its_answer_when_its_patch_is_deleted(control: Control) -> None:
    _, key, _ = await control.tenant()
    header, content = packed(request_id=str(uuid.uuid4()))
    first = await upload(control, key, header, content)
    await control.patches.DeletePatch(pb.DeletePatchRequest(name="patches/p"), metadata=key)
    assert await upload(control, key, header, content) == first
    header.request_id = str(uuid.uuid4())
    assert (await refused(NotFound, upload(control, key, header, content))).reason == "PATCH_DELETED"
