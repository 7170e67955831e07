"""The public API of the intervention service over gRPC: tenants and keys, patches, masks, pages."""

from __future__ import annotations

import base64
import struct
import uuid
from typing import Any

import pytest
from backpack_lm.installed import folder_of
from backpack_lm.manifest import Manifest
from backpack_proto.v1 import interventions_pb2 as pb
from backpack_proto.v1.inference_pb2 import WORD_POLICY_ALL_TOKENS, Word
from backpack_serving import rpc
from backpack_serving.auth.keys import ApiKeySecret
from backpack_serving.errors import (
    Forbidden,
    InvalidRequest,
    NotFound,
    PreconditionFailed,
    ServiceError,
    Unauthenticated,
)
from google.protobuf.field_mask_pb2 import FieldMask

from tests.interventions.control import Control, control, refused

__all__ = ["control"]

pytestmark = pytest.mark.asyncio(loop_scope="module")


def scale(word: str) -> pb.Edit:
    return pb.Edit(scale=pb.ScaleEdit(cells=[pb.Cells(word=Word(text=word), senses=[1])], factor=0.5))


async def revise(control: Control, key: Any, *edits: pb.Edit, patch: str = "p") -> pb.Revision:
    request = pb.CreateRevisionRequest(parent=f"patches/{patch}", edits=edits)
    return (await control.patches.CreateRevision(request, metadata=key)).revision


async def test_a_patch_is_described_deleted_and_its_releases_live_on(control: Control) -> None:
    tenant, key, _ = await control.tenant()
    revision = await revise(control, key, scale("king"))
    release = await control.releases.CreateRelease(pb.CreateReleaseRequest(revisions=[revision.name]), metadata=key)
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
    again = await refused(ServiceError, control.patches.CreatePatch(pb.CreatePatchRequest(patch_id="p"), metadata=key))
    assert again.reason == "PATCH_EXISTS", "numbers and names are never used again"

    live = (await control.releases.GetChannel(pb.GetChannelRequest(name="channels/live"), metadata=key)).channel
    activate = pb.ActivateRequest(channel="channels/live", release=release.release.number, etag=live.etag)
    await control.releases.Activate(activate, metadata=key)
    kept = await control.patches.GetRevision(pb.GetRevisionRequest(name=revision.name), metadata=key)
    assert kept.revision.digest == revision.digest


async def test_answers_about_a_patch_tell_its_newest_revision_also_when_it_is_deleted_by_then(
    control: Control,
) -> None:
    _, key, _ = await control.tenant()
    create = pb.CreatePatchRequest(patch_id="q", request_id=str(uuid.uuid4()))
    await control.patches.CreatePatch(create, metadata=key)
    await revise(control, key, scale("king"), patch="q")
    again = await control.patches.CreatePatch(create, metadata=key)
    assert again.patch.latest_revision == 1
    described = pb.Patch(name="patches/q", description="new")
    update = pb.UpdatePatchRequest(patch=described, request_id=str(uuid.uuid4()))
    first = await control.patches.UpdatePatch(update, metadata=key)
    deleted = await control.patches.DeletePatch(pb.DeletePatchRequest(name="patches/q"), metadata=key)
    assert deleted.patch.latest_revision == 1
    again = await control.patches.UpdatePatch(update, metadata=key)
    assert (again.patch.latest_revision, again.position) == (1, first.position), "a repetition isn't refused"


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


async def test_edits_are_read_for_authors_alone_and_no_further_than_the_limit_of_cells(control: Control) -> None:
    tenant, author, _ = await control.tenant()
    made = await control.tenants.CreateApiKey(
        pb.CreateApiKeyRequest(parent=tenant, roles=[pb.ROLE_CALLER]), metadata=control.admin
    )
    word = Word(text="q z " * 750, policy=WORD_POLICY_ALL_TOKENS)
    many = pb.Edit(scale=pb.ScaleEdit(cells=[pb.Cells(word=word, senses=[0] * 300)], factor=0.5))
    error = await refused(InvalidRequest, revise(control, author, many))
    assert [(v.field, v.reason) for v in error.violations] == [("edits", "TOO_MANY_CELLS")]
    caller = rpc.with_key(made.secret)
    error = await refused(Forbidden, revise(control, caller, pb.Edit(), many))  # not even what is wrong is told
    assert (error.code, error.reason) == ("PERMISSION_DENIED", "MISSING_ROLE")


