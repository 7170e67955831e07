"""Shared by commands that call a server: connections, keys, console output and error messages."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from io import TextIOWrapper
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from backpack_lm.visible import pieces, visible
from pydantic import ValidationError
from rich.columns import Columns
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Span, Text

from backpack_serving.cli import hints
from backpack_serving.cli.target import EXAMPLE, CallTarget, context_in_use
from backpack_serving.errors import ServiceError, Unauthenticated, Unavailable
from backpack_serving.install import install_command
from backpack_serving.references import CANARY, NAME, NAME_WRITTEN
from backpack_serving.settings import Settings, secretless

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

    from backpack_serving.client import Client, Operator, Served, Steering, Token

EXTRAS = {
    "torch": "engine",
    "numpy": "engine",
    "llguidance": "engine",
    "scipy": "lab",
    "matplotlib": "lab",
    "transformers": "lab",
}
"""Optional libraries, and the extra that installs each."""

UNREACHED = 1.0
"""Seconds for which a command retries an address that has never answered."""


class Screen(Console):
    """A console that escapes control characters on a terminal (`visible`).

    Descriptions, notes and generated texts come from others: they could move the cursor, fill the clipboard or
    reverse a line. A pipe or a file gets them unchanged.
    """

    def print(self, *objects: Any, **how: Any) -> None:
        try:
            super().print(*objects, **how)
        except OSError as error:
            if self.stderr:
                raise
            _exit_with_error(f"what this command says can't be written: {error.strerror}")

    def verbatim(self, text: str, style: str = "", end: str = "") -> None:
        """Print a text of others. A pipe or a file gets every byte: `Text` would drop some characters, and tabs."""
        if self.is_terminal:
            self.print(Text(visible(text), style), end=end, soft_wrap=True)
            return
        try:
            self.file.write(text + end)
            self.file.flush()
        except OSError as error:
            _exit_with_error(f"what this command says can't be written: {error.strerror}")

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        if not self.is_terminal:
            yield from super().render(renderable, options)
            return
        # Escape before layout, as escapes are wider; other renderables are escaped after it.
        for segment in super().render(_seen(renderable), options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))


def _seen(renderable: Any) -> Any:
    """A renderable with its texts escaped by `visible`."""
    match renderable:
        case str():
            return visible(renderable)
        case Text() if not renderable.plain.isprintable():
            shown = pieces(renderable.plain)
            at = [0, *accumulate(map(len, shown))]
            seen = renderable.blank_copy("".join(shown))
            seen.spans = [Span(at[s.start], at[min(s.end, len(shown))], s.style) for s in renderable.spans]
            return seen
        case Table():
            renderable.title = _seen(renderable.title)
            for column in renderable.columns:
                column.header, column._cells = _seen(column.header), [_seen(cell) for cell in column._cells]
        case Columns():
            renderable.renderables = [_seen(one) for one in renderable.renderables]
    return renderable


out = Screen(highlight=False, soft_wrap=True)  # no line breaks: users copy keys and names
err = Screen(stderr=True, highlight=False, soft_wrap=True)
if not out.is_terminal and "COLUMNS" not in os.environ:
    out.width = 10_000  # no folded columns: programs look for whole names
if isinstance(sys.stdout, TextIOWrapper):
    sys.stdout.reconfigure(errors="replace")  # prints ? for a character that the terminal's encoding lacks


def _tenant_called(context: typer.Context, tenant: str) -> str:
    """The tenant that a command calls as: the one that is named, else the context's, else the example."""
    if tenant or context.resilient_parsing:
        return tenant
    with exits():
        chosen = context_in_use(context.params.get("key") or "")
    return chosen[1].tenant if chosen else EXAMPLE


def _tenant_changed(context: typer.Context, tenant: str) -> str:
    """The tenant that a command changes: the one that is named, else the context's, which is told; it isn't guessed."""
    if tenant or context.params.get("key") or context.resilient_parsing:
        return tenant
    with exits():
        chosen = context_in_use()
    if not chosen:
        return ""
    err.print(f"[dim]as {chosen[1].tenant}, by the context {chosen[0]}[/]")
    return chosen[1].tenant


