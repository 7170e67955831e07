"""The whole compose stack in containers: built, brought up, used, killed part by part, restored, taken down.

`make test-containers` runs it; it needs a container engine that `docker` reaches. PostgreSQL and Prometheus come
from their images, or from Debian (standins.Dockerfile) where those can't be pulled; Grafana is left out there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from backpack_proto.v1 import inference_pb2 as pb
from backpack_serving import rpc
from backpack_serving.errors import ServiceError, Unavailable

from tests.deploy.stack import GATEWAY, INTERVENTIONS, PROMPT, Stack, again, needs_engine, prepared, run, text
from tests.e2e.conftest import System, copy

pytestmark = needs_engine


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with prepared(tmp_path_factory.mktemp("stack"), "backpack-test") as stack:
        stack.up()
        yield stack


async def test_the_stack_serves_steered_text_and_survives_its_parts(stack: Stack) -> None:
    system = System(GATEWAY, INTERVENTIONS, stack.settings)
    try:
        await _the_story(stack, system)
    finally:
        await system.close()


async def _the_story(stack: Stack, system: System) -> None:
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

    # Inference is killed in the middle of a stream: the client is told that it may retry, and a retry is the same.
    request = pb.GenerateStreamRequest(
        prompt=pb.Prompt(text=PROMPT), sampling=pb.Sampling(max_tokens=480, seed=1, ignore_end_of_text=True)
    )
    call = aiter(system.inference.GenerateStream(request, metadata=ship))
    await anext(call)
    stack.kill("inference")
    with pytest.raises(ServiceError) as lost, rpc.errors():
        async for _ in call:
            pass
    assert (lost.value.code, lost.value.reason) == ("UNAVAILABLE", "REPLICA_LOST")
    stack.up()
    assert await again(lambda: text(system, ship)) == steered

    # A new gateway learns all that it needs.
    stack.kill("gateway")
    stack.up()
    assert await again(lambda: text(system, ship)) == steered
    assert await again(lambda: text(system, plain)) == unsteered


def test_processes_run_as_nobody_special_and_write_nothing(stack: Stack) -> None:
    for part in ("gateway", "interventions", "inference"):
        assert stack.inside(part, "import os; print(os.getuid())").strip() == "10001"
    with pytest.raises(AssertionError, match="Read-only file system"):
        stack.inside("gateway", "open('/opt/backpack/x', 'w')")


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
        "url = 'http://prometheus:9090/api/v1/query?' + p.urlencode({'query': 'up == 1'})\n"
        "for _ in range(60):\n"
        "    found = {r['metric']['process'] for r in json.load(u.urlopen(url))['data']['result']}\n"
        "    if len(found) == 3: break\n"
        "    time.sleep(1)\n"
        "print(*sorted(found))"
    )
    assert stack.inside("gateway", ask).split() == ["gateway", "inference", "interventions"]


def test_it_stops_in_good_order(stack: Stack) -> None:
    """Last: everything is stopped as an operator would, and nothing had to be killed."""
    stack.compose("stop", "gateway", "inference", "interventions")
    for part in ("gateway", "inference", "interventions"):
        (name,) = stack.compose("ps", "--all", "--quiet", part).split()
        code = run("docker", "inspect", "--format", "{{.State.ExitCode}}", name).strip()
        assert code == "0", (part, code)
