"""PatchService: patches, revisions, uploads."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from backpack_lm.tokenizer import Tokenizer
from backpack_proto.v1 import interventions_pb2 as pb
from backpack_proto.v1 import interventions_pb2_grpc as grpc_v1

from backpack_serving import rpc
from backpack_serving.auth.identity import Identities
from backpack_serving.auth.keys import Principal, Role
from backpack_serving.errors import Exhausted
from backpack_serving.interventions import wire
from backpack_serving.interventions.ledger import WriteResult
from backpack_serving.interventions.records import PatchRecord
from backpack_serving.interventions.service import Interventions
from backpack_serving.interventions.uploads import Upload
from backpack_serving.wire.edits import read_edits
from backpack_serving.wire.references import write_position

UPLOADS = 8
"""Concurrent uploads of a tenant; each buffers its content until the client finishes."""


class PatchServicer(grpc_v1.PatchServiceServicer):
    """Patches and their revisions."""

    def __init__(self, service: Interventions, tokenizer: Tokenizer, identities: Identities) -> None:
        self._service, self._tokenizer, self._identities = service, tokenizer, identities
        self._uploads: Counter[str] = Counter()

    async def CreatePatch(self, request: pb.CreatePatchRequest, context: rpc.Context) -> pb.CreatePatchResponse:
        who = await self._identities.who(context)
        idempotency_key = wire.read_idempotency_key(request, request.request_id)
        written = await asyncio.to_thread(
            self._service.patches.create_patch, who, request.patch_id, request.description, idempotency_key
        )
        return pb.CreatePatchResponse(**await self._patch_answer(who, written))

    async def GetPatch(self, request: pb.GetPatchRequest, context: rpc.Context) -> pb.GetPatchResponse:
        who = await self._identities.who(context)
        (name,) = wire.parse_name("name", request.name, "patches/{}", who)
        return pb.GetPatchResponse(
            patch=wire.write_patch(*await asyncio.to_thread(self._service.patches.get_patch, who, name))
        )

    async def UpdatePatch(self, request: pb.UpdatePatchRequest, context: rpc.Context) -> pb.UpdatePatchResponse:
        who = await self._identities.who(context)
        (name,) = wire.parse_name("patch.name", request.patch.name, "patches/{}", who)
        wire.check_mask("update_mask", request.update_mask, ["description"])
        idempotency_key = wire.read_idempotency_key(request, request.request_id)
        written = await asyncio.to_thread(
            self._service.patches.describe_patch, who, name, request.patch.description, idempotency_key
        )
        return pb.UpdatePatchResponse(**await self._patch_answer(who, written))

    async def DeletePatch(self, request: pb.DeletePatchRequest, context: rpc.Context) -> pb.DeletePatchResponse:
        who = await self._identities.who(context)
        (name,) = wire.parse_name("name", request.name, "patches/{}", who)
        idempotency_key = wire.read_idempotency_key(request, request.request_id)
        written = await asyncio.to_thread(self._service.patches.delete_patch, who, name, idempotency_key)
        return pb.DeletePatchResponse(**await self._patch_answer(who, written))

    async def _patch_answer(self, who: Principal, written: WriteResult[PatchRecord]) -> dict[str, Any]:
        """The fields that every answer to a change of a patch has."""
        newest = await asyncio.to_thread(self._service.patches.newest_revision, who, written.record)
        return {
            "patch": wire.write_patch(written.record, newest),
            "position": write_position(written.position),
        }

    async def ListPatches(self, request: pb.ListPatchesRequest, context: rpc.Context) -> pb.ListPatchesResponse:
        who = await self._identities.who(context)
        after, limit = wire.read_page(request.page_size, request.page_token, str)
        found = await asyncio.to_thread(self._service.patches.list_patches, who, after, limit, request.show_deleted)
        return pb.ListPatchesResponse(
            patches=[wire.write_patch(record, latest) for record, latest in found],
            next_page_token=wire.page_token(found, limit, found[-1][0].patch if found else None),
        )

    async def check_author(self, context: rpc.Context) -> None:
        (await self._identities.who(context)).require(Role.AUTHOR)

    async def CreateRevision(
        self, request: pb.CreateRevisionRequest, context: rpc.Context
    ) -> pb.CreateRevisionResponse:
        who = await self._identities.who(context)
        who.require(Role.AUTHOR)  # before the work of reading
        (patch,) = wire.parse_name("parent", request.parent, "patches/{}", who)
        shape, limits = self._service.shape, self._service.limits
        edits = await asyncio.to_thread(read_edits, request.edits, self._tokenizer, shape.num_senses, limits)
        if request.validate_only:
            draft = await asyncio.to_thread(self._service.patches.draft_revision, who, patch, edits)
            return pb.CreateRevisionResponse(revision=wire.write_revision(draft, edits, self._tokenizer))
        idempotency_key = await asyncio.to_thread(wire.read_idempotency_key, request, request.request_id)
        written = await asyncio.to_thread(self._service.patches.create_revision, who, patch, edits, idempotency_key)
        return pb.CreateRevisionResponse(
            revision=wire.write_revision(written.record, edits, self._tokenizer),
            position=write_position(written.position),
        )

    async def UploadRevision(
        self, requests: AsyncIterator[pb.UploadRevisionRequest], context: rpc.Context
    ) -> pb.UploadRevisionResponse:
        who = await self._identities.who(context)
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
        upload = Upload(self._service.shape, self._service.limits)
        upload.begin(await anext(messages, pb.UploadRevisionRequest()))
        (patch,) = wire.parse_name("header.parent", upload.header.parent, "patches/{}", who)
        if not upload.header.validate_only:  # a draft's content is checked first, as CreateRevision does
            # Of a deleted one, an upload that is repeated is answered as before.
            await asyncio.to_thread(self._service.patches.get_patch, who, patch, True)
        async for message in messages:
            upload.take(message)
        edits = await asyncio.to_thread(upload.edits)
        if upload.header.validate_only:
            draft = await asyncio.to_thread(self._service.patches.draft_revision, who, patch, edits)
            return pb.UploadRevisionResponse(revision=wire.write_revision(draft))
        idempotency_key = await asyncio.to_thread(upload.request)
        written = await asyncio.to_thread(self._service.patches.create_revision, who, patch, edits, idempotency_key)
        return pb.UploadRevisionResponse(
            revision=wire.write_revision(written.record), position=write_position(written.position)
        )

    async def GetRevision(self, request: pb.GetRevisionRequest, context: rpc.Context) -> pb.GetRevisionResponse:
        who = await self._identities.who(context)
        patch, text = wire.parse_name("name", request.name, "patches/{}/revisions/{}", who)
        number = wire.parse_number("name", text)
        wire.check_mask("read_mask", request.read_mask, pb.Revision.DESCRIPTOR.fields_by_name)
        found, edits = await asyncio.to_thread(self._service.patches.get_revision, who, patch, number)
        wanted = set(request.read_mask.paths) or {"edits"}
        spelled = wire.write_revision(found, edits, self._tokenizer if "edits" in wanted else None)
        answer = pb.GetRevisionResponse(revision=spelled)
        if request.read_mask.paths:
            answer = pb.GetRevisionResponse()
            request.read_mask.MergeMessage(spelled, answer.revision)
        return answer

    async def ListRevisions(self, request: pb.ListRevisionsRequest, context: rpc.Context) -> pb.ListRevisionsResponse:
        who = await self._identities.who(context)
        (patch,) = wire.parse_name("parent", request.parent, "patches/{}", who)
        after, limit = wire.read_page(request.page_size, request.page_token, int)
        found = await asyncio.to_thread(self._service.patches.list_revisions, who, patch, after, limit)
        return pb.ListRevisionsResponse(
            revisions=[wire.write_revision(record) for record in found],
            next_page_token=wire.page_token(found, limit, found[-1].number if found else None),
        )
