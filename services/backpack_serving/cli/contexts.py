"""Contexts: which servers commands call, with which TLS and as whom, by name, in a file of the user's.

A context is a whole: its key is never sent to a server that it doesn't name. A key from an option or the environment
goes to a context's servers only if the command names that context.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator

from backpack_serving.auth.keys import SYSTEM, read_key_file
from backpack_serving.auth.tls import Tls
from backpack_serving.references import NAME, NAME_WRITTEN
from backpack_serving.settings import Address, Settings, config_folder

_WHOLE = ("gateway_address", "interventions_address", "state")
"""Settings that say where to call: with one of them in the environment, the current context isn't used."""


named_context: ContextVar[str] = ContextVar("named_context", default="")
"""The context that this command's --context names; "" if it names none."""


class SavedContext(BaseModel):
    """Two addresses, TLS, and a key: itself, or the file that it is in. `tenant` is the key's."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    gateway: Address
    interventions: Address
    tenant: str
    key: SecretStr = SecretStr("")
    key_file: str = ""
    tls_ca: str = ""
    tls_name: str = ""
    tls_certificate: str = ""
    tls_key: str = ""

    @property
    def tls(self) -> Tls:
        certificate, key, authorities = (
            Path(file) if file else None for file in (self.tls_certificate, self.tls_key, self.tls_ca)
        )
        return Tls(certificate, key, None, authorities, self.tls_name)

    def secret(self) -> str:
        """The key. Raises ValueError if its file can't be read."""
        if not self.key_file:
            return self.key.get_secret_value()
        try:
            return read_key_file(Path(self.key_file))
        except OSError as error:
            why = f"{self.key_file} has the context's key, and can't be read: {error.strerror}"
        raise ValueError(f"{why}; bring it back, or `backpack login` again")

    def values(self) -> dict[str, str]:
        """As it is stored: with its key."""
        return {**self.model_dump(exclude_defaults=True, exclude={"key"}), "key": self.key.get_secret_value()}


def _checked_name(text: str) -> str:
    if not NAME.fullmatch(text):
        raise ValueError(f"{text!r}: a context's name is {NAME_WRITTEN}")
    return text


class ContextFile(BaseModel):
    """All contexts, and the name of the current one, "" if none is."""

    model_config = ConfigDict(extra="forbid", strict=True)

    current: str = ""
    contexts: dict[Annotated[str, AfterValidator(_checked_name)], SavedContext] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _known(self) -> ContextFile:
        if self.current and self.current not in self.contexts:
            raise ValueError(f"{self.current!r} is the current context, and there is none of that name")
        return self

    @classmethod
    def read(cls) -> ContextFile:
        """The user's; an empty one if there is no file. Raises ValueError, without a key, if it can't be read."""
        file = context_file()
        try:
            return cls.model_validate_json(file.read_bytes())
        except FileNotFoundError:
            return cls()
        except ValidationError as error:
            found = error.errors(include_input=False, include_url=False)[0]
            why = f"{'.'.join(map(str, found['loc']))}: {found['msg']}".removeprefix(": ")
        raise ValueError(f"{file} isn't a file of contexts: {why}; mend it, or remove it and `backpack login` again")

    def write(self) -> None:
        """Replace the user's, which nobody else may read. Raises OSError, with the file, if that can't be done."""
        file = context_file()
        values: dict[str, Any] = {
            "current": self.current,
            "contexts": {name: each.values() for name, each in self.contexts.items()},
        }
        partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
        try:
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            partial.touch(mode=0o600)
            partial.write_text(json.dumps(values, indent=1) + "\n", "utf-8")
            partial.replace(file)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            raise OSError(error.errno, error.strerror, str(file)) from None

    def named(self, name: str) -> SavedContext:
        """Raises ValueError, with those that there are, if there is none of that name."""
        if name not in self.contexts:
            there = f"there are {', '.join(self.contexts)}" if self.contexts else "there is none yet"
            raise ValueError(f"no context {name!r} in {context_file()}; {there}; `backpack login {name}` makes it")
        return self.contexts[name]

    def chosen(self, name: str, settings: Settings, operator: bool, key_given: bool) -> tuple[str, SavedContext] | None:
        """The context that a command uses, and its name: the one that is named; else the current one, if neither the
        environment nor an option says where to call or gives a key, and it is of a tenant, or for commands of the
        `operator` of who operates.
        """
        if name:
            return name, self.named(name)
        if not self.current or key_given or settings.model_fields_set.intersection(_WHOLE):
            return None
        found = self.contexts[self.current]
        return (self.current, found) if (found.tenant == SYSTEM) == operator else None


def context_file() -> Path:
    """Where contexts are kept."""
    return config_folder() / "contexts.json"
