"""Commands that call the intervention service as a tenant: patches, audit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from backpack_proto.v1 import inference_pb2, interventions_pb2
from backpack_proto.v1.inference_pb2 import Word
from google.protobuf import json_format
from rich.markdown import Markdown
from rich.progress import DownloadColumn, Progress
from rich.text import Text

from backpack_serving import rpc
from backpack_serving.cli.client import AsTenant, Client, Key, as_caller, exits, new_id, out, table, when
from backpack_serving.cli.patch_file import PatchFile
from backpack_serving.errors import NotFound

pb = interventions_pb2

patch_app = typer.Typer(no_args_is_help=True, help="Patches: named, versioned lists of edits to sense vectors.")

Senses = Annotated[str, typer.Option(help="Sense numbers, such as 3 or 8,12-14; all of them if none.")]
PatchName = Annotated[str, typer.Argument(help="Name of the patch; it is made if it isn't there.")]
Words = Annotated[list[str], typer.Argument(help="Words whose senses are edited.")]


# ---- patches


@patch_app.command("list")
def list_patches(tenant: AsTenant = "harbour", key: Key = "") -> None:
    """The tenant's patches. A description's first line is shown; all of it: `backpack patch describe NAME`."""
    with as_caller(tenant, key) as client:
        answer = client.patches.ListPatches(pb.ListPatchesRequest(page_size=1000), metadata=client.metadata)
    shown = table("patch", "newest revision", "made", "description")
    for p in answer.patches:
        first_line = Text(p.description.partition("\n")[0].removeprefix("# "))
        shown.add_row(p.name.rpartition("/")[2], str(p.latest_revision), when(p.create_time), first_line)
    out.print(shown)


@patch_app.command("show")
def show_revision(
    patch: Annotated[str, typer.Argument(help="Name of the patch.")],
    number: Annotated[
        int | None, typer.Argument(help="Number of the revision; the newest if none.", min=1)
    ] = None,
    tenant: AsTenant = "harbour",
    key: Key = "",
) -> None:
    """A revision's edits, as the JSON that `patch revise` reads."""
    with as_caller(tenant, key) as client:
        if number is None:
            known = client.patches.GetPatch(pb.GetPatchRequest(name=f"patches/{patch}"), metadata=client.metadata)
            number = known.patch.latest_revision
        request = pb.GetRevisionRequest(name=f"patches/{patch}/revisions/{number}")
        revision = client.patches.GetRevision(request, metadata=client.metadata).revision
    edits = [json_format.MessageToDict(edit) for edit in revision.edits]
    out.print_json(json.dumps(edits))


@patch_app.command("revise")
def revise(
    patch: PatchName,
    file: Annotated[
        Path,
        typer.Argument(
            help="Patch file: of `backpack lab`, or the list that `patch show` prints.",
            exists=True,
            dir_okay=False,
        ),
    ],
    dry_run: Annotated[bool, typer.Option(help="Check the edits, store no revision.")] = False,
    tenant: AsTenant = "harbour",
    key: Key = "",
) -> None:
    """Add a revision of several edits, read from a file.

    What there is: `backpack patch show royal > royal.json`, then `backpack patch revise royal royal.json`
    """
    with exits():
        read = PatchFile.read(file)
    _revise(patch, list(read.edits), tenant, key, dry_run, read)


@patch_app.command("scale")
def scale(
    patch: PatchName,
    words: Words,
    factor: Annotated[float, typer.Option(help="0 removes the senses.")],
    senses: Senses = "",
    tenant: AsTenant = "harbour",
    key: Key = "",
) -> None:
    """Scale senses: v ← factor · v.

    A word says less: `backpack patch scale quiet king --factor 0.5`; two of its senses, nothing at all:
    `backpack patch scale quiet king --factor 0 --senses 3,10`
    """
    _revise(patch, [pb.Edit(scale=pb.ScaleEdit(cells=_cells(words, senses), factor=factor))], tenant, key)


@patch_app.command("copy")
def copy(
    patch: PatchName,
    words: Words,
    source: Annotated[str, typer.Option("--from", help="Word whose senses are copied.")],
    senses: Senses = "",
    tenant: AsTenant = "harbour",
    key: Key = "",
) -> None:
    """Give words the senses of another word.

    `backpack patch copy royal king queen --from ship`
    """
    edit = pb.CopyEdit(cells=_cells(words, senses), source=Word(text=source))
    _revise(patch, [pb.Edit(copy=edit)], tenant, key)


