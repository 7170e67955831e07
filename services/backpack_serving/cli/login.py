"""`backpack login` and `backpack context …`: servers and keys by name, for commands outside of a checkout."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from pydantic import SecretStr, ValidationError

from backpack_serving.auth.keys import SYSTEM, read_key_file
from backpack_serving.cli import hints
from backpack_serving.cli.client import connection_arguments, err, exits, out, table
from backpack_serving.cli.contexts import ContextFile, SavedContext, context_file
from backpack_serving.client import Client, Operator, Steering
from backpack_serving.errors import Forbidden, ServiceError, Unauthenticated
from backpack_serving.references import NAME, NAME_WRITTEN
from backpack_serving.settings import Settings

app = typer.Typer(no_args_is_help=True, help="Contexts: servers and keys by name, as `backpack login` keeps them.")

Name = Annotated[str, typer.Argument(help="Name of the context.")]


def login(
    name: Annotated[str, typer.Argument(help="Name of the context (default: the tenant's).")] = "",
    gateway: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Address of the gateway (default: BACKPACK_GATEWAY_ADDRESS).")
    ] = "",
    interventions: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT",
            help="Address of the intervention service (default: BACKPACK_INTERVENTIONS_ADDRESS).",
        ),
    ] = "",
    key_file: Annotated[
        Path | None,
        typer.Option(help="File with the key, which is read each time; without it, you are asked.", dir_okay=False),
    ] = None,
    tls_ca: Annotated[
        Path | None,
        typer.Option(help="Authorities (PEM) of the servers; with it, calls use TLS (default: BACKPACK_TLS_CA)."),
    ] = None,
    tls_name: Annotated[str, typer.Option(help="Name in the servers' certificates (default: BACKPACK_TLS_NAME).")] = "",
    tls_certificate: Annotated[
        Path | None, typer.Option(help="Your client certificate (PEM; default: BACKPACK_TLS_CERTIFICATE).")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key (PEM; default: BACKPACK_TLS_KEY).")] = None,
) -> None:
    """Try a key out on servers, and keep it with their addresses as a context, the current one from then on.

    `backpack login prod --gateway models.example:8470 --interventions models.example:8471`

    The key is asked for, or read from a pipe: `backpack login prod < prod.key`. It is kept in
    ~/.config/backpack/contexts.json (or $XDG_CONFIG_HOME), which only you can read; with --key-file, only where it is.

    A context of that name lends its addresses, and its TLS with them, where neither an option nor the environment says
    more.
    """
    with exits():
        contexts, settings = ContextFile.read(), Settings()
        if name and not NAME.fullmatch(name):
            raise ValueError(f"{name!r}: a context's name is {NAME_WRITTEN}")
        before = contexts.contexts.get(name)
        tls = {
            "tls_ca": _absolute(tls_ca or settings.tls_ca),
            "tls_name": tls_name or settings.tls_name,
            "tls_certificate": _absolute(tls_certificate or settings.tls_certificate),
            "tls_key": _absolute(tls_key or settings.tls_key),
        }
        key = read_key_file(key_file) if key_file else _asked_key()
        tried = _context(
            {
                "gateway": gateway or _given(settings, "gateway_address", before.gateway if before else ""),
                "interventions": interventions
                or _given(settings, "interventions_address", before.interventions if before else ""),
                "tenant": "",
                "key": SecretStr("" if key_file else key),
                "key_file": _absolute(key_file),
                **tls,
            }
        )
        if before:
            tried = _with_tls_of(before, tried)
        tenant = _tried(tried, key, settings)
        name = name or tenant
        contexts.contexts[name] = tried.model_copy(update={"tenant": tenant})
        contexts.current = name
        contexts.write()
    who = "who operates the service" if tenant == SYSTEM else f"the tenant {tenant}"
    out.print(f"context {name} of {who}, in {context_file()}; it is the current one now")


@app.command("list")
def list_contexts() -> None:
    """List all contexts; the current one has a star."""
    with exits():
        contexts = ContextFile.read()
    if not contexts.contexts:
        err.print(f"no contexts in {context_file()}: `{hints.backpack('login')}` makes one")
        return
    shown = table("", "context", "tenant", "gateway", "interventions", "key")
    for name, each in contexts.contexts.items():
        kept = each.key_file or ("kept here" if each.key.get_secret_value() else "none")
        shown.add_row(
            "*" if name == contexts.current else "", name, each.tenant, each.gateway, each.interventions, kept
        )
    out.print(shown)


@app.command("show")
def show_context(
    name: Annotated[str, typer.Argument(help="Name of the context (default: the current one).")] = "",
) -> None:
    """Print a context, without its key."""
    with exits():
        contexts = ContextFile.read()
        if not (name or contexts.current):
            raise ValueError(f"no context is the current one; `{hints.backpack('context use NAME')}` makes one so")
        found = contexts.named(name or contexts.current)
    for field, value in {"context": name or contexts.current, **found.values()}.items():
        shown = "kept here, not shown" if field == "key" and value else value
        if shown:
            out.print(f"{field}: {shown}", markup=False)


@app.command("use")
def use_context(name: Name) -> None:
    """Make a context the current one, which commands call by."""
    with exits():
        contexts = ContextFile.read()
        found = contexts.named(name)
        contexts.current = name
        contexts.write()
    out.print(f"{name} is the current context: {found.tenant} at {found.gateway}")


@app.command("remove")
def remove_context(name: Name) -> None:
    """Remove a context, with the key that is kept in it. The key stays good: `backpack tenant revoke` ends that."""
    with exits():
        contexts = ContextFile.read()
        contexts.named(name)
        del contexts.contexts[name]
        was_current = contexts.current == name
        contexts.current = "" if was_current else contexts.current
        contexts.write()
    out.print(f"{name} is removed{'; no context is the current one now' if was_current else ''}")


def _context(values: dict[str, object]) -> SavedContext:
    """Raises ValueError, naming the option, for what is no address."""
    try:
        return SavedContext.model_validate(values)
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        why = found["msg"].removeprefix("Value error, ")
    raise ValueError(f"--{found['loc'][0]} {found['input']}: {why}")


def _given(settings: Settings, field: str, before: str) -> str:
    """An address that no option names: the environment's, else the one of the context before, else the default."""
    found: str = getattr(settings, field)
    return before if before and field not in settings.model_fields_set else found


