"""The whole compose stack in containers: built, brought up, used, killed part by part, restored, taken down.

`make test-containers` runs it; it needs a container engine that `docker` reaches. PostgreSQL and Prometheus come
from their images, or from Debian (standins.Dockerfile) where those can't be pulled; Grafana is left out there.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from backpack_lm.kernels.families import fitting
from backpack_proto.v1 import interventions_pb2 as ipb
from backpack_proto.v1 import sync_pb2
from backpack_serving import rpc
from backpack_serving.auth.keys import ApiKeySecret
from backpack_serving.errors import Unauthenticated, Unavailable

from tests.deploy.stack import (
    GATEWAY,
    HTTP,
    INTERVENTIONS,
    PROMPT,
    Stack,
    again,
    needs_engine,
    prepared,
    run,
    text,
    while_streaming,
)
from tests.e2e.conftest import System, copy

pytestmark = needs_engine

TENANTS = count()
HEALTH = ("backpack", "health", "127.0.0.1:9000")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with prepared(tmp_path_factory.mktemp("stack"), "backpack-test") as stack:
        stack.up()
        yield stack


@pytest.fixture
async def system(stack: Stack) -> AsyncIterator[System]:
    system = System(GATEWAY, INTERVENTIONS, stack.settings, _names=TENANTS)
    yield system
    await system.close()


async def test_the_stack_serves_steered_text_and_survives_its_parts(stack: Stack, system: System) -> None:
    ship, plain = await system.tenant(copy("king", "ship")), await system.tenant()
    steered, unsteered = await text(system, ship), await text(system, plain)
    print(f"steered {steered!r}, unsteered {unsteered!r}", flush=True)
    assert steered != unsteered

    # The intervention service and its database are killed: what is known goes on being served.
    stack.kill("interventions")
    stack.kill("postgres")
    assert await text(system, ship) == steered
    with pytest.raises(Unavailable), rpc.errors():
        await asyncio.wait_for(system.release(ship, copy("king", "nurse")), 30)
    stack.up()
    number = await again(lambda: system.release(ship, copy("king", "nurse")))
    assert number >= 2, "what was acknowledged is still there"

    assert await again(lambda: text(system, ship)) == steered

    # Inference is killed in the middle of streams: clients are told that they may retry, and a retry is the same.
    _, ended = await while_streaming(system, ship, lambda: stack.kill("inference"))
    lost = [error.reason for tokens, error in ended if tokens]
    assert lost
    assert set(lost) == {"REPLICA_LOST"}
    assert {error.code for _, error in ended} == {"UNAVAILABLE"}
    stack.up()
    assert await again(lambda: text(system, ship)) == steered

    # A new gateway learns all that it needs.
    stack.kill("gateway")
    stack.up()
    assert await again(lambda: text(system, ship)) == steered
    assert await again(lambda: text(system, plain)) == unsteered


async def test_http_answers_as_grpc_does(stack: Stack, system: System) -> None:
    key = await system.tenant(copy("king", "ship"))
    asked = {
        "model": "live",
        "prompt": PROMPT,
        "max_tokens": 24,
        "seed": 2,
        "temperature": 0.7,
        "ignore_end_of_text": True,
    }
    body, headers = json.dumps(asked).encode(), {"content-type": "application/json", **dict(key)}

    def answered() -> str:
        with urlopen(Request(f"http://{HTTP}/v1/completions", body, headers)) as answer:
            return str(json.load(answer)["choices"][0]["text"])

    assert await asyncio.to_thread(answered) == await text(system, key)


async def test_operators_can_tell_the_processes_apart(stack: Stack, system: System) -> None:
    readers = (await system.fleet.ListReaders(sync_pb2.ListReadersRequest(), metadata=system.admin)).readers
    host = stack.inside("gateway", "import socket; print(socket.gethostname())").strip()
    assert f"{host}:8470" in {each.reader for each in readers}


def test_processes_run_as_nobody_special_and_write_nothing(stack: Stack) -> None:
    for part in ("gateway", "http", "interventions", "inference"):
        assert stack.inside(part, "import os; print(os.getuid())").strip() == "10001"
    with pytest.raises(AssertionError, match="Read-only file system"):
        stack.inside("gateway", "open('/opt/backpack/x', 'w')")


def test_replicas_load_the_kernels_that_the_image_has_for_their_processor(stack: Stack) -> None:
    if not fitting():
        pytest.skip("the image has none for this processor")
    loaded = (
        "from pathlib import Path\n"
        "found = set()\n"
        "for maps in Path('/proc').glob('[0-9]*/maps'):\n"
        "    try: found |= {line.split()[-1] for line in maps.read_text().splitlines() if '/kernels/' in line}\n"
        "    except OSError: pass\n"
        "print(*found)"
    )
    (library,) = stack.inside("inference", loaded).split()
    assert Path(library).parent.name == "prebuilt"
    assert Path(library).name.startswith(f"{fitting()[0].name}-")


async def test_a_tenant_s_key_is_printed_where_no_file_can_be_kept(stack: Stack, system: System) -> None:
    create = ("backpack", "tenant", "create", "printed", "--print-key")
    printed = stack.compose("exec", "--no-TTY", "interventions", *create)
    key = rpc.with_key(printed.strip())
    assert await again(lambda: text(system, key))


def test_ray_is_not_reached_from_outside(stack: Stack) -> None:
    reach = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)"
    address = stack.inside("inference", "import socket; print(socket.gethostbyname('inference'))").strip()
    run(
        "docker",
        "run",
        "--rm",
        "--network",
        f"{stack.project}_inside",
        "backpack-gateway",
        "python",
        "-c",
        reach,
        address,
        "9000",
    )
    for port in ("9000", "8000", "6379"):
        with pytest.raises(AssertionError, match="Error"):
            run(
                "docker",
                "run",
                "--rm",
                "--network",
                f"{stack.project}_outside",
                "backpack-gateway",
                "python",
                "-c",
                reach,
                address,
                port,
            )


def test_prometheus_reads_every_process(stack: Stack) -> None:
    ask = (
        "import json, time, urllib.request as u, urllib.parse as p\n"
        "opened = u.build_opener(u.ProxyHandler({})).open\n"
        "url = 'http://prometheus:9090/api/v1/query?' + p.urlencode({'query': 'up == 1'})\n"
        "for _ in range(60):\n"
        "    found = {r['metric']['process'] for r in json.load(opened(url))['data']['result']}\n"
        "    if len(found) == 4: break\n"
        "    time.sleep(1)\n"
        "print(*sorted(found))"
    )
    assert stack.inside("gateway", ask).split() == ["gateway", "http", "inference", "interventions"]


async def test_a_replica_is_added_without_a_pause_as_the_guide_says(stack: Stack, system: System) -> None:
    key = await system.tenant(copy("king", "ship"))
    before = await text(system, key)
    edited = stack.deploy / "ray" / "edited"
    edited.write_text((stack.deploy / "ray" / "serve.yaml").read_text().replace("count: 1", "count: 2"))
    edited.replace(stack.deploy / "ray" / "serve.yaml")  # as editors do
    stack.compose("exec", "--no-TTY", "inference", "serve", "deploy", "/etc/backpack/serve.yaml")

    loop = asyncio.get_running_loop()
    until, two = loop.time() + 300, False
    while not two and loop.time() < until:
        assert await text(system, key) == before
        with suppress(AssertionError):
            two = bool(stack.compose("exec", "--no-TTY", "inference", *HEALTH, "--replicas", "2"))
    assert two
    for _ in range(8):
        assert await text(system, key) == before


async def test_the_database_is_restored_as_the_guide_says(stack: Stack, system: System) -> None:
    key = await system.tenant(copy("king", "ship"))
    before = await text(system, key)
    owner = ("--username", "backpack_owner")
    dump = stack.output("exec", "--no-TTY", "postgres", "pg_dump", *owner, "--format", "custom", "backpack")
    await system.activate(key, await system.release(key, copy("king", "nurse")))
    stack.compose("stop", "interventions")
    how = ("--clean", "--if-exists", "--single-transaction", "--dbname", "backpack")
    stack.output("exec", "--no-TTY", "postgres", "pg_restore", *owner, *how, stdin=dump)
    assert "begins at revision" in stack.compose("run", "--rm", "interventions", "backpack", "database", "restored")
    assert "intact: " in stack.compose("run", "--rm", "interventions", "backpack", "database", "verify")
    stack.up()
    await again(lambda: system.known(key))
    assert await text(system, key) == before, "the gateway dropped what the backup doesn't know"


async def test_the_service_key_is_replaced_as_the_guide_says(stack: Stack, system: System) -> None:
    key = await system.tenant(copy("king", "ship"))
    before = await text(system, key)
    leaked = ApiKeySecret.parse(system.settings.key_for("replica")).id
    (stack.secrets / "backpack_service_key").write_text(str(ApiKeySecret.mint()))
    recreate = ("up", "--detach", "--no-build", "--wait", "--wait-timeout", "900", "--force-recreate")
    stack.compose(*recreate, "interventions", "inference", "gateway")
    assert await again(lambda: text(system, key)) == before

    ask = sync_pb2.ResolveReleasesRequest(tenant="t0", numbers=[0])
    await again(lambda: system.sync.ResolveReleases(ask, metadata=system.replica))
    request = ipb.RevokeApiKeyRequest(name=f"tenants/system/keys/{leaked}")
    await system.tenants.RevokeApiKey(request, metadata=system.admin)
    with pytest.raises(Unauthenticated), rpc.errors():
        await system.sync.ResolveReleases(ask, metadata=system.replica)
    assert await text(system, key) == before


def test_it_stops_in_good_order(stack: Stack) -> None:
    """Last: everything is stopped as an operator would, and nothing had to be killed."""
    stack.compose("stop", "http", "gateway", "inference", "interventions")
    for part in ("http", "gateway", "inference", "interventions"):
        (name,) = stack.compose("ps", "--all", "--quiet", part).split()
        code = run("docker", "inspect", "--format", "{{.State.ExitCode}}", name).strip()
        assert code == "0", (part, code)
