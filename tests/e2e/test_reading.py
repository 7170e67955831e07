"""Forward passes beside the engine."""

from __future__ import annotations

import asyncio
import time

import pytest
import torch
from backpack_lm.attribution import token_log_probabilities
from backpack_lm.model import Backpack
from backpack_lm.overlay import Overlay
from backpack_proto.v1 import inference_pb2 as pb

from tests.e2e.conftest import System

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_one_text_is_read_at_a_time_though_who_asked_has_left(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    running: list[Overlay] = []
    most = 0

    def slow(model: Backpack, ids: torch.Tensor, overlay: Overlay) -> torch.Tensor:
        nonlocal most
        running.append(overlay)
        most = max(most, len(running))
        time.sleep(0.3)
        running.pop()
        return token_log_probabilities(model, ids, overlay)

    monkeypatch.setattr("backpack_serving.inference.served.token_log_probabilities", slow)
    key, request = await system.tenant(), pb.ScoreRequest(text=pb.Prompt(text="The story of the king"))
    for _ in range(3):
        call = system.inference.Score(request, metadata=key)
        await asyncio.sleep(0.1)
        call.cancel()
    await system.inference.Score(request, metadata=key)
    assert most == 1