def _absolute(file: Path | None) -> str:
    """A file as contexts keep it: for every folder; "" for none."""
    return str(file.resolve()) if file else ""


def _with_tls_of(before: SavedContext, tried: SavedContext) -> SavedContext:
    """A context that has an address of the one before: it keeps that one's TLS where nothing else was given, so that no
    key goes in clear to a server that was called with TLS.
    """
    if tried.gateway != before.gateway and tried.interventions != before.interventions:
        return tried
    kept = {field: getattr(tried, field) or getattr(before, field) for field in ("tls_ca", "tls_name")}
    if not (tried.tls_certificate or tried.tls_key):  # two files that belong together
        kept |= {"tls_certificate": before.tls_certificate, "tls_key": before.tls_key}
    return tried.model_copy(update=kept)


def _asked_key() -> str:
    """The key from a pipe, or from somebody at a terminal, who doesn't see it. Raises ValueError for none."""
    asked = typer.prompt("API key", hide_input=True, err=True) if sys.stdin.isatty() else sys.stdin.readline()
    if not (key := str(asked).strip()):
        raise ValueError("no key: give --key-file FILE, or the key on a line of standard input")
    return key


def _tried(context: SavedContext, key: str, settings: Settings) -> str:
    """The tenant of a key, if at least one server takes it; one that doesn't answer is told.

    Raises ValueError for a key that one of them doesn't know, and if none answers.
    """
    arguments = {**connection_arguments(settings), "tls": context.tls}
    refusals: dict[str, ServiceError] = {}

    def of_gateway() -> str:
        with Client(context.gateway, key, **arguments) as client:
            return client.senses(0, 1).served.tenant

    def of_interventions() -> str:
        with Steering(context.interventions, key, **arguments) as steering:
            return steering.channel().name.split("/")[1]

    def of_operator() -> str:
        with Operator(context.interventions, key, **arguments) as operator:
            operator.fleet()
        return SYSTEM

    found: dict[str, str] = {}
    store = f"the intervention service at {context.interventions}"
    for where, ask in ((f"the gateway at {context.gateway}", of_gateway), (store, of_interventions)):
        try:
            found[where] = ask()
        except Unauthenticated as error:
            raise ValueError(f"{where} doesn't take this key: {error.message}; nothing is kept") from None
        except ServiceError as error:
            refusals[where] = error
    if len(set(found.values())) > 1:
        both = ", ".join(f"{where} takes it as {tenant}" for where, tenant in found.items())
        raise ValueError(f"the servers don't belong together: {both}; nothing is kept")
    if not found and isinstance(refusals[store], Forbidden):
        return of_operator()
    for where, why in refusals.items():
        if not isinstance(why, Forbidden):
            err.print(f"{where} can't be asked: {why.message}", style="yellow", markup=False)
    if not found:
        raise ValueError("no server has said whose the key is; nothing is kept")
    return next(iter(found.values()))
