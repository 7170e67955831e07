"""A replica of two ranks behind a gateway: the tokens of one, and a lost rank is a lost replica."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
from backpack_lm.config import ConfigError
from backpack_proto.v1 import inference_pb2 as pb
from backpack_serving import rpc
from backpack_serving.errors import ServiceError
from backpack_serving.inference.served_model import ServedModel
from backpack_serving.sampling import SamplingParams

from tests.e2e.conftest import ANYWHERE, RUN, System, copy, running, topic
from tests.e2e.starts import read_until_served
from tests.e2e.test_embedded import _oracle, _overlay

PROMPT = "The story of the king and the"


def _other_ranks() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "backpack_serving.inference.rank" in child.cmdline()]


@pytest.fixture
async def shared(tmp_path: Path) -> AsyncIterator[System]:
    async with running(tmp_path, slots=4, ranks=2) as system:
        yield system
    assert not _other_ranks()


async def test_two_ranks_serve_what_the_oracle_says_until_one_is_gone(shared: System, served: ServedModel) -> None:
    (other,) = _other_ranks()
    other.terminate()  # as those do who stop all processes of a service: rank 0 drains, and ends it
    keys = [await shared.tenant(*edits) for edits in ((), (copy("king", "nurse"), topic("nurse", "patient")))]
    ids, sampling = served.tokenizer.encode(PROMPT), SamplingParams(max_tokens=16, temperature=0.7, top_k=30, seed=2)
    streams = await asyncio.gather(
        *(shared.stream(key, PROMPT, max_tokens=16, seed=2, temperature=0.7, top_k=30) for key in keys)
    )
    for key, stream in zip(keys, streams, strict=True):
        overlay = await _overlay(shared, key, served)
        assert [token.id for part in stream for token in part.tokens] == _oracle(served, overlay, ids, sampling)

    request = pb.GenerateStreamRequest(
        prompt=pb.Prompt(text=PROMPT), sampling=pb.Sampling(max_tokens=480, seed=1, ignore_end_of_text=True)
    )
    calls = [aiter(shared.inference.GenerateStream(request, metadata=key)) for key in keys]
    for call in calls:
        await anext(call)
    other.suspend()
    since = time.monotonic()
    for call in calls:
        with pytest.raises(ServiceError) as lost, rpc.errors():
            async for _ in call:
                pass
        assert (lost.value.code, lost.value.reason) == ("UNAVAILABLE", "REPLICA_LOST")
        assert lost.value.retry_after is not None
    assert time.monotonic() - since < 2
    with pytest.raises(ServiceError) as none, rpc.errors():
        await shared.stream(keys[0], PROMPT, max_tokens=1)
    assert none.value.code == "UNAVAILABLE"
    assert none.value.retry_after is not None


async def test_a_number_of_ranks_that_does_not_fit_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"3 ranks can't share 8 senses.*can: 1, 2$"):
        async with running(tmp_path, ranks=3):
            pass
    assert not _other_ranks()


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["rank 0", "the other"])
def test_no_rank_outlives_another(tmp_path: Path, lost: str) -> None:
    """If the other one is lost, `backpack run` ends with 1, so that whoever supervises it starts it again."""
    addresses = {f"BACKPACK_{name.upper()}": address for name, address in ANYWHERE.items()}
    environment = {**os.environ, **addresses, "BACKPACK_STATE": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*RUN, "--ranks", "2", "--no-examples"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as run:
        read_until_served(run)
        (other,) = psutil.Process(run.pid).children()
        (run if lost == "rank 0" else other).kill()
        assert run.wait(30) == (-signal.SIGKILL if lost == "rank 0" else 1)
        for _ in range(100):
            if not other.is_running() or other.status() == psutil.STATUS_ZOMBIE:
                break
            time.sleep(0.05)
        else:
            pytest.fail("it is still there")
