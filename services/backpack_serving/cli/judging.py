"""What a release does to ordinary text: shown before it steers, and asked about where that got much worse."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import typer
from backpack_lm.counted import counted
from backpack_proto.v1 import interventions_pb2 as pb
from rich.text import Text

from backpack_serving.cli.client import as_caller, err
from backpack_serving.client import (
    Client,
    Edit,
    Exhausted,
    Expired,
    Forbidden,
    Judgement,
    Move,
    PreconditionFailed,
    ServiceError,
    Unavailable,
)
from backpack_serving.settings import Settings

SHOWN = 4
"""Words that move most."""

WORTH_SHOWING = 5e-4
"""Least change of a word's mean probability that is shown."""

HUGE = 9.0
"""A change from which on no percentage is shown."""

PATIENCE = 30.0
"""Seconds to wait for a judgement: the first one that needs topic scores may take minutes."""


def show_judgement(client: Client, release: int, draft: Sequence[Edit | pb.Edit] | None = None) -> Judgement | None:
    """Print what a release, with a draft over it, does to ordinary text; or why that can't be known now, and None.

    Raises ServiceError if the release can't be served.
    """
    try:
        with err.status("judging"):  # a replica that is asked for the first time reads the text first
            found = client.judge(SHOWN, release=release, draft=draft, timeout=PATIENCE)
    except (Exhausted, Expired, Forbidden, PreconditionFailed, Unavailable) as error:
        if isinstance(error, PreconditionFailed) and error.reason != "NO_HELD_OUT_TEXT":
            raise
        err.print(Text(f"not judged: {' '.join(error.message.split())}", "dim"))
        return None
    err.print(_judgement_text(found))
    return found


def judge_stored(tenant: str, key: str, release: int, insist: bool = False) -> Judgement | None:
    """The same of a stored release; of the model unpatched, nothing. With `insist`, of one that can't be served only
    the reason is printed.
    """
    if not release:
        return None
    with as_caller(tenant, key) as client:
        try:
            return show_judgement(client, release)
        except ServiceError as error:
            if not insist:
                raise
            err.print(Text(f"{error.reason}: {' '.join(error.message.split())}", "yellow"))
    return None


def ask_if_worse(move: Callable[[bool], Move], yes: bool) -> Move:
    """Move a channel by `move`, which is told whether ordinary text may get much worse. If the service refuses that
    (DEGRADES), ask; off a terminal, and if the answer is no, exit with status 1.
    """
    try:
        return move(yes)
    except PreconditionFailed as error:
        if error.reason != "DEGRADES":
            raise
        err.print(Text(error.message, "yellow"))
    if not sys.stdin.isatty():
        err.print("not activated; --yes activates it all the same")
        raise typer.Exit(1)
    if not typer.confirm("activate it all the same?", err=True):
        raise typer.Exit(1)
    return move(True)


def _judgement_text(found: Judgement) -> Text:
    worse = found.change > Settings().degradation
    parts = (found.cells, "cell"), (found.topics, "topic"), (found.biased, "biased token")
    what = [counted(number, noun) for number, noun in parts if number] or ["no edit"]
    words = [word for word in found.moved[:SHOWN] if abs(word.after - word.before) >= WORTH_SHOWING]
    moved = ", ".join(f"{word.token.text.strip()!r} {word.after - word.before:+.2%}" for word in words)
    change = f"{round(found.change, 3) + 0.0:+.1%}" if found.change < HUGE else f"more than {HUGE + 1:g} times as much"
    return Text.assemble(
        (f"{', '.join(what)}; ordinary text: perplexity {_short(found.before)} → {_short(found.after)} ", ""),
        (f"({change})", "yellow" if worse else "green"),
        (f"; moved most: {moved}" if moved else "; no word's probability changes by 0.05 %", "dim"),
    )


def _short(perplexity: float) -> str:
    return f"{perplexity:.2f}" if perplexity < 1e6 else f"{perplexity:.1e}"
