"""The rules of judgements: what a release does to text that it should leave alone, and whether channels take it."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import datetime

from backpack_serving.auth.keys import Principal, Role
from backpack_serving.errors import InvalidRequest, NotFound, PreconditionFailed
from backpack_serving.interventions import lookup
from backpack_serving.interventions.ledger import IdempotencyKey
from backpack_serving.interventions.records import Record, ReleaseRecord, ReleaseStatusRecord
from backpack_serving.interventions.rules import RuleContext
from backpack_serving.interventions.store import Read, Write
from backpack_serving.references import ReleaseRef

FRESH_SECONDS = 10.0
"""For so long after a release was made a judgement of it may still be on its way."""


class JudgementRules:
    """Gateways have each new release judged by a replica, and report it. A channel refuses to move to a release that
    raises the perplexity of ordinary text by more than `bound`, a share of it, unless its caller allows that; an
    infinite bound turns all of it off.
    """

    def __init__(self, context: RuleContext, bound: float) -> None:
        self._context, self._bound = context, bound

    def record(
        self, who: Principal, tenant: str, ref: ReleaseRef, tokens: int, before: float, after: float
    ) -> ReleaseStatusRecord:
        """Keep what a release does to so many tokens of ordinary text, as perplexities. The first judgement stays, and
        is the answer. Raises NotFound if there is no such release, InvalidRequest for what is no perplexity.
        """
        who.require(Role.REPLICA)
        if tokens < 1 or not all(math.isfinite(value) and value > 0 for value in (before, after)):
            message = f"perplexities {before} and {after} of {tokens} tokens; positive numbers"
            raise InvalidRequest.at("judgement", "OUT_OF_RANGE", message)
        with self._context.read_as(who) as tx:
            found = self._status_of(tx, tenant, ref)
        if found.tokens:
            return found

        def act(tx: Write, now: datetime) -> tuple[ReleaseRecord, list[Record]]:
            made = self._status_of(tx, tenant, ref)
            if not made.tokens:
                tx.replace(replace(made, tokens=tokens, before=before, after=after))
            return lookup.release(tx, tenant, ref.number, deleted=True), []

        self._context.ledger.write(who, "RecordJudgement", IdempotencyKey(), act)
        with self._context.read_as(who) as tx:
            return self._status_of(tx, tenant, ref)

    def expected(self, who: Principal, number: int) -> float:
        """For how many more seconds a judgement of the caller's release may be on its way; 0 if there is one, or none
        is needed.
        """
        who.require(Role.RELEASER)
        if math.isinf(self._bound):
            return 0.0
        with self._context.read_as(who) as tx:
            release = tx.get(ReleaseRecord, who.tenant, number)
            if release is None or not release.parts or lookup.status(tx, who.tenant, number).tokens:
                return 0.0
        return max(0.0, FRESH_SECONDS - (self._context.now() - release.created).total_seconds())

    def check(self, tx: Read, release: ReleaseRecord, allowed: bool) -> str:
        """What is known of a release, as text for the audit trail. Raises PreconditionFailed if the release makes
        ordinary text worse by more than the bound, and that isn't allowed.
        """
        status = lookup.status(tx, release.tenant, release.number)
        if not release.parts:
            return ""
        if not status.tokens:
            return "" if math.isinf(self._bound) else "not judged"
        what = f"perplexity of ordinary text {status.before:.4g} → {status.after:.4g} ({status.change:+.1%})"
        if status.change <= self._bound:
            return what
        if not allowed:
            raise PreconditionFailed(
                "DEGRADES",
                f"{release.name}: {what}, and {self._bound:.1%} is the most (BACKPACK_DEGRADATION); change its edits, "
                "or set allow_degradation (--yes) to let it steer all the same",
            )
        return f"{what}, allowed"

    def _status_of(self, tx: Read, tenant: str, ref: ReleaseRef) -> ReleaseStatusRecord:
        release = lookup.release(tx, tenant, ref.number, deleted=True)
        if release.digest != ref.digest:  # of another epoch
            raise NotFound("NO_SUCH_RELEASE", f"{release.name} is {release.digest}, not {ref.digest}")
        return lookup.status(tx, tenant, ref.number)