async def test_names_of_more_revisions_than_a_release_has_are_not_read(control: Control) -> None:
    """A million of them kept the service's event loop, and all readers, waiting for three seconds."""
    _, key, _ = await control.tenant()
    call = control.releases.CreateRelease(pb.CreateReleaseRequest(revisions=["x"] * 9), metadata=key)
    assert (await refused(InvalidRequest, call)).message == "revisions: 9, at most 8"


async def test_a_release_is_read_by_its_number(control: Control) -> None:
    tenant, key, _ = await control.tenant()
    empty = await control.releases.GetRelease(pb.GetReleaseRequest(name="releases/0"), metadata=key)
    assert (empty.release.name, list(empty.release.revisions)) == (f"{tenant}/releases/0", [])
    for name, kind in (("releases/9", NotFound), ("releases/x", InvalidRequest), ("releases/\0", InvalidRequest)):
        await refused(kind, control.releases.GetRelease(pb.GetReleaseRequest(name=name), metadata=key))


async def test_channels_are_listed_in_pages_and_whole_for_who_asks_for_no_page(control: Control) -> None:
    _, key, _ = await control.tenant()
    for number in range(4):
        request = pb.ActivateRequest(channel=f"channels/c{number}", release=0)
        await control.releases.Activate(request, metadata=key)
    whole = await control.releases.ListChannels(pb.ListChannelsRequest(), metadata=key)
    assert (len(whole.channels), whole.next_page_token) == (5, "")
    listed, asked = [], pb.ListChannelsRequest(page_size=2)
    while True:
        page = await control.releases.ListChannels(asked, metadata=key)
        assert len(page.channels) <= 2
        listed += page.channels
        asked.page_token = page.next_page_token
        if not asked.page_token:
            break
    assert listed == list(whole.channels)
    error = await refused(
        InvalidRequest, control.releases.ListChannels(pb.ListChannelsRequest(page_size=-1), metadata=key)
    )
    assert "at least 0, which means 1000" in error.message
    asked.page_token = "!"
    error = await refused(InvalidRequest, control.releases.ListChannels(asked, metadata=key))
    assert error.reason == "BAD_PAGE_TOKEN"


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
        await refused(kind, control.tenants.RevokeApiKey(pb.RevokeApiKeyRequest(name=name), metadata=control.admin))


@pytest.mark.parametrize(
    "token",
    [
        "nonsense",
        "IjAi",
        "MTAwMDAwMDAwMDAwMDAwMDAwMDAwMDA=",
        "LTE=",
        "dHJ1ZQ==",
        "Ilx1MDAwMCI=",
        base64.b64encode(b'"\\ud800"').decode(),
        base64.b64encode(b"[" * 200_000).decode(),
    ],
    ids=["nonsense", "text", "large", "negative", "true", "nul", "surrogate", "deep"],
)
async def test_page_tokens_that_are_not_ours(control: Control, token: str) -> None:
    """Among them numbers that no database has, true, a NUL, half a character, and lists in lists in lists."""
    _, key, _ = await control.tenant()
    if token not in ("IjAi", "Ilx1MDAwMCI="):
        request = pb.ListReleasesRequest(page_token=token)
        assert (await refused(InvalidRequest, control.releases.ListReleases(request, metadata=key))).reason
    if token != "IjAi":
        request = pb.ListPatchesRequest(page_token=token)
        error = await refused(InvalidRequest, control.patches.ListPatches(request, metadata=key))
        assert error.reason == "BAD_PAGE_TOKEN"


