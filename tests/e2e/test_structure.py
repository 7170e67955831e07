"""Texts that have to be something, over the wire: unary and streamed, several at once, explained, stopped, refused."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import grpc
import pytest
from backpack_proto.v1 import inference_pb2 as pb
from backpack_serving import rpc
from backpack_serving.errors import ServiceError

from tests.e2e.conftest import System, copy

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = "The story of the king and the"
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"who": {"type": "string", "maxLength": 20}, "old": {"type": "boolean"}},
        "required": ["who", "old"],
        "additionalProperties": False,
    }
)


def _request(**sampling: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt=pb.Prompt(text=PROMPT), sampling=pb.Sampling(**{"seed": 7, **sampling}))


async def test_every_sample_is_what_the_schema_describes_and_what_a_stream_gives(system: System) -> None:
    key = await system.tenant(copy("king", "ship"))
    asked = {"max_tokens": 80, "json_schema": SCHEMA, "samples": 3, "log_probabilities": 2}
    whole, free = await asyncio.gather(
        system.inference.Generate(_request(**asked), metadata=key),
        system.inference.Generate(_request(max_tokens=20), metadata=key),
    )
    parts = await system.stream(key, PROMPT, seed=7, **asked)
    texts = [whole.text, *(sample.text for sample in whole.more_samples)]
    assert len(set(texts)) == 3
    for text in texts:
        assert set(json.loads(text)) == {"who", "old"}
    assert [whole.finish_reason, *(s.finish_reason for s in whole.more_samples)] == [pb.FINISH_REASON_STOP] * 3
    assert ["".join(part.text for part in parts if part.sample == n) for n in range(3)] == texts
    alone = await system.inference.Generate(_request(max_tokens=20), metadata=key)
    assert free.text == alone.text


async def test_a_text_may_be_cut_off_explained_and_stopped(system: System) -> None:
    key = await system.tenant()
    cut = await system.inference.Generate(_request(max_tokens=3, json_schema=SCHEMA), metadata=key)
    assert cut.finish_reason == pb.FINISH_REASON_LENGTH
    assert cut.text.startswith('{"who": "'[: len(cut.text)])
    request = _request(regex="( [a-z]{1,9}){3}[.]", max_tokens=40)
    request.explain.limit = 2
    explained = await system.inference.Generate(request, metadata=key)
    assert re.fullmatch("( [a-z]{1,9}){3}[.]", explained.text)
    assert all(token.explanation.contributions for token in explained.tokens)
    stopped = await system.inference.Generate(
        _request(grammar='start: "one" " two" " three"', stop=[" th"]), metadata=key
    )
    assert (stopped.text, stopped.finish_reason) == ("one two", pb.FINISH_REASON_STOP)
    short = await system.inference.Generate(_request(regex="[0-9]{1,2}", min_tokens=9, max_tokens=9), metadata=key)
    assert (len(short.text), short.finish_reason) == (2, pb.FINISH_REASON_STOP)


@pytest.mark.parametrize(
    ("sampling", "field", "reason", "says"),
    [
        ({"regex": "(a"}, "sampling.regex", "BAD_GRAMMAR", "unclosed group"),
        ({"grammar": "start: foo"}, "sampling.grammar", "BAD_GRAMMAR", 'unknown name: "foo"'),
        ({"json_schema": '{"type": "foo"}'}, "sampling.json_schema", "BAD_GRAMMAR", "Invalid type: foo"),
        ({"json_schema": "{"}, "sampling.json_schema", "NOT_JSON", "Expecting property name"),
        ({"json_schema": " " * 70_000}, "sampling.json_schema", "OUT_OF_RANGE", "70000 bytes; 1 to 65536"),
        ({"regex": "a", "ignore_end_of_text": True}, "sampling.ignore_end_of_text", "NOT_IN_THIS_MODE", "leave one"),
        ({"regex": "king", "bad_words": ["king", "k"]}, "sampling.regex", "NO_TOKEN", "forbidden, by bad_words"),
    ],
)
async def test_what_no_text_can_be_is_refused(
    system: System, sampling: Any, field: str, reason: str, says: str
) -> None:
    key = await system.tenant()
    for call in (
        system.inference.Generate(_request(**sampling), metadata=key),
        system.stream(key, PROMPT, **sampling),
    ):
        with pytest.raises(ServiceError) as refused:
            with rpc.errors():
                await call
        assert (refused.value.code, refused.value.reason) == ("INVALID_ARGUMENT", reason)
        (violation,) = refused.value.violations
        assert violation.field == field
        assert says in violation.description
    text = await system.inference.Generate(_request(max_tokens=3), metadata=key)
    assert text.usage.generated_tokens == 3, "the engine goes on"


async def test_who_leaves_while_it_is_compiled_harms_nobody(system: System) -> None:
    key = await system.tenant()
    hard = json.dumps({"allOf": [{"type": "string", "pattern": f"^.*b{n}.*$"} for n in range(30)]})
    call = system.inference.Generate(_request(json_schema=hard), metadata=key, timeout=0.3)
    with pytest.raises(grpc.aio.AioRpcError, match="DEADLINE_EXCEEDED"):
        await call
    answer = await system.inference.Generate(_request(regex="(good|bad)"), metadata=key)
    assert answer.text in ("good", "bad")


async def test_the_command_line_reads_files(tmp_path: Path) -> None:
    """Of a schema or a grammar; those that can't be read are named, and two forms at once refused."""
    from backpack_serving.cli.main import app
    from typer.testing import CliRunner

    (tmp_path / "bad").write_bytes(b"\xff\xfe")
    (tmp_path / "good").write_text('start: "a"')
    for words, says in (
        (("--json-schema", str(tmp_path / "none")), "does not exist"),
        (("--grammar", str(tmp_path / "bad")), "no text that can be read"),
        (("--grammar", str(tmp_path / "good"), "--regex", "a"), "given together with regex"),
    ):
        result = CliRunner().invoke(app, ["generate", "The", "--as", "harbour", "--key", "x", *words])
        assert result.exit_code != 0
        assert says in re.sub(r"[\s│]+", " ", result.output), result.output
