"""Commands that call the intervention service as a tenant: patches, audit."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from backpack_lm.counted import counted
from backpack_proto.v1 import interventions_pb2 as pb
from google.protobuf import json_format
from rich.progress import DownloadColumn, Progress
from rich.text import Text

from backpack_serving.cli import hints
from backpack_serving.cli.client import (
    AsTenant,
    AsWriter,
    Key,
    as_releaser,
    err,
    exits,
    out,
    progress,
    show_markdown,
    table,
    when,
)
from backpack_serving.cli.edit_text import sense_numbers
from backpack_serving.cli.patch_file import PatchFile
from backpack_serving.client import (
    Bias,
    Cells,
    Copy,
    Edit,
    Form,
    NotFound,
    ProjectOut,
    Revision,
    Scale,
    Swap,
    Token,
    Topic,
)
from backpack_serving.client.edits import Tokens

patch_app = typer.Typer(no_args_is_help=True, help="Patches: named, versioned lists of edits.")

Senses = Annotated[str, typer.Option(help="Sense numbers, such as 3 or 8,12-14 (default: all).")]
PatchName = Annotated[str, typer.Argument(help="Name of the patch; created if it doesn't exist.")]
SHOWN_TOKENS = 12
"""Most tokens of an edit that are listed."""

Forms = Annotated[
    Form,
    typer.Option(
        "--form",
        help="“ London” within a text and “London” at the start of one are two tokens: edit both, or one of them.",
    ),
]
AnyCase = Annotated[
    bool, typer.Option("--any-case", help="Edit the words in lower case, capitalised and in capitals, too.")
]
WhichTokens = Annotated[
    Tokens,
    typer.Option(
        "--tokens",
        help="Of a word of several tokens, edit the first, the last (whose senses say most about what follows) or all; "
        "single: refuse it.",
    ),
]
Words = Annotated[list[str], typer.Argument(help="Words whose senses to edit.")]


# ---- patches


@patch_app.command("list")
def list_patches(tenant: AsTenant = "", key: Key = "") -> None:
    """List the tenant's patches, with the first line of each description (`patch describe NAME` shows all of it)."""
    with as_releaser(tenant, key) as steering:
        patches = steering.patches()
    shown = table("patch", "newest revision", "made", "description")
    for patch in patches:
        first_line = Text(patch.description.partition("\n")[0].removeprefix("# "))
        shown.add_row(patch.id, str(patch.newest), when(patch.made), first_line)
    out.print(shown)


@patch_app.command("show")
def show_revision(
    patch: Annotated[str, typer.Argument(help="Name of the patch, or PATCH:NUMBER.")],
    number: Annotated[int | None, typer.Argument(help="Number of the revision (default: the newest).", min=1)] = None,
    tenant: AsTenant = "",
    key: Key = "",
) -> None:
    """Print a revision's edits, as the JSON that `patch revise` reads."""
    if number is None and (named := re.fullmatch(r"(.+):(\d{1,9})", patch)):
        patch, number = named[1], int(named[2])
    with as_releaser(tenant, key) as steering:
        revision = steering.revision(patch, number)
    out.print_json(json.dumps([json_format.MessageToDict(edit.message()) for edit in revision.edits]))


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
    dry_run: Annotated[bool, typer.Option(help="Check the edits without storing a revision.")] = False,
    tenant: AsWriter = "",
    key: Key = "",
) -> None:
    """Add a revision of several edits, read from a file.

    What there is: `backpack patch show royal > royal.json`, then `backpack patch revise royal royal.json`
    """
    with exits():
        read = PatchFile.read(file)
    _revise(patch, read.edits, tenant, key, dry_run, read)


@patch_app.command("scale")
def scale(
    patch: PatchName,
    words: Words,
    factor: Annotated[float, typer.Option(help="0 removes the senses.")],
    senses: Senses = "",
    form: Forms = "both",
    any_case: AnyCase = False,
    tokens: WhichTokens = "single",
    tenant: AsWriter = "",
    key: Key = "",
) -> None:
    """Scale senses: v ← factor · v.

    A word says less: `backpack patch scale quiet king --factor 0.5`; two of its senses, nothing at all:
    `backpack patch scale quiet king --factor 0 --senses 3,10`
    """
    _revise(patch, [Scale(_cells_of_words(words, senses, form, any_case, tokens), factor)], tenant, key)


@patch_app.command("copy")
def copy(
    patch: PatchName,
    words: Words,
    source: Annotated[str, typer.Option("--from", help="Word whose senses to copy.")],
    senses: Senses = "",
    form: Forms = "both",
    any_case: AnyCase = False,
    tokens: WhichTokens = "single",
    tenant: AsWriter = "",
    key: Key = "",
) -> None:
    """Give words the senses of another word.

    `backpack patch copy royal king queen --from ship`
    """
    _revise(patch, [Copy(_cells_of_words(words, senses, form, any_case, tokens), source)], tenant, key)


