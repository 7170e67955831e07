"""The public API of the intervention service over gRPC: tenants and keys, patches, uploads, masks, pages."""

from __future__ import annotations

import struct
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from backpack_lm.manifest import Manifest
from backpack_lm.patch import Add, Cell, Limits, ModelShape, Revision, Set, Vector
from backpack_proto.v1 import interventions_pb2 as pb
from backpack_proto.v1 import interventions_pb2_grpc as v1
from backpack_proto.v1.inference_pb2 import Word
from backpack_serving import rpc
from backpack_serving.errors import InvalidRequest, NotFound, PreconditionFailed, ServiceError, Unauthenticated
from backpack_serving.interventions import bootstrap
from backpack_serving.metrics import Metrics
from backpack_serving.settings import Settings, default_model
from backpack_serving.wire.uploads import CHUNK, LONGEST_HEADER, Upload
from google.protobuf.field_mask_pb2 import FieldMask
from safetensors.numpy import save

SHAPE = Manifest.read(default_model()).shape
WIDTH = SHAPE.width

pytestmark = pytest.mark.asyncio(loop_scope="module")


class Control:
    """Stubs of one service, as its admin and as a tenant's releaser."""

    def __init__(self, address: str, admin: str) -> None:
        self.channel = rpc.channel(address)
        self.tenants = v1.TenantServiceStub(self.channel)
        self.patches = v1.PatchServiceStub(self.channel)
        self.releases = v1.ReleaseServiceStub(self.channel)
        self.admin = rpc.with_key(admin)

    async def tenant(self, roles: tuple[Any, ...] = (pb.ROLE_RELEASER,)) -> tuple[str, Any, pb.ApiKey]:
        """A new tenant's name, its credential, and the key."""
        name = f"t{uuid.uuid4().hex[:12]}"
        await self.tenants.CreateTenant(pb.CreateTenantRequest(tenant_id=name), metadata=self.admin)
        request = pb.CreateApiKeyRequest(parent=f"tenants/{name}", roles=roles)
        made = await self.tenants.CreateApiKey(request, metadata=self.admin)
        key = rpc.with_key(made.secret)
        await self.patches.CreatePatch(pb.CreatePatchRequest(patch_id="p", description="first"), metadata=key)
        return f"tenants/{name}", key, made.key


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def control(tmp_path_factory: Any) -> AsyncIterator[Control]:
    state: Path = tmp_path_factory.mktemp("state")
    settings = Settings(state=state, interventions_address="127.0.0.1:0")
    running = await bootstrap.start(settings, Metrics())
    control = Control(running.address, settings.key_for("admin"))
    yield control
    await control.channel.close()
    await running.stop()


async def refused(kind: type[ServiceError], call: Any) -> ServiceError:
    with pytest.raises(kind) as caught, rpc.errors():
        await call
    return caught.value


def scale(word: str) -> pb.Edit:
    return pb.Edit(scale=pb.ScaleEdit(cells=[pb.Cells(word=Word(text=word), senses=[1])], factor=0.5))


async def revise(control: Control, key: Any, *edits: pb.Edit, patch: str = "p") -> pb.Revision:
    request = pb.CreateRevisionRequest(parent=f"patches/{patch}", edits=edits)
    return (await control.patches.CreateRevision(request, metadata=key)).revision