@patch_app.command("project-out")
def project_out(
    patch: PatchName,
    words: Words,
    direction: Annotated[str, typer.Option(help="Word that the senses shall not speak for or against.")],
    senses: Senses = "",
    tenant: AsTenant = "harbour",
    key: Key = "",
) -> None:
    """Remove what senses say of a word: v ← v − (v·r)/(r·r) r.

    `backpack patch project-out calm nurse --direction she`
    """
    edit = pb.ProjectOutEdit(cells=_cells(words, senses), direction=Word(text=direction))
    _revise(patch, [pb.Edit(project_out=edit)], tenant, key)


@patch_app.command("swap")
def swap(
    patch: PatchName,
    words: Words,
    old: Annotated[str, typer.Option(help="Word that the senses speak for.")],
    new: Annotated[str, typer.Option(help="Word that they shall speak for instead.")],
    senses: Senses = "",
    tenant: AsTenant = "harbour",
    key: Key = "",
) -> None:
    """Let senses say of one word what they said of another (knowledge editing).

    `backpack patch swap facts ship --old sea --new land`
    """
    edit = pb.SwapEdit(cells=_cells(words, senses), old=Word(text=old), new=Word(text=new))
    _revise(patch, [pb.Edit(swap=edit)], tenant, key)


@patch_app.command("topic")
def topic(
    patch: PatchName,
    words: Annotated[list[str], typer.Argument(help="Words of the topic.")],
    strength: Annotated[int, typer.Option(help="1, 2 or 3.", min=1, max=3)] = 1,
    constant: Annotated[bool, typer.Option(help="Don't fade as the topic appears.")] = False,
    tenant: AsTenant = "harbour",
    key: Key = "",
) -> None:
    """Lean towards a topic.

    `backpack patch topic nautical sea ship captain sail --strength 2`
    """
    edit = pb.TopicEdit(words=[Word(text=w) for w in words], strength=strength, constant=constant)
    _revise(patch, [pb.Edit(topic=edit)], tenant, key)


def sense_numbers(senses: str) -> list[int]:
    """The numbers of 3 or 8,12-14; none for all."""
    numbers: list[int] = []
    for part in filter(None, senses.split(",")):
        first, _, last = part.partition("-")
        if not (first.isdigit() and (last or first).isdigit()) or int(last or first) < int(first):
            raise typer.BadParameter(f"{part!r} names no sense; write 3 or 8,12-14", param_hint="--senses")
        numbers.extend(range(int(first), int(last or first) + 1))
    return numbers


def _cells(words: list[str], senses: str) -> list[pb.Cells]:
    numbers = sense_numbers(senses)
    policy = inference_pb2.WORD_POLICY_SINGLE
    return [pb.Cells(word=Word(text=word, policy=policy), senses=numbers) for word in words]


def _revise(
    patch: str,
    edits: list[pb.Edit],
    tenant: str,
    key: str,
    dry_run: bool = False,
    file: PatchFile = PatchFile(()),
) -> None:
    def create(validate_only: bool) -> pb.Revision:
        request = pb.CreateRevisionRequest(
            parent=f"patches/{patch}",
            edits=edits,
            request_id="" if validate_only else new_id(),
            validate_only=validate_only,
        )
        with rpc.errors():
            made: pb.Revision = client.patches.CreateRevision(request, metadata=client.metadata).revision
            return made

    with as_caller(tenant, key) as client:
        try:
            draft = create(True)
        except NotFound:  # the service looks for the patch when the edits are good
            if dry_run:
                later = "; that it is for this model is checked then" if file.model else ""
                out.print(f"would be the first revision of a new patch, {patch}{later}")
                return
            _provide(client, patch, file.description)
            draft = create(True)
        file.check(draft.model_fingerprint)
        revision = draft if dry_run else create(False)
    _show(revision, dry_run)


def _provide(client: Client, patch: str, description: str = "") -> None:
    """Make the patch, unless it is there."""
    try:
        with rpc.errors():
            client.patches.GetPatch(pb.GetPatchRequest(name=f"patches/{patch}"), metadata=client.metadata)
    except NotFound:
        request = pb.CreatePatchRequest(patch_id=patch, description=description, request_id=new_id())
        client.patches.CreatePatch(request, metadata=client.metadata)


