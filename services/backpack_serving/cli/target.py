"""Whom a command calls: an option, else the environment, else the current context, else the state folder says so.

Where an option or the environment gives a key, the current context isn't used: the key goes to the settings' addresses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, get_type_hints

import typer

from backpack_serving.auth.keys import SYSTEM, read_key_file
from backpack_serving.auth.tls import Tls
from backpack_serving.cli import hints
from backpack_serving.cli.contexts import ContextFile, SavedContext, context_file, named_context
from backpack_serving.settings import Settings

EXAMPLE = "harbour"
"""The tenant that commands which change nothing call as, where nobody says which: `backpack run` makes it."""


@dataclass(frozen=True, slots=True)
class CallTarget:
    """Two addresses, and the key that they are called with; `source` says where it comes from, `context` which one is
    used, if any."""

    gateway: str
    interventions: str
    tls: Tls
    key: str
    source: str
    context: str = ""

    @classmethod
    def of(cls, tenant: str, key: str) -> CallTarget:
        """Whom a command calls as a tenant, or with a key. Raises ValueError or OSError if there is no key."""
        settings = Settings()
        if chosen := context_in_use(key):
            name, context = chosen
            if key or tenant in ("", context.tenant):
                key, source = (key, "--key or BACKPACK_KEY") if key else (context.secret(), _source(name))
                return cls(context.gateway, context.interventions, context.tls, key, source, name)
            if named_context.get():
                raise ValueError(
                    f"context {name} is of the tenant {context.tenant}, and --as (or BACKPACK_TENANT) names {tenant}; "
                    "leave one of them out"
                )
        key, source = (key, "--key or BACKPACK_KEY") if key else _kept_key(settings, tenant)
        return cls(settings.gateway_address, settings.interventions_address, settings.tls, key, source)

    @classmethod
    def of_operator(cls) -> CallTarget:
        """Whom a command calls as who operates the service. Raises ValueError or OSError if there is no key."""
        settings = Settings()
        key_given = bool(settings.admin_key.get_secret_value())
        chosen = ContextFile.read().chosen(named_context.get(), settings, operator=True, key_given=key_given)
        if chosen:
            name, context = chosen
            if context.tenant != SYSTEM:
                raise ValueError(
                    f"context {name} is of the tenant {context.tenant}; this needs the admin key: "
                    f"`{hints.backpack('login NAME --key-file admin.key')}` makes a context of that"
                )
            return cls(context.gateway, context.interventions, context.tls, context.secret(), _source(name), name)
        key = settings.key_for("admin")
        given = "BACKPACK_ADMIN_KEY" if key_given else str(settings.key_file("admin"))
        return cls(settings.gateway_address, settings.interventions_address, settings.tls, key, given)

    @property
    def unreached(self) -> str:
        """What to look at where nobody answers."""
        where = f"the gateway at {self.gateway} running, and the intervention service at {self.interventions}?"
        if self.context:
            return (
                f"is {where} {context_file()} says so of the context {self.context}: "
                f"`{hints.backpack('context list')}` has others, `{hints.backpack(f'login {self.context}')}` changes it"
            )
        return (
            f"is {where} `{hints.backpack('run')}` starts both, BACKPACK_GATEWAY_ADDRESS and "
            f"BACKPACK_INTERVENTIONS_ADDRESS say where they are, and so does `{hints.backpack('login')}`"
        )

    @property
    def refused(self) -> str:
        """Which key it was that is no good, and what to do."""
        if self.context and self.source == _source(self.context):
            return f"the key is that of {self.source}: `{hints.backpack(f'login {self.context}')}` takes another"
        return f"the key is that of {self.source}"


def context_in_use(key: str = "") -> tuple[str, SavedContext] | None:
    """The context that a command of a tenant uses, and its name, if it uses one. `key` is that of --key or
    BACKPACK_KEY. Raises ValueError as reading does."""
    return ContextFile.read().chosen(named_context.get(), Settings(), operator=False, key_given=bool(key))


def with_context(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command that takes --context, too."""

    @wraps(command)
    def call(*arguments: Any, in_context: str, **named: Any) -> Any:
        return command(*arguments, **named)

    hints_of = get_type_hints(command, include_extras=True)
    given = [each.replace(annotation=hints_of[name]) for name, each in signature(command).parameters.items()]
    option = Parameter("in_context", Parameter.KEYWORD_ONLY, default="", annotation=_Named)
    call.__signature__ = Signature([*given, option])  # type: ignore[attr-defined]
    call.__annotations__ = {**hints_of, "in_context": _Named}
    return call


def _remember(name: str) -> str:
    named_context.set(name)
    return name


_Named = Annotated[
    str,
    typer.Option(
        "--context",
        metavar="NAME",
        envvar="BACKPACK_CONTEXT_NAME",
        help="Context to call by, of `backpack login`, in place of the current one.",
        show_default=False,
        callback=_remember,
        is_eager=True,
    ),
]


def _source(context: str) -> str:
    return f"the context {context} in {context_file()}"


def _kept_key(settings: Settings, tenant: str) -> tuple[str, str]:
    """A tenant's key of the state folder, and its file."""
    if not tenant:
        named = f" ({', '.join(names)})" if (names := _tenants_with_keys(settings)) else ""
        raise ValueError(
            f"say whose it is to change: --as NAME{named}, BACKPACK_TENANT, a key (--key, BACKPACK_KEY), or a context: "
            f"`{hints.backpack('login')}` makes one"
        )
    file = settings.key_file(tenant)
    if not file.exists():
        raise FileNotFoundError(f"no API key: {file.absolute()} doesn't exist; {_where_keys_are(settings)}")
    return read_key_file(file), str(file)


def _tenants_with_keys(settings: Settings) -> list[str]:
    """Those whose keys are in the state folder."""
    return [file.stem for file in sorted(settings.state.glob("*.key")) if file.stem not in ("admin", "replica")]


def _where_keys_are(settings: Settings) -> str:
    """Advice for a missing key file: the state folder may be the wrong one."""
    state, contexts, login = settings.state, ContextFile.read(), hints.backpack("login")
    others = (
        f"name a context with --context ({', '.join(contexts.contexts)})"
        if contexts.contexts
        else f"log in, which keeps a key for every folder: {login}"
    )
    if named := _tenants_with_keys(settings):
        return f"name another tenant with --as ({', '.join(named)}), give --key, set BACKPACK_KEY, or {others}"
    given = "state" in settings.model_fields_set
    return (
        (f"BACKPACK_STATE is {state}" if given else f"BACKPACK_STATE isn't set, so it is {state} of this folder")
        + f", where no keys are. Run this where `{hints.backpack('run')}` was started, set BACKPACK_STATE to "
        f"the state folder that it named, give a key: BACKPACK_KEY or --key; or {others}"
    )
