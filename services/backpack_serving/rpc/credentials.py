"""TLS for servers, which take new certificates without a restart, and for channels."""

from __future__ import annotations

import grpc

from backpack_serving.auth.tls import Reloaded, Tls


def server_credentials(tls: Tls) -> grpc.ServerCredentials:
    """Credentials that look at their files with every handshake. Raises ValueError if the files aren't good now.

    Files that are no good later are logged, and what was read before serves on.
    """
    held = Reloaded(tls, _configuration)
    first = known = held.now()

    def again() -> grpc.ServerCertificateConfiguration | None:
        nonlocal known
        before, known = known, held.now()
        return None if known is before else known

    return grpc.dynamic_ssl_server_credentials(
        first, again, require_client_authentication=tls.client_authorities is not None
    )


def _configuration(tls: Tls) -> grpc.ServerCertificateConfiguration:
    identity = tls.identity()
    assert identity, "a listener without a certificate has no credentials"
    return grpc.ssl_server_certificate_configuration([identity], tls.clients())


def channel_credentials(tls: Tls) -> grpc.ChannelCredentials:
    """Credentials of a channel, as the files are now. Raises ValueError if they aren't good."""
    key, certificate = tls.identity() or (None, None)
    return grpc.ssl_channel_credentials(tls.servers(), key, certificate)
