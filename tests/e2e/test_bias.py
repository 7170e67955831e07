"""Releases that raise, lower and forbid words, from their revision to what is served, scored and explained."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Sequence

import grpc
import pytest
from backpack_proto.v1 import inference_pb2 as pb
from backpack_proto.v1 import interventions_pb2 as ipb
from backpack_serving.cli.main import app
from backpack_serving.inference.served_model import ServedModel
from typer.testing import CliRunner

from tests.e2e.conftest import Metadata, System

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = "The bank lent him a large sum of"
SAID = "The bank lent him money and"


def _bias(*words: str, amount: float) -> ipb.Edit:
    return ipb.Edit(bias=ipb.BiasEdit(words=[pb.Word(text=word) for word in words], amount=amount))


async def _samples(system: System, key: Metadata, count: int, **sampling: float) -> list[pb.GenerateResponse]:
    made = []
    for seed in range(count):
        request = pb.GenerateRequest(
            prompt=pb.Prompt(text=PROMPT),
            sampling=pb.Sampling(max_tokens=40, temperature=0.7, top_k=30, seed=seed, **sampling),  # type: ignore[arg-type]
        )
        made.append(await system.inference.Generate(request, metadata=key))
    return made


def _say(made: Sequence[pb.GenerateResponse], word: str) -> int:
    return sum(word in answer.text for answer in made)


async def test_a_forbidden_word_is_never_said(system: System) -> None:
    plain, never = await system.tenant(), await system.tenant(_bias("money", amount=-math.inf))
    assert _say(await _samples(system, plain, 20), "money") > 2
    made = await _samples(system, never, 20)
    assert _say(made, "money") == 0
    assert {answer.served.release for answer in made} == {1}
    pleading = await _samples(system, never, 3, logit_bias={(await _token(system, never, " money")): 100.0})  # type: ignore[arg-type]
    assert _say(pleading, "money") == 0, "no request brings it back"
    read = await system.patches.GetRevision(ipb.GetRevisionRequest(name="patches/p/revisions/1"), metadata=never)
    (edit,) = read.revision.edits
    assert [word.text for word in edit.bias.words] == [" money"]
    assert edit.bias.amount == -math.inf
    entries = (await system.audit.ListAuditEntries(ipb.ListAuditEntriesRequest(), metadata=never)).entries
    assert {"CreateRevision", "CreateRelease", "Activate"} <= {entry.method for entry in entries}
    assert (await system.audit.VerifyChain(ipb.VerifyChainRequest(), metadata=never)).intact


async def _token(system: System, key: Metadata, text: str) -> int:
    (token,) = (await system.inference.Tokenize(pb.TokenizeRequest(text=text), metadata=key)).tokens
    return int(token.id)


async def test_a_raised_and_a_lowered_word(system: System) -> None:
    often = await system.tenant(_bias("money", "gold", amount=4.0), _bias("gold", amount=-9.0))
    made = await _samples(system, often, 8)
    assert _say(made, "money") == 8
    assert _say(made, "gold") == 0


async def test_a_text_whose_end_is_forbidden_goes_on_to_its_limit(system: System, served: ServedModel) -> None:
    """And one whose end is raised ends at once: what ends a text is a token as any other."""
    ends = [pb.Word(token=token) for token in served.manifest.end_tokens]
    for amount, reason, length in ((-math.inf, pb.FINISH_REASON_LENGTH, 40), (100.0, pb.FINISH_REASON_STOP, 1)):
        key = await system.tenant(ipb.Edit(bias=ipb.BiasEdit(words=ends, amount=amount)))
        made = await _samples(system, key, 2)
        assert [(answer.finish_reason, len(answer.tokens)) for answer in made] == [(reason, length)] * 2


async def test_what_is_explained_is_what_is_served(system: System, served: ServedModel) -> None:
    (token,) = served.tokenizer.word_ids("money")
    plain, raised = await system.tenant(), await system.tenant(_bias("money", amount=2.5))
    never = await system.tenant(_bias("money", amount=-math.inf))
    request = pb.ExplainRequest(prompt=pb.Prompt(text=PROMPT), target=pb.Word(text="money"), limit=5)
    own, more, none = [await system.inference.Explain(request, metadata=key) for key in (plain, raised, never)]
    assert (own.bias, more.bias, none.bias) == (0.0, 2.5, -math.inf)
    for found in (own, more):
        listed = math.fsum(c.contribution for c in found.contributions)
        assert listed + found.unlisted + found.bias == pytest.approx(found.logit, abs=1e-9)
    assert more.logit == pytest.approx(own.logit + 2.5, abs=1e-4)
    assert none.logit == none.target.log_probability == -math.inf
    assert list(none.contributions) == list(own.contributions)
    asked = pb.GenerateRequest(
        prompt=pb.Prompt(text=PROMPT),
        sampling=pb.Sampling(max_tokens=12, temperature=0.0, log_probabilities=0),
        explain=pb.ExplainOptions(limit=3),
    )
    (biased,) = [t for t in (await system.inference.Generate(asked, metadata=raised)).tokens if t.id == token][:1]
    assert biased.explanation.bias == 2.5
    listed = math.fsum(c.contribution for c in biased.explanation.contributions)
    assert listed + biased.explanation.unlisted + 2.5 == pytest.approx(biased.explanation.logit, abs=1e-9)


async def test_a_text_that_says_what_is_forbidden_has_no_probability(system: System) -> None:
    key = await system.tenant(_bias("money", amount=-math.inf))
    score = await system.inference.Score(pb.ScoreRequest(text=pb.Prompt(text=SAID)), metadata=key)
    assert (score.log_probability, score.perplexity) == (-math.inf, math.inf)
    assert [t.text for t in score.tokens if t.log_probability == -math.inf] == [" money"]
    compared = await system.inference.Compare(
        pb.CompareRequest(
            prompt=pb.Prompt(text=PROMPT),
            releases=[pb.ReleaseChoice(number=0), pb.ReleaseChoice(number=1)],
            targets=[pb.Word(text="money")],
        ),
        metadata=key,
    )
    before, after = (one.next.targets[0].log_probability for one in compared.releases)
    assert math.isfinite(before)
    assert after == -math.inf


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (_bias("money", amount=math.nan), "nan; at most ±100, or −∞ to forbid a word"),
        (_bias("money", amount=-101), "at most ±100"),
        (_bias("money", amount=0), "changes nothing"),
        (_bias(amount=1), "at least one word"),
        (_bias("kingdomless", amount=1), "is 2 tokens"),
    ],
    ids=["NaN", "too far", "nothing", "no word", "several tokens"],
)
async def test_a_bad_bias_is_refused_when_it_is_written(system: System, edit: ipb.Edit, says: str) -> None:
    key = await system.tenant()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await system.release(key, edit)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert says in str(refused.value.details())


async def test_commands_bias_words_and_say_what_that_does(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    key = await system.tenant()
    monkeypatch.setattr("backpack_serving.cli.client.out._width", 200)
    monkeypatch.setenv("BACKPACK_GATEWAY_ADDRESS", system.gateway)
    monkeypatch.setenv("BACKPACK_INTERVENTIONS_ADDRESS", system.interventions)
    monkeypatch.setenv("BACKPACK_KEY", key[0][1].removeprefix("Bearer "))

    async def backpack(*words: str) -> str:
        result = await asyncio.to_thread(CliRunner().invoke, app, list(words))
        assert result.exit_code == 0, result.output
        # The servers of this process log to the same place.
        return "".join(line for line in result.output.splitlines(keepends=True) if "[info " not in line)

    less = await backpack("patch", "bias", "frugal", "ship", "money", "--by", "-5")
    assert "-5 to: ' ship', 'ship', ' money'\n" in less
    assert "frugal/revisions/1" in less
    assert "never: ' money'\n" in await backpack("patch", "bias", "frugal", "money", "--never")
    (shown,) = json.loads(await backpack("patch", "show", "frugal:2"))
    assert shown["bias"]["amount"] == "-Infinity"
    for number in ("1", "2"):
        assert f"releases/{number} " in await backpack("release", "create", f"frugal:{number}")

    explain = ("explain", "He had some", "--limit", "2", "--target", "money", "--release")
    plain, lowered, never = [await backpack(*explain, number) for number in ("0", "1", "2")]
    assert "bias" not in plain
    assert "release's bias on this word: -5.000" in lowered
    assert "' money' can't come next: the release forbids it, so its logit is −∞\nits senses" in never
    (before,), (after,) = (re.findall(r"logit of .*?: (\S+)", text) for text in (plain, lowered))
    assert float(after) == pytest.approx(float(before) - 5, abs=2e-3)

    text = "He had some money and"
    assert " -inf" in await backpack("score", text, "--release", "2")
    compared = await backpack("compare", text, "--score", "--release", "2", "--release", "1")
    assert "' money' +inf" in compared
    await backpack("release", "create", "frugal:2", "frugal:1")
    compared = await backpack("compare", text, "--score", "--release", "2", "--release", "3")
    assert "nan" not in compared, "both forbid it"

    generate = ("generate", PROMPT, "--explain", "1", "--max-tokens", "1", "--temperature", "0")
    assert "release's bias" not in await backpack(*generate)
    await backpack("patch", "bias", "rich", "money", "--by", "9")
    await backpack("release", "create", "rich:1")
    assert re.search(r"\+9\.00  release's bias", await backpack(*generate, "--release", "4"))