AsTenant = Annotated[
    str,
    typer.Option(
        "--as",
        metavar="TENANT",
        envvar="BACKPACK_TENANT",
        help="Call as this tenant, with the context's key if it is the context's, else with its key from the state "
        f"folder of `run` (default: the context's tenant, without a context {EXAMPLE}).",
        show_default=False,
        callback=_tenant_called,
    ),
]
AsWriter = Annotated[
    str,
    typer.Option(
        "--as",
        metavar="TENANT",
        envvar="BACKPACK_TENANT",
        help="Tenant to change, with the context's key if it is the context's, else with its key from the state folder "
        "of `run`. It is never guessed (default: the context's tenant).",
        show_default=False,
        callback=_tenant_changed,
    ),
]
Key = Annotated[
    str,
    typer.Option(envvar="BACKPACK_KEY", help="API key, instead of --as.", show_default=False, is_eager=True),
]


def in_a_folder(file: Path | None) -> Path | None:
    """Check that an output file can be written, before the command's work. Raises BadParameter."""
    if file is None:
        return None
    if not file.parent.is_dir():
        raise typer.BadParameter(f"{file.parent} is no folder; make it first")
    can_be_made(file.parent)
    return file


def can_be_made(folder: Path) -> Path:
    """Check that an output folder exists or can be made. Raises BadParameter."""
    there = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise typer.BadParameter(f"{there} is no folder that can be written to")
    return folder


Page = Annotated[
    Path | None,
    typer.Option("--html", help="Also write an HTML page to this file.", callback=in_a_folder, dir_okay=False),
]


def _check_channel(context: typer.Context, channel: str) -> str:
    """Check a channel before the command stores anything. Raises BadParameter."""
    if not NAME.fullmatch(channel):
        raise typer.BadParameter(f"{channel!r} names no channel; {NAME_WRITTEN}")
    return str(_channel_or_release(context, channel))


def _channel_or_release(context: typer.Context, value: Any) -> Any:
    """Check that a command isn't given both a channel and a release: each names a release. Raises BadParameter."""
    sources = (context.get_parameter_source(name) for name in ("channel", "release"))
    if all(source is not None and source.name == "COMMANDLINE" for source in sources):
        raise typer.BadParameter("--channel and --release each name a release; give one of them")
    return value


def _check_called_channel(context: typer.Context, channel: str) -> str:
    """The same of a channel that is asked for a text, whose canary may be meant alone."""
    _check_channel(context, channel.removesuffix(CANARY))
    return channel


Channel = Annotated[str, typer.Option(help="Channel of the tenant.", callback=_check_channel)]
CalledChannel = Annotated[
    str,
    typer.Option(
        "--channel", help="Channel of the tenant; NAME:canary is its canary alone.", callback=_check_called_channel
    ),
]
ReleaseNumber = Annotated[
    int | None,
    typer.Option(
        "--release",
        help="A release by its number, in place of the channel's; 0: unpatched.",
        min=0,
        callback=_channel_or_release,
    ),
]


def table(*names: str) -> Table:
    """A table without lines. Wide cells are folded, never cut, so that names can be copied."""
    return Table(*(Column(name, overflow="fold") for name in names), box=None)


PrecisionName = Literal["auto", "float32", "bfloat16", "int8"]
"""The values of `backpack_lm.kernels.Precision`, repeated so that help needs no torch."""


def progress(*columns: ProgressColumn) -> Progress:
    """A transient progress bar on stderr, if that is a terminal."""
    from rich.progress import Progress

    return Progress(*columns, console=err, transient=True, disable=not err.is_terminal)


def show_markdown(text: str) -> None:
    """Print Markdown: rendered on a terminal, as source to a pipe or a file."""
    from rich.markdown import Markdown

    if out.is_terminal:
        out.print(Markdown(visible(text)), soft_wrap=False)
    else:
        out.verbatim(text.rstrip("\n"), end="\n")


def percent(token: Token) -> str:
    """A token's probability; "" if unknown."""
    return "" if token.log_probability is None else f"{100 * math.exp(token.log_probability):.2f} %"


def bare_text(token: Token) -> str:
    """A token's text without the spaces around it, as it stands in a list; one of spaces alone with quotes."""
    return token.text.strip() or repr(token.text)


def contribution_bar(share: float, width: int) -> Text:
    """A bar for a contribution, given as a share (−1 to 1) of the largest magnitude."""
    return Text("█" * max(1, round(width * abs(share))), "green" if share > 0 else "red")


def footnote(served: Served, note: str = "") -> None:
    """Print the channel and release of an answer, below it."""
    canary = ", the canary" if served.canary else ""
    where = f"{served.tenant}/{served.channel}" if served.channel else served.tenant  # a release by its number
    err.print(f"[dim]{note + '; ' if note else ''}{where}, release {served.release} ({served.digest[:12]}){canary}[/]")


def when(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S}"


