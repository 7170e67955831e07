"""Who calls: by API key, by token, or by client certificate. The tenant is what the credential says, nothing else.

A call with an `authorization` is judged by that alone; one without by its connection's certificate.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from urllib.parse import quote

import structlog

from backpack_serving.auth.keys import PREFIX, SYSTEM, Holder, Principal, Role, misplaced
from backpack_serving.auth.oidc import Issuer, TokenVerifier
from backpack_serving.auth.presented import Call, bearer, certificate_names
from backpack_serving.errors import Unauthenticated


class Identities:
    """All ways of saying who one is that a server takes.

    `by_key` finds the principal of an API key; `check` may refuse one that a token or a certificate named, because
    its tenant isn't there.
    """

    def __init__(
        self,
        by_key: Callable[[str], Awaitable[Principal]],
        check: Callable[[Principal], Awaitable[None]],
        issuer: Issuer | None = None,
        holders: Mapping[str, Holder] | None = None,
    ) -> None:
        self._by_key, self._check = by_key, check
        self._tokens, self._holders = TokenVerifier(issuer) if issuer else None, holders or {}

    async def who(self, call: Call) -> Principal:
        """Raises Unauthenticated, or Unavailable while that can't be told."""
        who = await self._who(call)
        structlog.contextvars.bind_contextvars(tenant=who.tenant)
        return who

    async def _who(self, call: Call) -> Principal:
        presented = bearer(call)
        if presented is None:
            who = self._by_certificate(certificate_names(call))
        elif self._tokens is None or presented.startswith(PREFIX):
            return await self._by_key(presented)
        else:
            claims = await self._tokens.read(presented)
            who = _principal(claims.tenant, "subjects", claims.subject, claims.roles)
        await self._check(who)
        return who

    def _by_certificate(self, names: Iterable[str]) -> Principal:
        for name in names:
            if holder := self._holders.get(name):
                return _principal(holder.tenant, "certificates", name, holder.roles)
        ways = "an API key" + (" or a token" if self._tokens else "")
        text = f"no credential; send the metadata `authorization: Bearer …` with {ways}"
        if self._holders:
            text += ", or use a client certificate that BACKPACK_CERTIFICATES names"
        raise Unauthenticated("NO_CREDENTIAL", text)


def _principal(tenant: str, kind: str, name: str, roles: Sequence[str]) -> Principal:
    """Whom a credential names. Roles that aren't ours are nobody's business here.

    Raises Unauthenticated if it would make an operator of a tenant, or the other way round.
    """
    known = frozenset(role for role in Role if role.value in roles)
    if wrong := misplaced(sorted(known), tenant):
        raise Unauthenticated(
            "BAD_ROLES", f"{wrong} for tenants/{tenant}: admin and replica are roles of tenants/{SYSTEM} alone"
        )
    return Principal(tenant, quote(name, safe=":@."), known, kind)
