"""The services for people and programs that steer: validate, one domain call, translate."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from backpack_lm.tokenizer import Tokenizer
from backpack_proto.v1 import interventions_pb2 as pb
from backpack_proto.v1 import interventions_pb2_grpc as grpc_v1
from backpack_proto.v1 import sync_pb2_grpc as sync_v1

from backpack_serving import rpc
from backpack_serving.auth.identity import Identities
from backpack_serving.auth.keys import Principal, Role
from backpack_serving.errors import Exhausted
from backpack_serving.interventions.caller import Caller, WriteNotifier
from backpack_serving.interventions.channel_servicer import ChannelMethods
from backpack_serving.interventions.ledger import WriteResult
from backpack_serving.interventions.records import PatchRecord
from backpack_serving.interventions.rollouts import Rollouts
from backpack_serving.interventions.service import Interventions
from backpack_serving.interventions.sync_servicer import FleetServicer, SyncServicer
from backpack_serving.wire import control as wire
from backpack_serving.wire.patches import read_edits
from backpack_serving.wire.uploads import Upload

UPLOADS = 8
"""Uploads of a tenant that may run at once: each keeps what has come, and whoever sends it says when it ends."""


class TenantServicer(Caller, grpc_v1.TenantServiceServicer):
    async def CreateTenant(self, request: pb.CreateTenantRequest, context: rpc.Context) -> pb.CreateTenantResponse:
        who = await self.who(context)
        again = wire.identify(request, request.request_id)
        written = await asyncio.to_thread(self.service.create_tenant, who, request.tenant_id, again)
        return pb.CreateTenantResponse(
            tenant=wire.write_tenant(written.record), position=wire.write_position(written.position)
        )

    async def ListTenants(self, request: pb.ListTenantsRequest, context: rpc.Context) -> pb.ListTenantsResponse:
        who = await self.who(context)
        after, limit = wire.read_page(request.page_size, request.page_token, str)
        found = await asyncio.to_thread(self.service.tenants, who, after, limit)
        return pb.ListTenantsResponse(
            tenants=map(wire.write_tenant, found),
            next_page_token=wire.page_token(found, limit, found[-1].tenant if found else None),
        )

    async def CreateApiKey(self, request: pb.CreateApiKeyRequest, context: rpc.Context) -> pb.CreateApiKeyResponse:
        who = await self.who(context)
        tenant = wire.parse_tenant("parent", request.parent)
        roles, again = wire.read_roles(request.roles), wire.identify(request, request.request_id)
        written, key = await asyncio.to_thread(self.service.create_key, who, tenant, roles, again)
        return pb.CreateApiKeyResponse(
            key=wire.write_key(written.record),
            secret=str(key) if key else "",
            position=wire.write_position(written.position),
        )

    async def ListApiKeys(self, request: pb.ListApiKeysRequest, context: rpc.Context) -> pb.ListApiKeysResponse:
        who = await self.who(context)
        tenant = wire.parse_tenant("parent", request.parent)
        after, limit = wire.read_page(request.page_size, request.page_token, str)
        found = await asyncio.to_thread(self.service.keys, who, tenant, after, limit)
        return pb.ListApiKeysResponse(
            keys=map(wire.write_key, found),
            next_page_token=wire.page_token(found, limit, found[-1].key if found else None),
        )

    async def RevokeApiKey(self, request: pb.RevokeApiKeyRequest, context: rpc.Context) -> pb.RevokeApiKeyResponse:
        who = await self.who(context)
        tenant, key = wire.parse_key("name", request.name)
        again = wire.identify(request, request.request_id)
        written = await asyncio.to_thread(self.service.revoke_key, who, tenant, key, again)
        return pb.RevokeApiKeyResponse(position=wire.write_position(written.position))

    async def RotateApiKey(self, request: pb.RotateApiKeyRequest, context: rpc.Context) -> pb.RotateApiKeyResponse:
        who = await self.who(context)
        tenant, old = wire.parse_key("name", request.name)
        again = wire.identify(request, request.request_id)
        written, key = await asyncio.to_thread(self.service.rotate_key, who, tenant, old, again)
        return pb.RotateApiKeyResponse(
            key=wire.write_key(written.record),
            secret=str(key) if key else "",
            position=wire.write_position(written.position),
        )

    async def SuspendTenants(
        self, request: pb.SuspendTenantsRequest, context: rpc.Context
    ) -> pb.SuspendTenantsResponse:
        who = await self.who(context)
        names = [wire.parse_tenant(f"names[{at}]", name) for at, name in enumerate(request.names)]
        again = wire.identify(request, request.request_id)
        written = await asyncio.to_thread(self.service.suspend, who, names, request.force, again)
        return pb.SuspendTenantsResponse(position=wire.write_position(written.position))

    async def ResumeTenants(self, request: pb.ResumeTenantsRequest, context: rpc.Context) -> pb.ResumeTenantsResponse:
        who = await self.who(context)
        names = [wire.parse_tenant(f"names[{at}]", name) for at, name in enumerate(request.names)]
        again = wire.identify(request, request.request_id)
        written = await asyncio.to_thread(self.service.resume, who, names, again)
        return pb.ResumeTenantsResponse(position=wire.write_position(written.position))


class PatchServicer(Caller, grpc_v1.PatchServiceServicer):
    def __init__(self, service: Interventions, tokenizer: Tokenizer, identities: Identities) -> None:
        super().__init__(service, tokenizer, identities)
        self._uploads: Counter[str] = Counter()

    async def CreatePatch(self, request: pb.CreatePatchRequest, context: rpc.Context) -> pb.CreatePatchResponse:
        who = await self.who(context)
        again = wire.identify(request, request.request_id)
        written = await asyncio.to_thread(self.service.create_patch, who, request.patch_id, request.description, again)
        return pb.CreatePatchResponse(**await self._patch_answer(who, written))

    async def GetPatch(self, request: pb.GetPatchRequest, context: rpc.Context) -> pb.GetPatchResponse:
        who = await self.who(context)
        (name,) = wire.parse_name("name", request.name, "patches/{}", who)
        return pb.GetPatchResponse(patch=wire.write_patch(*await asyncio.to_thread(self.service.patch, who, name)))

    async def UpdatePatch(self, request: pb.UpdatePatchRequest, context: rpc.Context) -> pb.UpdatePatchResponse:
        who = await self.who(context)
        (name,) = wire.parse_name("patch.name", request.patch.name, "patches/{}", who)
        wire.check_mask("update_mask", request.update_mask, ["description"])
        again = wire.identify(request, request.request_id)
        written = await asyncio.to_thread(self.service.describe_patch, who, name, request.patch.description, again)
        return pb.UpdatePatchResponse(**await self._patch_answer(who, written))

    async def DeletePatch(self, request: pb.DeletePatchRequest, context: rpc.Context) -> pb.DeletePatchResponse:
        who = await self.who(context)
        (name,) = wire.parse_name("name", request.name, "patches/{}", who)
        again = wire.identify(request, request.request_id)
        written = await asyncio.to_thread(self.service.delete_patch, who, name, again)
        return pb.DeletePatchResponse(**await self._patch_answer(who, written))

    async def _patch_answer(self, who: Principal, written: WriteResult[PatchRecord]) -> dict[str, Any]:
        """The fields that every answer to a change of a patch has."""
        newest = await asyncio.to_thread(self.service.newest_revision, who, written.record)
        return {
            "patch": wire.write_patch(written.record, newest),
            "position": wire.write_position(written.position),
        }

    async def ListPatches(self, request: pb.ListPatchesRequest, context: rpc.Context) -> pb.ListPatchesResponse:
        who = await self.who(context)
        after, limit = wire.read_page(request.page_size, request.page_token, str)
        found = await asyncio.to_thread(self.service.patches, who, after, limit, request.show_deleted)
        return pb.ListPatchesResponse(
            patches=[wire.write_patch(record, latest) for record, latest in found],
            next_page_token=wire.page_token(found, limit, found[-1][0].patch if found else None),
        )

    async def check_author(self, context: rpc.Context) -> None:
        (await self.who(context)).require(Role.AUTHOR)

    async def CreateRevision(
        self, request: pb.CreateRevisionRequest, context: rpc.Context
    ) -> pb.CreateRevisionResponse:
        who = await self.who(context)
        who.require(Role.AUTHOR)  # before the work of reading
        (patch,) = wire.parse_name("parent", request.parent, "patches/{}", who)
        shape, limits = self.service.shape, self.service.limits
        edits = await asyncio.to_thread(read_edits, request.edits, self.tokenizer, shape.num_senses, limits)
        if request.validate_only:
            draft = await asyncio.to_thread(self.service.draft_revision, who, patch, edits)
            return pb.CreateRevisionResponse(revision=wire.write_revision(draft, edits, self.tokenizer))
        again = await asyncio.to_thread(wire.identify, request, request.request_id)
        written = await asyncio.to_thread(self.service.create_revision, who, patch, edits, again)
        return pb.CreateRevisionResponse(
            revision=wire.write_revision(written.record, edits, self.tokenizer),
            position=wire.write_position(written.position),
        )

    async def UploadRevision(
        self, requests: AsyncIterator[pb.UploadRevisionRequest], context: rpc.Context
    ) -> pb.UploadRevisionResponse:
        who = await self.who(context)
        who.require(Role.AUTHOR)  # before the work of reading
        with self._uploading(who.tenant):
            return await self._receive_upload(who, aiter(requests))

    @contextmanager
    def _uploading(self, tenant: str) -> Iterator[None]:
        """Raises Exhausted for one upload too many."""
        if self._uploads[tenant] >= UPLOADS:
            text = f"tenants/{tenant} has {UPLOADS} uploads that aren't finished; finish one, then try again"
            raise Exhausted("UPLOADS_LIMIT", text, retry_after=1.0)
        self._uploads[tenant] += 1
        try:
            yield
        finally:
            self._uploads[tenant] -= 1

    async def _receive_upload(
        self, who: Principal, messages: AsyncIterator[pb.UploadRevisionRequest]
    ) -> pb.UploadRevisionResponse:
        upload = Upload(self.service.shape, self.service.limits)
        upload.begin(await anext(messages, pb.UploadRevisionRequest()))
        (patch,) = wire.parse_name("header.parent", upload.header.parent, "patches/{}", who)
        if not upload.header.validate_only:  # a draft's content is checked first, as CreateRevision does
            # Of a deleted one, an upload that is repeated is answered as before.
            await asyncio.to_thread(self.service.patch, who, patch, True)
        async for message in messages:
            upload.take(message)
        edits = await asyncio.to_thread(upload.edits)
        if upload.header.validate_only:
            draft = await asyncio.to_thread(self.service.draft_revision, who, patch, edits)
            return pb.UploadRevisionResponse(revision=wire.write_revision(draft))
        again = await asyncio.to_thread(upload.request)
        written = await asyncio.to_thread(self.service.create_revision, who, patch, edits, again)
        return pb.UploadRevisionResponse(
            revision=wire.write_revision(written.record), position=wire.write_position(written.position)
        )

    async def GetRevision(self, request: pb.GetRevisionRequest, context: rpc.Context) -> pb.GetRevisionResponse:
        who = await self.who(context)
        patch, text = wire.parse_name("name", request.name, "patches/{}/revisions/{}", who)
        number = wire.parse_number("name", text)
        wire.check_mask("read_mask", request.read_mask, pb.Revision.DESCRIPTOR.fields_by_name)
        found, edits = await asyncio.to_thread(self.service.revision, who, patch, number)
        wanted = set(request.read_mask.paths) or {"edits"}
        spelled = wire.write_revision(found, edits, self.tokenizer if "edits" in wanted else None)
        answer = pb.GetRevisionResponse(revision=spelled)
        if request.read_mask.paths:
            answer = pb.GetRevisionResponse()
            request.read_mask.MergeMessage(spelled, answer.revision)
        return answer

    async def ListRevisions(self, request: pb.ListRevisionsRequest, context: rpc.Context) -> pb.ListRevisionsResponse:
        who = await self.who(context)
        (patch,) = wire.parse_name("parent", request.parent, "patches/{}", who)
        after, limit = wire.read_page(request.page_size, request.page_token, int)
        found = await asyncio.to_thread(self.service.revisions, who, patch, after, limit)
        return pb.ListRevisionsResponse(
            revisions=[wire.write_revision(record) for record in found],
            next_page_token=wire.page_token(found, limit, found[-1].number if found else None),
        )


class ReleaseServicer(ChannelMethods, grpc_v1.ReleaseServiceServicer):
    async def CreateRelease(self, request: pb.CreateReleaseRequest, context: rpc.Context) -> pb.CreateReleaseResponse:
        who = await self.who(context)
        self.service.check_parts(request.revisions)  # before the work of reading: a message holds a million names
        parts = []
        for at, name in enumerate(request.revisions):
            field = f"revisions[{at}]"
            patch, number = wire.parse_name(field, name, "patches/{}/revisions/{}", who)
            parts.append((patch, wire.parse_number(field, number)))
        again = wire.identify(request, request.request_id)
        written = await asyncio.to_thread(self.service.create_release, who, parts, request.notes, again)
        return pb.CreateReleaseResponse(
            release=wire.write_release(written.record), position=wire.write_position(written.position)
        )

    async def GetRelease(self, request: pb.GetReleaseRequest, context: rpc.Context) -> pb.GetReleaseResponse:
        who = await self.who(context)
        (text,) = wire.parse_name("name", request.name, "releases/{}", who)
        found = await asyncio.to_thread(self.service.release, who, wire.parse_number("name", text))
        return pb.GetReleaseResponse(release=wire.write_release(found))

    async def ListReleases(self, request: pb.ListReleasesRequest, context: rpc.Context) -> pb.ListReleasesResponse:
        who = await self.who(context)
        after, limit = wire.read_page(request.page_size, request.page_token, int)
        found = await asyncio.to_thread(self.service.releases, who, after, limit)
        return pb.ListReleasesResponse(
            releases=map(wire.write_release, found),
            next_page_token=wire.page_token(found, limit, found[-1].number if found else None),
        )


class AuditServicer(Caller, grpc_v1.AuditServiceServicer):
    async def ListAuditEntries(
        self, request: pb.ListAuditEntriesRequest, context: rpc.Context
    ) -> pb.ListAuditEntriesResponse:
        who = await self.who(context)
        after, limit = wire.read_page(request.page_size, request.page_token, int)
        found = await asyncio.to_thread(self.service.audit, who, after, limit)
        return pb.ListAuditEntriesResponse(
            entries=map(wire.write_audit_entry, found),
            next_page_token=wire.page_token(found, limit, found[-1].revision if found else None),
        )

    async def VerifyChain(self, request: pb.VerifyChainRequest, context: rpc.Context) -> pb.VerifyChainResponse:
        who = await self.who(context)
        entries, broken = await asyncio.to_thread(self.service.verify_chain, who)
        return pb.VerifyChainResponse(intact=broken is None, entries=entries, first_broken=broken)


def services(
    service: Interventions, tokenizer: Tokenizer, identities: Identities, bell: WriteNotifier, rollouts: Rollouts
) -> list[rpc.Service]:
    """All six, ready to be served."""
    common = service, tokenizer, identities
    patches = PatchServicer(*common)
    add: dict[str, tuple[Callable[..., None], object]] = {
        "TenantService": (grpc_v1.add_TenantServiceServicer_to_server, TenantServicer(*common)),
        "PatchService": (grpc_v1.add_PatchServiceServicer_to_server, patches),
        "ReleaseService": (grpc_v1.add_ReleaseServiceServicer_to_server, ReleaseServicer(*common, rollouts)),
        "AuditService": (grpc_v1.add_AuditServiceServicer_to_server, AuditServicer(*common)),
        "SyncService": (sync_v1.add_SyncServiceServicer_to_server, SyncServicer(*common, bell, rollouts)),
        "FleetService": (sync_v1.add_FleetServiceServicer_to_server, FleetServicer(*common, rollouts)),
    }
    endless, large = frozenset({"Sync"}), {"CreateRevision": patches.check_author}
    return [
        rpc.Service(f"backpack.v1.{name}", adder, servicer, endless, large=large)
        for name, (adder, servicer) in add.items()
    ]