async def test_a_patch_is_described_deleted_and_its_releases_live_on(control: Control) -> None:
    tenant, key, _ = await control.tenant()
    revision = await revise(control, key, scale("king"))
    release = await control.releases.CreateRelease(
        pb.CreateReleaseRequest(revisions=[revision.name]), metadata=key
    )
    update = pb.UpdatePatchRequest(
        patch=pb.Patch(name="patches/p", description="new"), update_mask=FieldMask(paths=["description"])
    )
    answer = (await control.patches.UpdatePatch(update, metadata=key)).patch
    assert (answer.description, answer.latest_revision) == ("new", 1)
    got = (await control.patches.GetPatch(pb.GetPatchRequest(name=f"{tenant}/patches/p"), metadata=key)).patch
    assert got == answer

    deleted = await control.patches.DeletePatch(pb.DeletePatchRequest(name="patches/p"), metadata=key)
    assert deleted.patch.deleted
    listed = await control.patches.ListPatches(pb.ListPatchesRequest(), metadata=key)
    assert list(listed.patches) == []
    all_of_them = await control.patches.ListPatches(pb.ListPatchesRequest(show_deleted=True), metadata=key)
    assert [(p.name, p.deleted) for p in all_of_them.patches] == [(f"{tenant}/patches/p", True)]
    for call in (
        control.patches.GetPatch(pb.GetPatchRequest(name="patches/p"), metadata=key),
        control.patches.DeletePatch(pb.DeletePatchRequest(name="patches/p"), metadata=key),
        control.patches.UpdatePatch(update, metadata=key),
        control.patches.CreateRevision(
            pb.CreateRevisionRequest(parent="patches/p", edits=[scale("king")]), metadata=key
        ),
        control.releases.CreateRelease(pb.CreateReleaseRequest(revisions=[revision.name]), metadata=key),
    ):
        assert (await refused(NotFound, call)).reason == "PATCH_DELETED"
    again = await refused(
        ServiceError, control.patches.CreatePatch(pb.CreatePatchRequest(patch_id="p"), metadata=key)
    )
    assert again.reason == "PATCH_EXISTS", "numbers and names are never used again"

    live = (await control.releases.GetChannel(pb.GetChannelRequest(name="channels/live"), metadata=key)).channel
    activate = pb.ActivateRequest(channel="channels/live", release=release.release.number, etag=live.etag)
    await control.releases.Activate(activate, metadata=key)
    kept = await control.patches.GetRevision(pb.GetRevisionRequest(name=revision.name), metadata=key)
    assert kept.revision.digest == revision.digest


async def test_masks(control: Control) -> None:
    _, key, _ = await control.tenant()
    revision = await revise(control, key, scale("king"))
    request = pb.GetRevisionRequest(name=revision.name, read_mask=FieldMask(paths=["digest", "name"]))
    answer = (await control.patches.GetRevision(request, metadata=key)).revision
    assert answer == pb.Revision(name=revision.name, digest=revision.digest)
    request.read_mask.paths.append("nonsense")
    error = await refused(InvalidRequest, control.patches.GetRevision(request, metadata=key))
    assert error.violations[0].field == "read_mask"
    update = pb.UpdatePatchRequest(patch=pb.Patch(name="patches/p"), update_mask=FieldMask(paths=["name"]))
    assert "'name'" in (await refused(InvalidRequest, control.patches.UpdatePatch(update, metadata=key))).message


async def test_a_release_is_read_by_its_number(control: Control) -> None:
    tenant, key, _ = await control.tenant()
    empty = await control.releases.GetRelease(pb.GetReleaseRequest(name="releases/0"), metadata=key)
    assert (empty.release.name, list(empty.release.revisions)) == (f"{tenant}/releases/0", [])
    for name, kind in (("releases/9", NotFound), ("releases/x", InvalidRequest), ("releases/\0", InvalidRequest)):
        await refused(kind, control.releases.GetRelease(pb.GetReleaseRequest(name=name), metadata=key))


async def test_keys_are_listed_in_pages_rotated_and_revoked(control: Control) -> None:
    tenant, key, made = await control.tenant()
    for _ in range(3):
        await control.tenants.CreateApiKey(
            pb.CreateApiKeyRequest(parent=tenant, roles=[pb.ROLE_CALLER]), metadata=control.admin
        )
    names: list[str] = []
    request = pb.ListApiKeysRequest(parent=tenant, page_size=3)
    while True:
        page = await control.tenants.ListApiKeys(request, metadata=control.admin)
        names += [k.name for k in page.keys]
        request.page_token = page.next_page_token
        if not page.next_page_token:
            break
    assert len(names) == 4
    assert names == sorted(set(names))

    rotate = pb.RotateApiKeyRequest(name=made.name, request_id=str(uuid.uuid4()))
    answer = await control.tenants.RotateApiKey(rotate, metadata=control.admin)
    assert list(answer.key.roles) == list(made.roles)
    await control.patches.ListPatches(pb.ListPatchesRequest(), metadata=rpc.with_key(answer.secret))
    await refused(Unauthenticated, control.patches.ListPatches(pb.ListPatchesRequest(), metadata=key))
    repeated = await control.tenants.RotateApiKey(rotate, metadata=control.admin)
    assert (repeated.key, repeated.secret) == (answer.key, ""), "the secret was shown once"
    again = control.tenants.RotateApiKey(pb.RotateApiKeyRequest(name=made.name), metadata=control.admin)
    assert (await refused(PreconditionFailed, again)).reason == "KEY_REVOKED"
    await control.tenants.RevokeApiKey(pb.RevokeApiKeyRequest(name=answer.key.name), metadata=control.admin)
    await refused(
        Unauthenticated,
        control.patches.ListPatches(pb.ListPatchesRequest(), metadata=rpc.with_key(answer.secret)),
    )
    for name, kind in ((f"{tenant}/keys/nothing", NotFound), ("nonsense", InvalidRequest)):
        await refused(
            kind, control.tenants.RevokeApiKey(pb.RevokeApiKeyRequest(name=name), metadata=control.admin)
        )