@contextmanager
def as_caller(tenant: str, key: str) -> Iterator[Client]:
    """Connect to the gateway, as a tenant or with the given key."""
    from backpack_serving.client import Client

    with exits():
        target = CallTarget.of(tenant, key)
    with exits(target=target), Client(target.gateway, target.key, **_arguments(target)) as client:
        yield client


@contextmanager
def as_releaser(tenant: str, key: str) -> Iterator[Steering]:
    """Connect to the intervention service, as a tenant or with the given key."""
    from backpack_serving.client import Steering

    with exits():
        target = CallTarget.of(tenant, key)
    with exits(target=target), Steering(target.interventions, target.key, **_arguments(target)) as steering:
        yield steering


@contextmanager
def as_admin() -> Iterator[Operator]:
    """Connect to the intervention service, as who operates it."""
    from backpack_serving.client import Operator

    with exits():
        target = CallTarget.of_operator()
    with exits(target=target), Operator(target.interventions, target.key, **_arguments(target)) as operator:
        yield operator


@contextmanager
def as_admin_of_gateway() -> Iterator[Client]:
    """Connect to the gateway, as who operates the service."""
    from backpack_serving.client import Client

    with exits():
        target = CallTarget.of_operator()
    with exits(target=target), Client(target.gateway, target.key, **_arguments(target)) as client:
        yield client


def _arguments(target: CallTarget) -> dict[str, Any]:
    return {"tls": target.tls, **connection_arguments(Settings())}


def connection_arguments(settings: Settings) -> dict[str, Any]:
    """Arguments of a command's connection, but for TLS. There is no timeout: users press Ctrl-C.

    An address that never answered is usually wrong, or nothing runs there: commands give up after UNREACHED
    seconds, unless a retry window is set. A server that has answered is retried as by any client.
    """
    from backpack_serving.client.connection import RETRY_WINDOW

    def notice(error: ServiceError, seconds: float) -> None:
        reason = " ".join(error.message.split())
        err.print(f"no answer yet ({reason}); trying again for {seconds:.0f} s, Ctrl-C stops", markup=False)

    window = settings.retry_window
    chosen = {"retry_window": RETRY_WINDOW, "unreached_window": UNREACHED} if window is None else {}
    return {"timeout": None, "notice": notice, "retry_window": window, **chosen}


@contextmanager
def exits(extra: str = "", target: CallTarget | None = None) -> Iterator[None]:
    """Turn an expected error into one line on stderr and exit status 1; only our own mistakes give a traceback.

    `extra` installs all optional libraries of the command; without it, the message names each library's own extra.
    `target` is whom the command calls.
    """
    try:
        yield
    except ServiceError as error:
        if isinstance(error, Unavailable) and error.reason == "TRANSPORT":
            if "proxy" in error.metadata:
                _exit_with_error(
                    f"no answer ({error.message}); if it is to be called directly, add its host to no_proxy"
                )
            _exit_with_error(f"no answer ({error.message}){f'; {target.unreached}' if target else ''}")
        fix = f"; `{hints.backpack('release list')}` lists what there is" if error.reason == "NO_SUCH_RELEASE" else ""
        if target and isinstance(error, Unauthenticated):
            fix = f"; {target.refused}"
        _exit_with_error(f"{error.reason}: {error.message}{': ' if error.why else ''}{error.why}{fix}")
    except ModuleNotFoundError as error:
        if (brings := EXTRAS.get(str(error.name).partition(".")[0])) is None:
            raise
        extra = extra or brings
        more = f"; for the experiments: {install_command('lab')}" if extra == "engine" else ""
        _exit_with_error(f"this needs {error.name}: {install_command(extra)}{more}")
    except ValidationError as error:
        _exit_with_error(_unfit(error))
    except OSError as error:
        _exit_with_error(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except (ValueError, FloatingPointError) as error:  # from models and files; our messages name the fix
        _exit_with_error(str(error))


def _unfit(error: ValidationError) -> str:
    """Describe invalid settings by their environment variables and purposes."""
    wrong = []
    for e in error.errors():
        name, *inside = map(str, e["loc"])  # what is inside is of a value that is JSON
        what, value = ", ".join([f"BACKPACK_{name.upper()}", *inside]), secretless(str(e["input"]))
        why, purpose = e["msg"].removeprefix("Value error, "), Settings.model_fields[name].description
        wrong.append(f"{what}={value}: {why} ({purpose})")
    return "; ".join(wrong)


def _exit_with_error(text: str) -> NoReturn:
    """Print an error as one line and exit with status 1."""
    err.print(Text.assemble(("error:", "red"), f" {' '.join(text.split())}"), soft_wrap=True)
    raise typer.Exit(1) from None