def _show(revision: pb.Revision, dry_run: bool) -> None:
    _, _, _, patch, _, number = revision.name.split("/")
    out.print(f"{'would be ' if dry_run else ''}{revision.name}  [dim]{revision.digest[:12]}[/]")
    if not dry_run:
        out.print(f"[dim]put it into a release: backpack release create {patch}:{number}[/]")


@patch_app.command("upload")
def upload(
    patch: PatchName,
    file: Annotated[
        Path,
        typer.Argument(
            help="A safetensors file: `tokens` and `senses` [n] of I32 or I64, `vectors` [n, d] of F32 or F16.",
            exists=True,
            dir_okay=False,
        ),
    ],
    replace: Annotated[bool, typer.Option("--set", help="Set the vectors, instead of adding them.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Check the file, store no revision.")] = False,
    tenant: AsTenant = "harbour",
    key: Key = "",
) -> None:
    """Make a revision that gives each of many cells a vector of its own, such as finetuning learns."""
    header = pb.UploadHeader(
        parent=f"patches/{patch}",
        kind=pb.EDIT_KIND_SET if replace else pb.EDIT_KIND_ADD,
        safetensors=pb.SafetensorsFormat(),
        size=file.stat().st_size,
        validate_only=dry_run,
        request_id=new_id(),
    )
    with as_caller(tenant, key) as client:
        _provide(client, patch)
        with Progress(*Progress.get_default_columns(), DownloadColumn(), console=out, transient=True) as progress:
            bar = progress.add_task(file.name, total=header.size)
            parts = _parts(header, file, lambda size: progress.advance(bar, size))
            revision = client.patches.UploadRevision(parts, metadata=client.metadata).revision
    _show(revision, dry_run)


def _parts(header: pb.UploadHeader, file: Path, sent: Callable[[int], None]) -> Iterator[pb.UploadRevisionRequest]:
    yield pb.UploadRevisionRequest(header=header)
    with file.open("rb") as content:
        while chunk := content.read(2**20):
            yield pb.UploadRevisionRequest(chunk=chunk)
            sent(len(chunk))


@patch_app.command("describe")
def describe(
    patch: Annotated[str, typer.Argument(help="Name of the patch.")],
    text: Annotated[str | None, typer.Argument(help="What it is for; what is known is shown if none.")] = None,
    tenant: AsTenant = "harbour",
    key: Key = "",
) -> None:
    """Show a patch's description, or change it."""
    with as_caller(tenant, key) as client:
        if text is None:
            known = client.patches.GetPatch(pb.GetPatchRequest(name=f"patches/{patch}"), metadata=client.metadata)
            out.print(Markdown(known.patch.description), soft_wrap=False)
            return
        request = pb.UpdatePatchRequest(
            patch=pb.Patch(name=f"patches/{patch}", description=text), request_id=new_id()
        )
        out.print(client.patches.UpdatePatch(request, metadata=client.metadata).patch.name)


@patch_app.command("delete")
def delete(
    patch: Annotated[str, typer.Argument(help="Name of the patch.")],
    tenant: AsTenant = "harbour",
    key: Key = "",
) -> None:
    """Hide a patch. Releases that have revisions of it keep them; the name stays taken."""
    with as_caller(tenant, key) as client:
        request = pb.DeletePatchRequest(name=f"patches/{patch}", request_id=new_id())
        out.print(f"{client.patches.DeletePatch(request, metadata=client.metadata).patch.name} is deleted")


# ---- audit


def audit(
    limit: Annotated[int, typer.Option(help="How many entries.", min=1, max=1000)] = 20,
    tenant: AsTenant = "harbour",
    key: Key = "",
) -> None:
    """Who changed what, newest first, and whether the chain of hashes is whole."""
    with as_caller(tenant, key) as client:
        entries = client.audit.ListAuditEntries(
            pb.ListAuditEntriesRequest(page_size=limit), metadata=client.metadata
        ).entries
        chain = client.audit.VerifyChain(pb.VerifyChainRequest(), metadata=client.metadata)
    shown = table("at", "time", "who", "did", "to")
    for e in entries:
        shown.add_row(str(e.revision), when(e.time), e.principal, e.method, e.resource)
    out.print(shown)
    state = "intact" if chain.intact else f"[red]broken at {chain.first_broken}[/]"
    out.print(f"[dim]chain of {chain.entries} entries:[/] {state}")
