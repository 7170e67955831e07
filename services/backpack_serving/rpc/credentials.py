"""TLS for servers, which take new certificates without a restart, and for channels."""

from __future__ import annotations

import grpc
import structlog

from backpack_serving.tls import Tls

log = structlog.get_logger(__name__)


def server_credentials(tls: Tls) -> grpc.ServerCredentials:
    """Credentials that look at their files with every handshake. Raises ValueError if the files aren't good now.

    Files that are no good later are logged, and what was read before serves on.
    """
    known = [tls.stamp()]

    def read() -> grpc.ServerCertificateConfiguration:
        identity = tls.identity()
        assert identity, "a listener without a certificate has no credentials"
        return grpc.ssl_server_certificate_configuration([identity], tls.clients())

    def again() -> grpc.ServerCertificateConfiguration | None:
        stamp = tls.stamp()
        if stamp == known[0]:
            return None
        try:
            found = read()
        except (OSError, ValueError) as error:
            log.error("certificates not read; the ones before serve on", reason=str(error))
            return None
        known[0] = stamp
        log.info("certificates read again", certificate=str(tls.certificate))
        return found

    return grpc.dynamic_ssl_server_credentials(
        read(), again, require_client_authentication=tls.client_authorities is not None
    )


def channel_credentials(tls: Tls) -> grpc.ChannelCredentials:
    """Credentials of a channel, as the files are now. Raises ValueError if they aren't good."""
    key, certificate = tls.identity() or (None, None)
    return grpc.ssl_channel_credentials(tls.servers(), key, certificate)
