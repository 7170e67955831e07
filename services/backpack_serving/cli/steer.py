"""`backpack try` and `backpack steer`: edits shown before they are stored, then stored and released in one command."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from backpack_lm import strict_json
from backpack_proto.v1 import interventions_pb2 as pb
from rich.table import Table
from rich.text import Text

from backpack_serving.cli import hints
from backpack_serving.cli.client import (
    AsTenant,
    AsWriter,
    CalledChannel,
    Key,
    ReleaseNumber,
    as_caller,
    as_releaser,
    err,
    exits,
    out,
    percent,
)
from backpack_serving.cli.control import AnyCase, Forms, WhichTokens, tell_tokens
from backpack_serving.cli.edit_text import parse_edit
from backpack_serving.cli.find import target_words
from backpack_serving.cli.judging import ask_if_worse, judge_stored, show_judgement
from backpack_serving.cli.patch_file import PatchFile
from backpack_serving.cli.releases import Timeout, Waiting, Yes, print_move
from backpack_serving.client import Channel as ChannelNow
from backpack_serving.client import (
    Conflict,
    Draft,
    Edit,
    Form,
    Generation,
    InvalidRequest,
    Move,
    NotFound,
    Prediction,
    Revision,
    Sampling,
    Steering,
    Token,
)
from backpack_serving.client.edits import Tokens
from backpack_serving.errors import no_canary
from backpack_serving.references import CANARY
from backpack_serving.wire.edit_json import parse_edit_json

EditTexts = Annotated[
    list[str] | None,
    typer.Option(
        "--edit",
        help="An edit, such as 'scale nurse:7 0', 'copy king,queen ship', 'swap nurse she he', 'project-out nurse "
        "she', 'bias money -5', 'forbid money' or 'topic sea,ship 2'; repeatable. Words have commas between them, "
        "senses follow a colon (3 or 8,12-14); #11 is the token with the id 11 (`backpack tokenize`). An edit of a "
        "patch file, in JSON, will do too.",
    ),
]
PatchFiles = Annotated[
    list[Path] | None,
    typer.Option("--patch", help="A patch file, as `backpack lab` writes it; repeatable.", exists=True, dir_okay=False),
]


def try_edits(
    prompt: Annotated[str, typer.Argument(help="Text to continue, without the edits and with them.")],
    edit: EditTexts = None,
    patch: PatchFiles = None,
    form: Forms = "both",
    any_case: AnyCase = False,
    tokens: WhichTokens = "single",
    target: Annotated[
        list[str] | None, typer.Option(help="Word whose probability after the prompt to show; repeatable.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most new tokens.", min=1)] = 48,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy (default: the model's).", min=0.0)] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Make tokens of the prompt and the text less likely; 1 for none.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Both texts are drawn with it.", min=0)] = 0,
    judge: Annotated[bool, typer.Option(help="Measure what the edits do to ordinary text.")] = True,
    tenant: AsTenant = "",
    key: Key = "",
    channel: CalledChannel = "live",
    release: ReleaseNumber = None,
) -> None:
    """Show what edits would do, over the tenant's release, and store nothing.

    `backpack try "The nurse said that" --edit 'swap nurse she he' --target he`

    Of a patch file, over the model as it is: `backpack try "The nurse said that" --patch debias.json --release 0`
    """
    with exits():
        edits = _read_edits(edit, patch, form, any_case, tokens)
    sampling = Sampling(max_tokens, temperature, seed=seed, repetition_penalty=repetition_penalty)
    over = channel if release is None else release
    with as_caller(tenant, key) as client:
        tried = client.generate(prompt, sampling, channel=channel, release=release, draft=edits)
        # A channel may move meanwhile: both columns are of the release that the draft was tried over.
        base = tried.served.release
        plain = client.generate(prompt, sampling, release=base)
        found = client.compare(prompt, [base, Draft(edits, base)], top=5, targets=target_words(client, target or ()))
        out.print(_side_by_side(prompt, plain, tried, found))
        if judge:
            show_judgement(client, base, edits)
    err.print(f"[dim]over {_tried_over(over, base)} of {tried.served.tenant}; nothing is stored[/]")
    if edit and not patch and release is None:
        words = " ".join(map(shlex.quote, edit))
        how = ("" if form == "both" else f" --form {form}") + (" --any-case" if any_case else "")
        how += "" if tokens == "single" else f" --tokens {tokens}"
        how += "" if channel.endswith(CANARY) else " --activate"  # a canary is moved by other commands
        err.print(Text(f"keep it: {hints.again(f'steer NAME {words}{how}', tenant, channel)}", "dim"))


def steer(
    name: Annotated[str, typer.Argument(help="Name of the patch; created if it doesn't exist.")],
    edit: Annotated[
        list[str] | None, typer.Argument(metavar="[EDIT]...", help="Edits, as `backpack try --edit` takes them.")
    ] = None,
    patch: PatchFiles = None,
    form: Forms = "both",
    any_case: AnyCase = False,
    tokens: WhichTokens = "single",
    alone: Annotated[
        bool, typer.Option("--alone", help="Release this patch alone, without the others of the channel's release.")
    ] = False,
    activate: Annotated[bool, typer.Option("--activate", help="Point the channel at the new release.")] = False,
    yes: Yes = False,
    notes: Annotated[str, typer.Option(help="What the release is for.")] = "",
    channel: CalledChannel = "live",
    wait: Waiting = "none",
    timeout: Timeout = 10.0,
    tenant: AsWriter = "",
    key: Key = "",
) -> None:
    """Make a revision of a patch from edits, and a release of it, in one command.

    The release has the other patches of the channel's release, too: `backpack steer nurses 'swap nurse she he'
    --activate`; for --channel NAME:canary those of its canary. Given again with other edits, the new revision takes the
    place of the old one; with the same, nothing is made anew.
    """
    with exits():
        edits = _read_edits(edit, patch, form, any_case, tokens)
    with as_releaser(tenant, key) as steering:
        # Whatever is refused is refused before anything is stored.
        named = channel.removesuffix(CANARY)
        now = _channel_now(steering, named)
        if named != channel and not (now and now.canary):
            raise no_canary(f"the channel {named}")
        if now and now.canary and activate:
            raise ValueError(
                f"{now.name} has release {now.canary.release} as its canary, which this would end; promote or abort it "
                "first, or leave out --activate"
            )
        base = (now.canary.release if now.canary and named != channel else now.release) if now else 0
        before = steering.release(base).revisions if base else ()
        own = [revision for revision in before if _patch_of(revision) == name]
        others = [] if alone else [revision for revision in before if revision not in own]
        _check_patches(steering, others)
        draft = _draft(steering, name, edits)
        if draft is None:
            steering.create_patch(name, notes, exist_ok=True)
        stored = _revision_with(steering, name, draft, own) if draft else None
        revision = stored or steering.create_revision(name, edits)
        for made in revision.edits:
            tell_tokens(made)
        if now and {*before} == {*others, revision.id}:
            here = f"{now.name}{channel.removeprefix(named)} is at release {base}, of {' '.join(before)}"
            out.print(f"{here}: these edits; nothing is made anew")
            return
        if stored:
            err.print(f"[dim]{revision.id} has these edits already[/]")
        if replaced := [each for each in own if each != revision.id]:
            err.print(f"{revision.id} takes the place of {', '.join(replaced)}")
        release = steering.create_release([*others, revision], notes)
        out.print(f"{release.name} of {' '.join(release.revisions)}  [dim]{release.digest[:12]}[/]")
    if not activate:
        judge_stored(tenant, key, release.number, insist=True)
        err.print(f"[dim]let it steer: {hints.again(f'release activate {release.number}', tenant, named)}[/]")
        return
    judge_stored(tenant, key, release.number, insist=yes)
    with as_releaser(tenant, key) as steering:

        def activated(allowed: bool) -> Move:
            etag, how = now.etag if now else "", (release.number, channel)
            return steering.activate(*how, allow_degradation=allowed, etag=etag, wait=wait, wait_seconds=timeout)

        try:
            move = ask_if_worse(activated, yes)
        except (Conflict, InvalidRequest) as error:
            if error.reason not in ("STALE_ETAG", "MISSING_ETAG"):
                raise
            raise ValueError(
                f"the channel {channel} was moved meanwhile, and release {release.number} may lack what it is at now: "
                "run this again"
            ) from None
    if now:
        err.print(f"[dim]undo it: {hints.again('release rollback', tenant, channel)}[/]")
    print_move(move, tenant)


def _read_edits(
    texts: Sequence[str] | None, files: Sequence[Path] | None, form: Form, any_case: bool, tokens: Tokens
) -> list[Edit | pb.Edit]:
    """Those of texts, in these forms of their words, and of files. Raises ValueError for what is neither, or if there
    is none.
    """
    edits = [_read_edit(text, form, any_case, tokens) for text in texts or ()]
    for file in files or ():
        edits += PatchFile.read(file).edits
    if not edits:
        raise ValueError("no edits: give some, such as 'scale nurse:7 0', or a patch file with --patch")
    return edits


def _read_edit(text: str, form: Form, any_case: bool, tokens: Tokens) -> Edit | pb.Edit:
    """A line, or one edit of a patch file, whose words say themselves which tokens they are. Raises ValueError."""
    if not text.lstrip().startswith("{"):
        return parse_edit(text, form, any_case, tokens)
    try:
        return parse_edit_json(strict_json.parse(text))
    except ValueError as error:
        raise ValueError(f"{text!r} is no edit: {error}") from None


def _draft(steering: Steering, name: str, edits: Sequence[Edit | pb.Edit]) -> Revision | None:
    """The revision of a patch that edits would be; None if there is no such patch. Raises InvalidRequest if it couldn't
    have them.
    """
    try:
        return steering.create_revision(name, edits, dry_run=True)
    except NotFound as error:
        if error.reason != "NO_SUCH_PATCH":
            raise
        return None


def _revision_with(steering: Steering, name: str, draft: Revision, released: Sequence[str]) -> Revision | None:
    """The revision with a draft's edits, if one of those that are released has them, or the patch's newest."""
    numbers = [*(int(revision.rpartition(":")[2]) for revision in released), draft.number - 1]
    found = (steering.revision(name, number) for number in dict.fromkeys(numbers) if number)
    return next((revision for revision in found if revision.digest == draft.digest), None)


def _channel_now(steering: Steering, channel: str) -> ChannelNow | None:
    try:
        return steering.channel(channel)
    except NotFound:
        return None


def _patch_of(revision: str) -> str:
    """Of PATCH:NUMBER."""
    return revision.rpartition(":")[0]


def _check_patches(steering: Steering, revisions: Sequence[str]) -> None:
    """Raises ValueError for a revision of a deleted patch: no new release can have it."""
    deleted = {patch.id for patch in steering.patches(deleted=True) if patch.deleted}
    if gone := [revision for revision in revisions if _patch_of(revision) in deleted]:
        raise ValueError(
            f"the channel's release has {', '.join(gone)}, whose patch is deleted, so no new release can have it; "
            "--alone releases this patch without the others"
        )


def _side_by_side(prompt: str, plain: Generation, tried: Generation, found: Sequence[Prediction]) -> Table:
    """Both texts, and below each what was likeliest next."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for name in ("without", "with the edits"):
        table.add_column(name, ratio=1, overflow="fold")
    table.width = min(out.width, 120)  # readable in a log, too
    table.add_row(*(Text(prompt, "dim") + Text(made.text) for made in (plain, tried)))
    for at in range(len(found[0].targets)):
        table.add_row(*(Text(_chance(one.targets[at])) for one in found))
    table.add_row(*(Text("likeliest next: " + "  ".join(map(_chance, one.top)), "dim") for one in found))
    return table


def _chance(token: Token) -> str:
    return f"{token.text!r} {percent(token)}"


def _tried_over(over: int | str, number: int) -> str:
    return f"{over}, release {number}" if isinstance(over, str) else f"release {number}"
