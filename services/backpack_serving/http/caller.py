"""Who calls, as metadata of the calls that are made on the caller's behalf."""

from __future__ import annotations

from collections.abc import Mapping

from backpack_serving import rpc
from backpack_serving.errors import Unauthenticated
from backpack_serving.observability import tracing

Metadata = tuple[tuple[str, str], ...]


def credential(headers: Mapping[str, str]) -> Metadata:
    """The caller's key or token. Raises Unauthenticated without one.

    A call without a credential must not go on: its connection has this process's certificate, and a server would
    take the caller for whomever that certificate stands for.
    """
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        text = "send the header `Authorization: Bearer …` with an API key or a token"
        raise Unauthenticated("NO_CREDENTIAL", text)
    return rpc.with_key(token)


def metadata(headers: Mapping[str, str]) -> Metadata:
    """The caller's credential, and this request's id and trace. Raises Unauthenticated without a credential."""
    return (*credential(headers), *rpc.with_request_id(), *tracing.headers())