@pytest.mark.parametrize(
    "token", ["nonsense", "IjAi", "MTAwMDAwMDAwMDAwMDAwMDAwMDAwMDA=", "LTE=", "dHJ1ZQ==", "Ilx1MDAwMCI="]
)
async def test_page_tokens_that_are_not_ours(control: Control, token: str) -> None:
    """Among them numbers that no database has, true, and a NUL."""
    _, key, _ = await control.tenant()
    if token not in ("IjAi", "Ilx1MDAwMCI="):
        request = pb.ListReleasesRequest(page_token=token)
        assert (await refused(InvalidRequest, control.releases.ListReleases(request, metadata=key))).reason
    if token != "IjAi":
        request = pb.ListPatchesRequest(page_token=token)
        assert (await refused(InvalidRequest, control.patches.ListPatches(request, metadata=key))).reason


async def test_p15_ending_the_service_of_many_needs_force(control: Control) -> None:
    """More than the larger of 10 and a tenth: asked for with `force`, or not done at all."""
    made = [await control.tenant() for _ in range(12)]
    names = [name for name, _, _ in made]

    def suspend(some: list[str], force: bool = False) -> Any:
        return control.tenants.SuspendTenants(
            pb.SuspendTenantsRequest(names=some, force=force), metadata=control.admin
        )

    listed = (
        await control.tenants.ListTenants(pb.ListTenantsRequest(page_size=1000), metadata=control.admin)
    ).tenants
    active = sum(not t.suspended for t in listed) - 1
    assert active < 110, "else a tenth of them is more than ten"
    error = await refused(PreconditionFailed, suspend(names[:11]))
    assert (error.reason, error.metadata) == (
        "NEEDS_FORCE",
        {"tenants": "11", "active": str(active), "bound": "10"},
    )
    await control.patches.ListPatches(pb.ListPatchesRequest(), metadata=made[0][1])
    await suspend(names[:10])
    await suspend([*names[:10], names[10]])  # only one of them is new
    for _, key, _ in made[:11]:
        call = control.patches.ListPatches(pb.ListPatchesRequest(), metadata=key)
        assert (await refused(Unauthenticated, call)).reason == "TENANT_SUSPENDED"
    await control.patches.ListPatches(pb.ListPatchesRequest(), metadata=made[11][1])
    await control.tenants.ResumeTenants(pb.ResumeTenantsRequest(names=names), metadata=control.admin)
    await control.patches.ListPatches(pb.ListPatchesRequest(), metadata=made[0][1])
    await suspend(names, force=True)
    await control.tenants.ResumeTenants(pb.ResumeTenantsRequest(names=names), metadata=control.admin)
    for some, kind in (([], InvalidRequest), (["tenants/system"], InvalidRequest), (["tenants/none"], NotFound)):
        await refused(kind, suspend(some, force=True))


VECTORS = [[float(n + 1) / 64 for _ in range(WIDTH)] for n in range(3)]
CELLS = [(7, 0), (8, 3), (7, 5)]
EDITS = tuple(Add((Cell(t, s),), Vector.of(v)) for (t, s), v in zip(CELLS, VECTORS, strict=True))


def packed(kind: int = pb.EDIT_KIND_ADD, form: str = "f", **fields: Any) -> tuple[pb.UploadHeader, bytes]:
    content = b"".join(struct.pack(f"<{WIDTH}{form}", *v) for v in VECTORS)
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
        (lambda: packed(pb.EDIT_KIND_SET), tuple(Set(e.cells, e.delta) for e in EDITS)),
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
    assert draft.digest == made.revision.digest == Revision(SHAPE.fingerprint, edits).digest
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
    upload = Upload(shape, Limits())
    upload.begin(pb.UploadRevisionRequest(header=header))
    content = memoryview(row * 4096)
    for at in range(0, len(content), CHUNK):
        upload.take(pb.UploadRevisionRequest(chunk=bytes(content[at : at + CHUNK])))
    revision = Revision(shape.fingerprint, tuple(upload.edits()))
    revision.validate(shape)
    assert len(revision.edits) == 4096
    assert 4 * 2**20 < len(revision.to_bytes()) < Limits().blob_bytes


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
    _, stranger, _ = await control.tenant((pb.ROLE_RELEASER,))
    header.parent = "patches/p"
    await upload(control, stranger, header, content)
