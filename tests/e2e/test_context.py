"""A replica that offers a shorter context than its model, and one whose caches hold less than that."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from backpack_proto.v1 import inference_pb2 as pb
from backpack_serving import rpc
from backpack_serving.errors import ServiceError

from tests.e2e.conftest import Metadata, System, running


async def _refused(system: System, key: Metadata, length: int, new: int) -> ServiceError:
    prompt = pb.Prompt(tokens=pb.TokenIds(ids=[5] * length))
    request = pb.GenerateRequest(prompt=prompt, sampling=pb.Sampling(max_tokens=new))
    with pytest.raises(ServiceError) as error, rpc.errors():
        await system.inference.Generate(request, metadata=key)
    return error.value


async def test_a_longer_request_gets_the_error_of_the_models_context(tmp_path: Path) -> None:
    async with running(tmp_path, slots=2, context=40) as system:
        key = await system.tenant()
        model = await system.inference.GetModel(pb.GetModelRequest(), metadata=key)
        assert model.context_size == 40
        error = await _refused(system, key, 41, 1)
        assert (error.reason, "41 tokens; the context holds 40" in error.message) == ("TOO_LONG", True)
        error = await _refused(system, key, 30, 11)
        assert (error.reason, "together at most 40" in error.message) == ("TOO_LONG", True)
        (*_, last) = await system.stream(key, "The story of the king and the", max_tokens=20, ignore_end_of_text=True)
        assert last.usage.generated_tokens == 20


async def test_more_than_the_caches_hold_is_refused_and_what_they_hold_in_turn_is_made(tmp_path: Path) -> None:
    """Four streams that grow, in memory for two and a half."""
    async with running(tmp_path, slots=4, cache_tokens=300) as system:
        key = await system.tenant()
        error = await _refused(system, key, 260, 70)
        assert error.reason == "REQUEST_TOO_LARGE"
        assert error.message == "260 prompt tokens and 70 new ones; this replica's caches hold 320"
        how = {"max_tokens": 120, "ignore_end_of_text": True, "temperature": 0}
        texts = [f"The story of the {word} and the" for word in ("king", "ship", "sea", "war")]
        together = await asyncio.gather(*(system.stream(key, text, **how) for text in texts))
        for text, parts in zip(texts, together, strict=True):
            alone = await system.stream(key, text, **how)
            assert [t.id for p in parts for t in p.tokens] == [t.id for p in alone for t in p.tokens]
            assert parts[-1].usage.generated_tokens == 120
        assert system.metrics is not None
        assert (system.metrics.registry.get_sample_value("backpack_replica_preemptions_total") or 0) > 0