@patch_app.command("project-out")
def project_out(
    patch: PatchName,
    words: Words,
    direction: Annotated[str, typer.Option(help="Word that the senses must neither promote nor suppress.")],
    senses: Senses = "",
    form: Forms = "both",
    any_case: AnyCase = False,
    tokens: WhichTokens = "single",
    tenant: AsWriter = "",
    key: Key = "",
) -> None:
    """Remove a word's direction from senses: v ← v − (v·r)/(r·r) r.

    `backpack patch project-out calm nurse --direction she`
    """
    _revise(patch, [ProjectOut(_cells_of_words(words, senses, form, any_case, tokens), direction)], tenant, key)


@patch_app.command("swap")
def swap(
    patch: PatchName,
    words: Words,
    old: Annotated[str, typer.Option(help="Word that the senses promote now.")],
    new: Annotated[str, typer.Option(help="Word that they must promote instead.")],
    senses: Senses = "",
    form: Forms = "both",
    any_case: AnyCase = False,
    tokens: WhichTokens = "single",
    tenant: AsWriter = "",
    key: Key = "",
) -> None:
    """Make senses promote one word instead of another (knowledge editing).

    `backpack patch swap facts ship --old sea --new land`
    """
    _revise(patch, [Swap(_cells_of_words(words, senses, form, any_case, tokens), old, new)], tenant, key)


@patch_app.command("topic")
def topic(
    patch: PatchName,
    words: Annotated[list[str], typer.Argument(help="Words of the topic.")],
    strength: Annotated[int, typer.Option(help="1, 2 or 3.", min=1, max=3)] = 1,
    constant: Annotated[
        bool, typer.Option(help="Keep steering at full strength after the topic has appeared.")
    ] = False,
    tenant: AsWriter = "",
    key: Key = "",
) -> None:
    """Steer text towards a topic.

    `backpack patch topic nautical sea ship captain sail --strength 2`
    """
    _revise(patch, [Topic(words, strength, constant)], tenant, key)


@patch_app.command("bias")
def bias(
    patch: PatchName,
    words: Annotated[list[str], typer.Argument(help="Words to make likelier or less likely.")],
    by: Annotated[
        float | None,
        typer.Option(help="Added to their logits, -100 to 100: 0.7 doubles their odds, -2.3 leaves a tenth."),
    ] = None,
    never: Annotated[bool, typer.Option("--never", help="Forbid the words.")] = False,
    form: Forms = "both",
    any_case: AnyCase = False,
    tokens: WhichTokens = "single",
    tenant: AsWriter = "",
    key: Key = "",
) -> None:
    """Raise or lower the logits of words, wherever they could come next; or forbid them.

    Said less: `backpack patch bias frugal money --by -5`; never said: `backpack patch bias frugal money --never`

    A word stands for the token with a space before it, and for the one without. Inflected forms are other words.
    """
    if never == (by is not None):
        raise typer.BadParameter("give one of --by AMOUNT and --never", param_hint="--by")
    _revise(patch, [Bias(words, -math.inf if by is None else by, tokens, form, any_case)], tenant, key)


def _cells_of_words(words: list[str], senses: str, form: Form, any_case: bool, tokens: Tokens) -> list[Cells]:
    try:
        numbers = tuple(sense_numbers(senses))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--senses") from None
    return [Cells(word, numbers, tokens, form, any_case) for word in words]


def _revise(
    patch: str,
    edits: Sequence[Edit | pb.Edit],
    tenant: str,
    key: str,
    dry_run: bool = False,
    file: PatchFile = PatchFile(()),
) -> None:
    with as_releaser(tenant, key) as steering:
        try:
            draft = steering.create_revision(patch, edits, dry_run=True)
        except NotFound as error:  # the service looks for the patch when the edits are good
            if error.reason != "NO_SUCH_PATCH":
                raise
            if dry_run:
                later = "; that it is for this model is checked then" if file.model else ""
                out.print(f"would be the first revision of a new patch, {patch}{later}")
                return
            steering.create_patch(patch, file.description, exist_ok=True)
            draft = steering.create_revision(patch, edits, dry_run=True)
        file.check(draft.model)
        revision = draft if dry_run else steering.create_revision(patch, edits)
    for given, edit in zip(edits, revision.edits, strict=True):
        if isinstance(given, Topic) and isinstance(edit, Topic):
            _tell_first_tokens(given, edit)
        else:
            tell_tokens(edit)
    _print_revision(revision, dry_run, tenant)