async def test_a_refusal_of_many_things_says_the_first_ones_and_how_many_more(control: Control) -> None:
    """Whole it would be larger than the trailers that it has to fit into."""
    _, key, _ = await control.tenant()
    words = [f"no such word {n}" for n in range(200)]
    call = control.patches.CreateRevision(
        pb.CreateRevisionRequest(parent="patches/p", edits=map(scale, words)), metadata=key
    )
    error = await refused(InvalidRequest, call)
    *told, last = error.violations
    assert len(told) >= 5
    for violation, word in zip(told, words, strict=False):
        assert word in violation.description
    assert (last.reason, last.description) == ("MORE", f"and {200 - len(told)} more")
    assert error.message.endswith("…")


@pytest.mark.parametrize("name", ["x" * 6_000, "x" * 100_000, "界" * 6_000])
async def test_a_refusal_of_something_long_says_how_it_begins(control: Control, name: str) -> None:
    _, key, _ = await control.tenant()
    error = await refused(InvalidRequest, control.patches.GetPatch(pb.GetPatchRequest(name=name), metadata=key))
    assert error.reason == "BAD_NAME"
    assert error.violations[0].description.startswith(repr(name)[:100])


async def test_a_message_is_no_larger_than_its_method_needs(control: Control) -> None:
    """Others were looked through first, on the loop that everybody's calls wait for."""
    _, key, _ = await control.tenant()
    for size, reason in ((2**20 - 4, "BAD_NAME"), (2**20, "TOO_LARGE")):
        call = control.patches.GetPatch(pb.GetPatchRequest(name="x" * size), metadata=key)
        assert (await refused(InvalidRequest, call)).reason == reason
    parent = "patches/" + "x" * 2**21
    call = control.patches.CreateRevision(pb.CreateRevisionRequest(parent=parent), metadata=key)
    error = await refused(InvalidRequest, call)
    assert error.message.endswith(f"x'… has {len(parent)} characters; at most 10000")


async def test_p15_ending_the_service_of_many_needs_force(control: Control) -> None:
    """More than the larger of 10 and a tenth: asked for with `force`, or not done at all."""
    made = [await control.tenant() for _ in range(12)]
    names = [name for name, _, _ in made]

    def suspend(some: list[str], force: bool = False) -> Any:
        return control.tenants.SuspendTenants(pb.SuspendTenantsRequest(names=some, force=force), metadata=control.admin)

    listed = (await control.tenants.ListTenants(pb.ListTenantsRequest(page_size=1000), metadata=control.admin)).tenants
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


async def test_a_large_message_is_read_for_who_may_send_it(control: Control) -> None:
    """This one is no message, and only who may send one is told so."""
    tenant, author, _ = await control.tenant()
    request = pb.CreateApiKeyRequest(parent=tenant, roles=[pb.ROLE_CALLER])
    caller = rpc.with_key((await control.tenants.CreateApiKey(request, metadata=control.admin)).secret)

    def send(method: str, key: Any) -> Any:
        return control.channel.unary_unary(f"/backpack.v1.{method}")(b"\xff" * (rpc.SMALL + 1), metadata=key)

    await refused(Unauthenticated, send("PatchService/CreateRevision", ()))
    await refused(Unauthenticated, send("PatchService/CreateRevision", rpc.with_key(str(ApiKeySecret.mint()))))
    await refused(Forbidden, send("PatchService/CreateRevision", caller))
    told = await refused(InvalidRequest, send("PatchService/CreateRevision", author))
    assert told.reason == "NOT_A_MESSAGE"


async def test_a_revision_may_be_a_large_message(control: Control) -> None:
    _, key, _ = await control.tenant()
    width = Manifest.read(folder_of("micro")).shape.width
    vector = pb.Vector(data=struct.pack("<f", 0.01) * width, dtype=pb.DATA_TYPE_FLOAT32, shape=[width])
    edits = [
        pb.Edit(set=pb.SetEdit(cells=[pb.Cells(word=Word(token=token), senses=[1])], vector=vector))
        for token in range(1, 1500)
    ]
    request = pb.CreateRevisionRequest(parent="patches/p", edits=edits)
    assert request.ByteSize() > rpc.SMALL
    made = await control.patches.CreateRevision(request, metadata=key)
    assert len(made.revision.edits) == len(edits)
