"""Proxies that the environment names, as container engines do: a real one that counts who comes through it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from backpack_serving import proxies, rpc
from backpack_serving.client import AsyncClient, Client, ServiceError
from backpack_serving.inference import directory
from backpack_serving.observability.metrics import Metrics
from backpack_serving.rpc import probe
from backpack_serving.settings import Settings

from tests.conftest import PROXY_VARIABLES

ELSEWHERE = "192.0.2.5:99"  # of a network that is nowhere (RFC 5737)


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PROXY_VARIABLES, "no_proxy", "no_grpc_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


class Proxy:
    """Takes no call any further."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.port = 0

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.asked.append((await reader.readline()).decode())
        writer.write(b"HTTP/1.1 503 Nowhere\r\n\r\n")
        writer.close()


@asynccontextmanager
async def proxy() -> AsyncIterator[Proxy]:
    counting = Proxy()
    server = await asyncio.start_server(counting.answer, "127.0.0.1", 0)
    counting.port = server.sockets[0].getsockname()[1]
    yield counting
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize(
    ("variables", "through"),
    [
        ({"http_proxy": "http://me:secret@{}"}, "http_proxy"),
        ({"https_proxy": "http://{}", "http_proxy": "http://127.0.0.1:1"}, "https_proxy"),
        ({"grpc_proxy": "http://{}", "https_proxy": "http://127.0.0.1:1"}, "grpc_proxy"),
        ({"http_proxy": "http://{}", "no_proxy": "example.org,198.51.100.0/24"}, "http_proxy"),
        ({"http_proxy": "http://{}", "no_proxy": "192.0.2.5", "no_grpc_proxy": ""}, "http_proxy"),
        ({"HTTP_PROXY": "http://{}", "ALL_PROXY": "http://{}"}, ""),
        ({"all_proxy": "http://{}"}, ""),
        ({"http_proxy": "https://{}"}, ""),
        ({"grpc_proxy": "", "http_proxy": "http://{}"}, ""),
        ({"http_proxy": "http://{}", "no_proxy": "192.0.2.0/24"}, ""),
        ({"http_proxy": "http://{}", "no_proxy": "example.org, 2.5"}, ""),
    ],
)
async def test_calls_to_elsewhere_go_as_grpc_sends_them_and_errors_say_so(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], through: str
) -> None:
    async with proxy() as counting:
        where = f"127.0.0.1:{counting.port}"
        for name, value in variables.items():
            monkeypatch.setenv(name, value.format(where))
        async with AsyncClient(ELSEWHERE, timeout=5.0 if through else 0.3, attempts=1) as client:
            with pytest.raises(ServiceError) as failed:
                await client.model()
    assert any(line.startswith(f"CONNECT {ELSEWHERE}") for line in counting.asked) == bool(through)
    told = f"through the proxy http://{where} ({through})"
    assert (told in failed.value.message) == bool(through), failed.value.message
    assert ("proxy" in failed.value.metadata) == bool(through)
    assert "secret" not in failed.value.message


async def test_nothing_on_this_machine_is_called_through_a_proxy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    async with proxy() as counting:
        server = await directory.serve(Settings(directory_address="127.0.0.1:0"), Metrics())
        for name in PROXY_VARIABLES:
            monkeypatch.setenv(name, f"http://127.0.0.1:{counting.port}")
        port = server.address.rpartition(":")[2]
        for host in ("127.0.0.1", "localhost", "0.0.0.0", "ipv4:127.0.0.1", "dns:///localhost"):
            async with AsyncClient(f"{host}:{port}", timeout=30.0) as client:
                with pytest.raises(ServiceError, match="another one"):
                    await client.model()
            with Client(f"{host}:{port}", timeout=30.0) as blocking, pytest.raises(ServiceError, match="another"):
                await asyncio.to_thread(blocking.model)
            assert await asyncio.to_thread(probe.health, f"{host}:{port}", "", 30.0) == ("SERVING", "")
        await server.stop(0)
    assert counting.asked == []


async def test_no_part_calls_another_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other parts are on other machines."""
    async with proxy() as counting:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{counting.port}")
        with pytest.raises(ServiceError):
            await asyncio.to_thread(probe.health, ELSEWHERE, "", 0.3)
        with pytest.raises(ServiceError):
            await asyncio.to_thread(probe.replicas, ELSEWHERE, (), 0.3)
        for repeats in (True, False):
            async with rpc.channel(ELSEWHERE, repeats=repeats) as channel:
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(channel.channel_ready(), 0.3)
    assert counting.asked == []


@pytest.mark.parametrize(
    ("target", "here"),
    [
        ("127.0.0.1:8470", True),
        ("127.8.8.8:8470", True),
        ("localhost:8470", True),
        ("LOCALHOST.:8470", True),
        ("gateway.localhost:8470", True),
        ("[::1]:8470", True),
        ("[::ffff:127.0.0.1]:8470", True),
        ("0.0.0.0:8470", True),
        ("[::]:8470", True),
        ("ipv6:[::1]:8470", True),
        ("ipv4:127.0.0.1:1,127.0.0.1:2", True),
        ("dns:///localhost:8470", True),
        ("dns://192.0.2.1/localhost:8470", True),
        ("unix:/tmp/socket", True),
        ("ipv4:127.0.0.1:1,192.0.2.5:2", False),
        ("gateway:8470", False),
        ("localhost.example.org:8470", False),
        ("[2001:db8::1]:8470", False),
        ("dns:///gateway:8470", False),
        ("", False),
    ],
)
def test_what_is_on_this_machine(target: str, here: bool) -> None:
    assert proxies.stays_here(target) == here