def _tell_first_tokens(given: Topic, made: Topic) -> None:
    """A topic takes the first token of a word, which may be anything: a space, a letter."""
    whole = {token.text.strip() for token in made.words if isinstance(token, Token)}
    if parted := [word for word in map(str, given.words) if word.strip() not in whole]:
        err.print(
            f"several tokens in this model: {', '.join(parted)}; the topic steers towards the first of each alone "
            f"({hints.backpack('patch show')}), and whatever else begins with it. Leave out what isn't meant.",
            markup=False,
        )


def tell_tokens(made: Edit) -> None:
    """Print the tokens that an edit reaches: a word in another form, or in pieces, is other tokens."""
    if isinstance(made, Bias):
        words = [word for word in made.words if isinstance(word, Token)]
        what = "never" if made.amount == -math.inf else f"{made.amount:+g} to"
    else:
        cells = getattr(made, "cells", ())
        words = [one.word for one in cells if isinstance(one, Cells) and isinstance(one.word, Token)]
        what = "tokens"
    shown = [repr(word.text) for word in words[:SHOWN_TOKENS]] + ["…"] * (len(words) > SHOWN_TOKENS)
    if shown:
        err.print(f"{what}: {', '.join(shown)}", markup=False)


def _print_revision(revision: Revision, dry_run: bool, tenant: str) -> None:
    out.print(f"{'would be ' if dry_run else ''}{revision.name}  [dim]{revision.digest[:12]}[/]")
    if not dry_run:
        out.print(f"[dim]put it into a release: {hints.again(f'release create {revision.id}', tenant)}[/]")


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
    replace: Annotated[bool, typer.Option("--set", help="Replace the vectors instead of adding to them.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Check the file without storing a revision.")] = False,
    tenant: AsWriter = "",
    key: Key = "",
) -> None:
    """Add a revision from a file with a vector for each cell, such as finetuning learns."""
    with as_releaser(tenant, key) as steering:
        columns = (*Progress.get_default_columns(), DownloadColumn())
        with progress(*columns) as shown:
            bar = shown.add_task(file.name, total=file.stat().st_size)

            def show(sent: int) -> None:
                shown.update(bar, completed=sent)

            def send(dry_run: bool) -> Revision:
                return steering.upload_revision(patch, file, replace=replace, dry_run=dry_run, sent=show)

            try:
                revision = send(dry_run)
            except NotFound as error:
                if error.reason != "NO_SUCH_PATCH":
                    raise
                if dry_run:  # the service looks for the patch of a draft when its content is good
                    out.print(f"would be the first revision of a new patch, {patch}")
                    return
                with suppress(NotFound):
                    send(True)
                steering.create_patch(patch, exist_ok=True)
                revision = send(False)
    _print_revision(revision, dry_run, tenant)


@patch_app.command("describe")
def describe(
    patch: Annotated[str, typer.Argument(help="Name of the patch.")],
    text: Annotated[
        str | None, typer.Argument(help="The new description; without it, the current one is shown.")
    ] = None,
    tenant: AsWriter = "",
    key: Key = "",
) -> None:
    """Show a patch's description, or change it."""
    with as_releaser(tenant, key) as steering:
        if text is None:
            show_markdown(steering.patch(patch).description)
        else:
            out.print(steering.describe_patch(patch, text).name)


@patch_app.command("delete")
def delete(
    patch: Annotated[str, typer.Argument(help="Name of the patch.")],
    tenant: AsWriter = "",
    key: Key = "",
) -> None:
    """Delete a patch. Releases keep its revisions; the name can't be used again."""
    with as_releaser(tenant, key) as steering:
        out.print(f"{steering.delete_patch(patch).name} is deleted")


# ---- audit


def audit(
    limit: Annotated[int, typer.Option(help="Number of entries to show.", min=1)] = 20,
    tenant: AsTenant = "",
    key: Key = "",
) -> None:
    """List who changed what, newest first, and verify the hash chain of the audit trail."""
    with as_releaser(tenant, key) as steering:
        entries, chain = steering.audit(limit), steering.verify_audit()
    shown = table("at", "time", "who", "did", "to", "what was known of the release")
    for entry in entries:
        # A token's or a certificate's name may hold what would be markup.
        to = Text(entry.resource)
        shown.add_row(str(entry.revision), when(entry.time), Text(entry.who), entry.method, to, entry.judgement)
    out.print(shown)
    state = "intact" if chain.intact else f"[red]broken at {chain.first_broken}[/]"
    out.print(f"[dim]chain of {counted(chain.entries, 'entry', 'entries')}:[/] {state}")
