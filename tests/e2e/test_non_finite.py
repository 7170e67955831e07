"""A sense table is damaged after it was checked: whose text it spoils is told, and all others are served."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from backpack_lm import mapped_table
from backpack_lm.installed import folder_of
from backpack_lm.kernels import Precision
from backpack_proto.v1 import inference_pb2 as pb
from backpack_serving.inference.served_model import ServedModel

from tests.e2e.conftest import running


async def test_a_damaged_word_ends_its_requests_with_internal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_table, "folder", lambda name: tmp_path)
    served = ServedModel.read(folder_of("micro"), Precision.FLOAT32)
    (king,) = served.tokenizer.word_ids("king")
    row = served.manifest.config.num_senses * served.manifest.config.n_embd * 4
    (file,) = tmp_path.glob("*.float32.*")
    async with running(tmp_path / "state", slots=2) as system:
        with file.open("r+b") as table:
            table.seek(king * row)
            table.write(b"\xff" * row)  # NaN
        key = await system.tenant()
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await system.stream(key, "The king", max_tokens=4)
        assert error.value.code() is grpc.StatusCode.INTERNAL
        assert "no numbers" in error.value.details()
        with pytest.raises(grpc.aio.AioRpcError, match="no numbers"):
            await system.inference.Explain(pb.ExplainRequest(prompt=pb.Prompt(text="The king")), metadata=key)
        asked = pb.MapSenseRequest(words=[pb.Word(text=word) for word in ("king", "ship", "sea")])
        for toward in ([], asked.words[1:2]):
            with pytest.raises(grpc.aio.AioRpcError, match="no map can hold") as error:
                await system.inference.MapSense(pb.MapSenseRequest(words=asked.words, toward=toward), metadata=key)
            assert error.value.code() is grpc.StatusCode.INTERNAL
        parts = await system.stream(key, "The ship", max_tokens=4, temperature=0, ignore_end_of_text=True)
        assert sum(len(part.tokens) for part in parts) == 4
