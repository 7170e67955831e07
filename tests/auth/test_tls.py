"""TLS on every listener: who is let in, and certificates that are replaced while servers run."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import ssl
import subprocess
import sys
import termios
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trustme
from backpack_proto.v1 import directory_pb2 as pb
from backpack_proto.v1 import directory_pb2_grpc
from backpack_serving import embedded, rpc
from backpack_serving.auth.tls import Tls
from backpack_serving.errors import Unavailable
from backpack_serving.inference import directory
from backpack_serving.observability import exposition
from backpack_serving.observability.metrics import Metrics
from backpack_serving.settings import Settings
from cryptography.hazmat.primitives import serialization
from structlog.testing import capture_logs

from tests.e2e.conftest import ANYWHERE, System

NAME = "backpack.internal"


class Authority:
    """An authority, and files with what it issued."""

    def __init__(self, folder: Path, name: str) -> None:
        self._ca, self._folder, self._name = trustme.CA(), folder, name
        self.file = folder / f"{name}-ca.pem"
        self._ca.cert_pem.write_to_path(self.file)

    def issue(self, name: str = NAME, until: datetime | None = None) -> tuple[Path, Path]:
        """(certificate, key); the same files each time."""
        since = until and until - timedelta(days=30)
        issued = self._ca.issue_cert(name, not_before=since, not_after=until)
        certificate, key = (self._folder / f"{self._name}-{part}.pem" for part in ("certificate", "key"))
        issued.private_key_pem.write_to_path(key)
        certificate.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        return certificate, key


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "ours")


async def _report(address: str, tls: Tls | None) -> None:
    """One call on a new connection."""
    channel = rpc.channel(address, tls)
    try:
        with rpc.errors():
            await directory_pb2_grpc.DirectoryServiceStub(channel).Report(pb.ReportRequest(), timeout=30)
    finally:
        await channel.close()


async def _served(address: str, authority: Authority, identity: tuple[Path, Path] | None = None) -> bytes:
    """The certificate that a listener shows."""
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context(cafile=str(authority.file))
    context.set_alpn_protocols(["h2"])
    if identity:
        context.load_cert_chain(*identity)

    def connect() -> bytes:
        with socket.create_connection((host, int(port)), timeout=30) as plain:
            with context.wrap_socket(plain, server_hostname=NAME) as secure:
                shown = secure.getpeercert(binary_form=True)
        assert shown
        return shown

    return await asyncio.to_thread(connect)


def _answers_in_clear(address: str) -> bool:
    """Whether a listener says anything to who speaks HTTP/2 without TLS."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=30) as plain:
        plain.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        try:
            return plain.recv(100)[3:4] == b"\x04"  # a SETTINGS frame
        except ConnectionResetError:
            return False


def _settings(tmp_path: Path, **settings: Any) -> Settings:
    return Settings(state=tmp_path, directory_address="127.0.0.1:0", **settings)


async def test_whoever_trusts_the_authority_gets_in_and_nobody_in_clear(tmp_path: Path, authority: Authority) -> None:
    certificate, key = authority.issue()
    server = await directory.serve(_settings(tmp_path), Metrics())
    assert await asyncio.to_thread(_answers_in_clear, server.address), "as the check sees one without TLS"
    await server.stop()
    server = await directory.serve(_settings(tmp_path, tls_certificate=certificate, tls_key=key), Metrics())
    await _report(server.address, Tls(authorities=authority.file, name=NAME))
    other = Authority(tmp_path, "other")
    for wrong in (None, Tls(authorities=other.file, name=NAME), Tls(authorities=authority.file)):
        with pytest.raises(Unavailable):
            await _report(server.address, wrong)
    await server.stop()


async def test_clients_without_a_certificate_are_turned_away(tmp_path: Path, authority: Authority) -> None:
    certificate, key = authority.issue()
    clients = Authority(tmp_path, "clients")
    settings = _settings(tmp_path, tls_certificate=certificate, tls_key=key, tls_client_ca=clients.file)
    server = await directory.serve(settings, Metrics())
    await _report(server.address, Tls(*clients.issue(), authorities=authority.file, name=NAME))
    strangers = Authority(tmp_path, "strangers")
    for identity in ((None, None), strangers.issue()):
        with pytest.raises(Unavailable):
            await _report(server.address, Tls(*identity, authorities=authority.file, name=NAME))
    await server.stop()


async def test_authorities_may_be_described_in_any_language(tmp_path: Path, authority: Authority) -> None:
    certificate, key = authority.issue()
    authority.file.write_text(f"Autorité\n{authority.file.read_text()}", "utf-8")
    settings = _settings(tmp_path, tls_certificate=certificate, tls_key=key, tls_client_ca=authority.file)
    server = await directory.serve(settings, Metrics())
    metrics = exposition.listen(Metrics().registry, "127.0.0.1:0", settings.tls)
    await _report(server.address, Tls(certificate, key, authorities=authority.file, name=NAME))
    assert await _served(metrics, authority, (certificate, key))
    await server.stop()


