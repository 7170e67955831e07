"""TLS credentials: for servers, which reload certificates without a restart, and for channels."""

from __future__ import annotations

import grpc

from backpack_serving.auth.tls import Reloaded, Tls


def server_credentials(tls: Tls) -> grpc.ServerCredentials:
    """Credentials that check their files at every handshake. Raises ValueError if the files are invalid now.

    If they become invalid later, that is logged, and the last valid ones stay in use.
    """
    files = Reloaded(tls, _configuration)
    first = current = files.now()

    def reload() -> grpc.ServerCertificateConfiguration | None:
        nonlocal current
        previous, current = current, files.now()
        return None if current is previous else current

    return grpc.dynamic_ssl_server_credentials(
        first, reload, require_client_authentication=tls.client_authorities is not None
    )


def _configuration(tls: Tls) -> grpc.ServerCertificateConfiguration:
    identity = tls.identity()
    assert identity, "a listener without a certificate has no credentials"
    return grpc.ssl_server_certificate_configuration([identity], tls.clients())


def channel_credentials(tls: Tls) -> grpc.ChannelCredentials:
    """Credentials of a channel, from the files as they are now. Raises ValueError if they are invalid."""
    key, certificate = tls.identity() or (None, None)
    return grpc.ssl_channel_credentials(tls.servers(), key, certificate)
