"""The context that all rules share (store, ledger, model, limits), and checks of names and texts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import datetime

from backpack_lm.patch import ModelShape, PatchLimits

from backpack_serving.auth.keys import Principal
from backpack_serving.errors import InvalidRequest, PreconditionFailed
from backpack_serving.interventions.ledger import Ledger, scope
from backpack_serving.interventions.records import RevisionRecord
from backpack_serving.interventions.store import Read, Store
from backpack_serving.references import NAME, NAME_WRITTEN

LONGEST_TEXT = 4096


class RuleContext:
    """What all rules share: one store, the model that patches are for, limits, and the ledger that writes.

    `on_write` is called after each commit.
    """

    def __init__(
        self,
        store: Store,
        shape: ModelShape,
        limits: PatchLimits,
        on_write: Callable[[], None],
        now: Callable[[], datetime],
    ) -> None:
        self.store, self.shape, self.limits, self.now = store, shape, limits, now
        self.ledger = Ledger(store, on_write, now)

    def read_as(self, who: Principal) -> AbstractContextManager[Read]:
        """A transaction that sees what this principal may see."""
        return self.store.read(scope(who))

    def check_model(self, record: RevisionRecord) -> None:
        """Raise PreconditionFailed for a revision that was made for another model."""
        if record.fingerprint != self.shape.fingerprint:
            raise PreconditionFailed(
                "WRONG_MODEL",
                f"{record.name} was made for model {record.fingerprint[:12]}…, this is "
                f"{self.shape.fingerprint[:12]}…; create the revision again for this model",
            )


def check_id(field: str, value: str) -> None:
    """Raise InvalidRequest unless this may be the name of a tenant, a patch or a channel."""
    if not NAME.fullmatch(value):
        raise InvalidRequest.at(field, "BAD_NAME", f"{value!r}; {NAME_WRITTEN}")


def check_text(field: str, value: str) -> None:
    """Raise InvalidRequest for free text that is too long, or contains NUL, which databases refuse."""
    if len(value) > LONGEST_TEXT:
        raise InvalidRequest.at(field, "TOO_LONG", f"{len(value)} characters, at most {LONGEST_TEXT}")
    if "\0" in value:
        raise InvalidRequest.at(field, "BAD_CHARACTER", f"a NUL at character {value.index(chr(0))}; leave it out")
