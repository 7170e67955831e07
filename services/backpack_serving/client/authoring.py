"""Authoring: patches, their revisions, and releases of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

from backpack_proto.v1 import interventions_pb2 as pb
from backpack_proto.v1.interventions_pb2_grpc import PatchServiceStub, ReleaseServiceStub

from backpack_serving.client.arguments import build
from backpack_serving.client.connection import Connected, new_id
from backpack_serving.client.edits import Edit
from backpack_serving.client.records import Patch, Release, Revision
from backpack_serving.client.requests import edit_messages
from backpack_serving.errors import AlreadyExists, InvalidRequest

CHUNK = 2**20
"""Bytes of an upload in one message."""


class Authoring(Connected):
    """What an author may."""

    @cached_property
    def _patches(self) -> PatchServiceStub:
        return PatchServiceStub(self._transport.channel)

    @cached_property
    def _releases(self) -> ReleaseServiceStub:
        return ReleaseServiceStub(self._transport.channel)

    async def create_patch(self, patch: str, description: str = "", *, exist_ok: bool = False) -> Patch:
        """A new patch, called by 1 to 63 of a-z, 0-9 and "-".

        Raises AlreadyExists for one that is there; with `exist_ok`, it is the answer.
        """
        request = build(pb.CreatePatchRequest, patch_id=patch, description=description)
        try:
            return Patch.of((await self._write(self._patches.CreatePatch, request)).patch)
        except AlreadyExists:
            if not exist_ok:
                raise
        return await self.patch(patch)

    async def patch(self, patch: str) -> Patch:
        """One patch, by its id."""
        request = build(pb.GetPatchRequest, name=f"patches/{patch}")
        return Patch.of((await self._call(self._patches.GetPatch, request)).patch)

    async def patches(self, *, deleted: bool = False) -> tuple[Patch, ...]:
        """All of them, the deleted ones if asked for."""
        request = build(pb.ListPatchesRequest, show_deleted=deleted)
        return tuple(map(Patch.of, await self._pages(self._patches.ListPatches, request, "patches")))

    async def describe_patch(self, patch: str, description: str) -> Patch:
        """Say what a patch is for."""
        request = pb.UpdatePatchRequest(patch=build(pb.Patch, name=f"patches/{patch}", description=description))
        return Patch.of((await self._write(self._patches.UpdatePatch, request)).patch)

    async def delete_patch(self, patch: str) -> Patch:
        """Hide a patch. Releases that have revisions of it keep them; the name stays taken."""
        request = build(pb.DeletePatchRequest, name=f"patches/{patch}")
        return Patch.of((await self._write(self._patches.DeletePatch, request)).patch)

    async def create_revision(self, patch: str, edits: Sequence[Edit | pb.Edit], *, dry_run: bool = False) -> Revision:
        """A further revision of a patch: edits, or messages of the API, which apply in this order.

        With `dry_run` they are checked, and answered with the number that they would have; nothing is stored.
        """
        request = build(
            pb.CreateRevisionRequest, parent=f"patches/{patch}", edits=edit_messages(edits), validate_only=dry_run
        )
        return Revision.of((await self._write(self._patches.CreateRevision, request)).revision)

    async def upload_revision(
        self,
        patch: str,
        safetensors: bytes | Path,
        *,
        replace: bool = False,
        dry_run: bool = False,
        sent: Callable[[int], None] | None = None,
    ) -> Revision:
        """A revision that gives each of n cells a vector of its own: added to the sense, or in place of it.

        A safetensors file, or its content, has `tokens` and `senses` [n], of I32 or I64, and `vectors` [n, d], of
        F32 or F16. `sent` is told how many of its bytes have gone, from any thread.
        """
        header = build(
            pb.UploadHeader,
            parent=f"patches/{patch}",
            kind=pb.EDIT_KIND_SET if replace else pb.EDIT_KIND_ADD,
            safetensors=pb.SafetensorsFormat(),
            size=safetensors.stat().st_size if isinstance(safetensors, Path) else len(safetensors),
            validate_only=dry_run,
            request_id=new_id(),
        )

        def upload(header: pb.UploadHeader, **how: Any) -> Any:
            return self._patches.UploadRevision(_parts(header, safetensors, sent), **how)

        return Revision.of((await self._call(upload, header)).revision)

    async def revision(self, patch: str, number: int | None = None) -> Revision:
        """A revision with its edits; the newest if no number is given."""
        if number is None:
            number = (await self.patch(patch)).newest
        request = build(pb.GetRevisionRequest, name=f"patches/{patch}/revisions/{number}")
        return Revision.of((await self._call(self._patches.GetRevision, request)).revision)

    async def revisions(self, patch: str) -> tuple[Revision, ...]:
        """All revisions of a patch, without their edits."""
        request = build(pb.ListRevisionsRequest, parent=f"patches/{patch}")
        found = await self._pages(self._patches.ListRevisions, request, "revisions")
        return tuple(map(Revision.of, found))

    async def create_release(self, revisions: Sequence[Revision | str], notes: str = "") -> Release:
        """A release of revisions, in the order in which they apply; each may be given as PATCH:NUMBER."""
        names = [_revision_name(at, given) for at, given in enumerate(revisions)]
        request = build(pb.CreateReleaseRequest, revisions=names, notes=notes)
        return Release.of((await self._write(self._releases.CreateRelease, request)).release)

    async def release(self, number: int) -> Release:
        """One release; 0 is the model unpatched."""
        request = build(pb.GetReleaseRequest, name=f"releases/{number}")
        return Release.of((await self._call(self._releases.GetRelease, request)).release)

    async def delete_release(self, number: int) -> Release:
        """Hide a release that no channel was ever at, and refuse it from then on; its number stays taken.

        Raises PreconditionFailed (RELEASE_SERVED) for one that was served.
        """
        request = build(pb.DeleteReleaseRequest, name=f"releases/{number}")
        return Release.of((await self._write(self._releases.DeleteRelease, request)).release)

    async def releases(self, limit: int | None = None, *, deleted: bool = False) -> tuple[Release, ...]:
        """The newest releases first, the deleted ones if asked for; all of them without a limit."""
        request = build(pb.ListReleasesRequest, show_deleted=deleted)
        found = await self._pages(self._releases.ListReleases, request, "releases", limit)
        return tuple(map(Release.of, found))


def _parts(
    header: pb.UploadHeader, content: bytes | Path, sent: Callable[[int], None] | None
) -> Iterator[pb.UploadRevisionRequest]:
    yield pb.UploadRevisionRequest(header=header)
    with content.open("rb") if isinstance(content, Path) else BytesIO(content) as file:
        while chunk := file.read(CHUNK):
            yield pb.UploadRevisionRequest(chunk=chunk)
            if sent is not None:
                sent(file.tell())


def _revision_name(at: int, given: Revision | str) -> str:
    """The resource name that PATCH:NUMBER stands for. Raises InvalidRequest."""
    if isinstance(given, Revision):
        return given.name
    patch, colon, number = given.rpartition(":")
    if not (colon and patch and number.isdecimal()):
        field = f"revisions[{at}]"
        raise InvalidRequest.at(field, "BAD_NAME", f"{given!r}; write PATCH:NUMBER, such as debias:3")
    return f"patches/{patch}/revisions/{number}"
