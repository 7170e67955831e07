"""Forward passes beside the engine."""

from __future__ import annotations

import asyncio
import time

import pytest
from backpack_lm.overlay import Overlay
from backpack_proto.v1 import inference_pb2 as pb
from backpack_serving.inference.served_model import ServedModel

from tests.e2e.conftest import System

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_one_text_is_read_at_a_time_though_who_asked_has_left(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    running: list[Overlay] = []
    most = 0

    def slow(served: ServedModel, ids: tuple[int, ...], overlay: Overlay) -> list[float]:
        nonlocal most
        running.append(overlay)
        most = max(most, len(running))
        time.sleep(0.3)
        running.pop()
        return score(served, ids, overlay)

    score = ServedModel.score
    monkeypatch.setattr(ServedModel, "score", slow)
    key, request = await system.tenant(), pb.ScoreRequest(text=pb.Prompt(text="The story of the king"))
    for _ in range(3):
        call = system.inference.Score(request, metadata=key)
        await asyncio.sleep(0.1)
        call.cancel()
    await system.inference.Score(request, metadata=key)
    assert most == 1