async def test_new_certificates_need_no_restart_and_bad_ones_do_no_harm(tmp_path: Path, authority: Authority) -> None:
    certificate, key = authority.issue()
    settings = _settings(tmp_path, tls_certificate=certificate, tls_key=key)
    server = await directory.serve(settings, Metrics())
    metrics = exposition.listen(Metrics().registry, "127.0.0.1:0", settings.tls)
    channel = rpc.channel(server.address, Tls(authorities=authority.file, name=NAME))
    stub = directory_pb2_grpc.DirectoryServiceStub(channel)
    await stub.Report(pb.ReportRequest())
    before = [await _served(address, authority) for address in (server.address, metrics)]
    certificate, key = authority.issue()
    after = [await _served(address, authority) for address in (server.address, metrics)]
    assert before[0] == before[1]
    assert after[0] == after[1]
    assert before[0] != after[0]
    await stub.Report(pb.ReportRequest())  # on the connection from before

    certificate.write_text("not a certificate")
    with capture_logs() as logs:
        for _ in range(3):
            assert [await _served(address, authority) for address in (server.address, metrics)] == after
    assert [entry["log_level"] for entry in logs] == ["error"] * 2, "each listener says it once"
    key.unlink()
    assert await _served(server.address, authority) == after[0]
    authority.issue()
    assert await _served(server.address, authority) not in (before[0], after[0])
    await channel.close()
    await server.stop()


async def test_a_certificate_that_has_expired_takes_no_good_ones_place(tmp_path: Path, authority: Authority) -> None:
    certificate, key = authority.issue()
    settings = _settings(tmp_path, tls_certificate=certificate, tls_key=key)
    server = await directory.serve(settings, Metrics())
    before = await _served(server.address, authority)
    authority.issue(until=datetime(2026, 3, 4, 5, 6, tzinfo=UTC))
    assert await _served(server.address, authority) == before
    await server.stop()
    with pytest.raises(ValueError, match=r"certificate\.pem expired on 2026-03-04 at 05:06 UTC; put a new one"):
        await directory.serve(settings, Metrics())


async def test_a_key_with_a_passphrase_is_refused_and_nobody_is_asked_for_it(
    tmp_path: Path, authority: Authority
) -> None:
    """Where there was a terminal, a server waited there, at each handshake after its files had changed."""
    certificate, key = authority.issue()
    secret = serialization.BestAvailableEncryption(b"secret")
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    locked = serialization.load_pem_private_key(key.read_bytes(), None).private_bytes(*form, secret)
    key.write_bytes(locked)
    master, terminal = os.openpty()
    code = "import sys; from backpack_serving.auth.tls import Tls; from pathlib import Path; P = Path\n"
    code += "try: Tls(P(sys.argv[1]), P(sys.argv[2])).identity()\nexcept ValueError as error: print(error)"
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", code, str(certificate), str(key)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=terminal,
        capture_output=True,
        text=True,
        timeout=30,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(terminal)
    os.set_blocking(master, False)
    asked = b""
    with suppress(OSError):  # there is nothing to read
        asked = os.read(master, 100)
    os.close(master)
    assert not asked
    assert "the key be without a passphrase" in done.stdout


async def test_strangers_at_the_metrics_leave_no_traceback(
    tmp_path: Path, authority: Authority, capfd: pytest.CaptureFixture[str]
) -> None:
    certificate, key = authority.issue()
    metrics = exposition.listen(Metrics().registry, "127.0.0.1:0", Tls(certificate, key))
    assert not await asyncio.to_thread(_answers_in_clear, metrics)
    with pytest.raises(ssl.SSLCertVerificationError):
        await _served(metrics, Authority(tmp_path, "theirs"))
    assert await _served(metrics, authority)
    await asyncio.sleep(0.2)
    assert "Traceback" not in capfd.readouterr().err


async def test_every_listener_of_a_system_with_mutual_tls(tmp_path: Path, authority: Authority) -> None:
    certificate, key = authority.issue()
    settings = Settings(
        state=tmp_path,
        threads=1,
        tls_certificate=certificate,
        tls_key=key,
        tls_client_ca=authority.file,
        tls_ca=authority.file,
        tls_name=NAME,
        metrics_address="127.0.0.1:0",
        **ANYWHERE,
    )
    async with embedded.run(settings) as serving:
        system = System(serving.gateway, serving.interventions, serving.settings)
        tenant = await system.tenant()
        assert (await system.stream(tenant, "The king", max_tokens=3))[0].served.release == 0
        channel = rpc.channel(serving.settings.directory_address, settings.tls)
        watch = directory_pb2_grpc.DirectoryServiceStub(channel).WatchReplicas(pb.WatchReplicasRequest())
        replica = (await watch.read()).replicas[0].address
        watch.cancel()
        await channel.close()
        everyone = (serving.gateway, serving.interventions, serving.settings.directory_address, replica)
        shown = {await _served(address, authority, (certificate, key)) for address in everyone}
        assert len(shown) == 1
        for address in everyone:
            assert not await asyncio.to_thread(_answers_in_clear, address)
        await system.close()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tls_certificate": "here.pem"}, "go together"),
        ({"tls_client_ca": "here.pem"}, "needs BACKPACK_TLS_CERTIFICATE"),
        ({"tls_certificate": "none.pem", "tls_key": "none.pem"}, "No such file"),
        ({"tls_certificate": "text.pem", "tls_key": "text.pem"}, "text.pem"),
    ],
)
async def test_files_that_are_no_good_are_refused_at_the_start(
    tmp_path: Path, settings: dict[str, str], says: str
) -> None:
    (tmp_path / "text.pem").write_text("no certificate")
    found = {name: tmp_path / file for name, file in settings.items()}
    with pytest.raises(ValueError, match=says):
        await directory.serve(_settings(tmp_path, **found), Metrics())


async def test_one_process_needs_to_trust_itself(tmp_path: Path, authority: Authority) -> None:
    certificate, key = authority.issue()
    settings = _settings(tmp_path, tls_certificate=certificate, tls_key=key)
    with pytest.raises(ValueError, match="BACKPACK_TLS_CA isn't set"):
        async with embedded.run(settings):
            pass
