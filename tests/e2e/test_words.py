"""Maps of a sense, uses of a word, a canary asked for by name, and replicas: from end to end, refusals included."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from backpack_lm.overlay import Overlay
from backpack_lm.patch import ReleaseContent
from backpack_lm.sense_map import map_sense
from backpack_proto.v1 import interventions_pb2 as ipb
from backpack_serving import rpc
from backpack_serving.cli.main import app
from backpack_serving.client import AsyncClient, Scale
from backpack_serving.errors import Forbidden, InvalidRequest, NotFound, PreconditionFailed
from backpack_serving.inference.model_reader import ModelReader
from backpack_serving.inference.served_model import ServedModel
from backpack_serving.wire.references import read_position
from typer.testing import CliRunner

from tests.e2e.conftest import Metadata, System, copy

pytestmark = pytest.mark.asyncio(loop_scope="module")

WORDS = ["king", "queen", "ship", "sea"]


def _secret(key: Metadata) -> str:
    return dict(key)["authorization"].removeprefix("Bearer ")


async def _caller_only(system: System, key: Metadata) -> str:
    """A key of the same tenant that may call, and nothing else."""
    (channel,) = (await system.releases.ListChannels(ipb.ListChannelsRequest(), metadata=key)).channels
    parent = channel.name.partition("/channels/")[0]
    request = ipb.CreateApiKeyRequest(parent=parent, roles=[ipb.ROLE_CALLER])
    made = await system.tenants.CreateApiKey(request, metadata=system.admin)
    await system.known(rpc.with_key(made.secret))
    return str(made.secret)


async def test_a_map_is_of_the_release(system: System, served: ServedModel) -> None:
    key = await system.tenant(copy("king", "ship"))
    ids = [served.tokenizer.word_ids(word)[0] for word in WORDS]
    async with AsyncClient(system.gateway, _secret(key)) as client:
        plain = await client.map_sense(3, WORDS, limit=5, release=0)
        expected = map_sense(
            served.model, served.table, Overlay.compile(ReleaseContent(), served.table), ids, 3, limit=5
        )
        assert [word.token.id for word in plain.words] == ids
        assert [(word.x, word.y) for word in plain.words] == [pytest.approx(point) for point in expected.points]
        assert [token.id for token, _ in plain.x.positive] == [token for token, _ in expected.axes[0].positive]
        assert plain.y.share == pytest.approx(expected.axes[1].share)
        steered = await client.map_sense(3, WORDS, toward="sea", against=["king", "queen"])
        king, _, ship, _ = steered.words
        assert (king.x, king.y) == (ship.x, ship.y), "king has the senses of ship"
        assert ([word.edited for word in steered.words], steered.served.release) == ([True, False, False, False], 1)
        assert await client.map_sense(3, WORDS, toward=["king", "king", "sea"], against=["king", "sea"])
        drafted = await client.map_sense(3, WORDS, toward="sea", draft=[Scale("ship", 0)])
        assert (drafted.words[2].x, drafted.words[2].norm) == (0, 0)
        for fields, reason in (
            ({"sense": 99}, "OUT_OF_RANGE"),
            ({"words": WORDS[:2]}, "TOO_FEW"),
            ({"words": ["king", "queen", "king"]}, "DUPLICATE"),
            ({"words": ["kingdomless", *WORDS]}, "NOT_ONE_TOKEN"),
            ({"words": WORDS * 65}, "TOO_MANY"),
            ({"against": ["king"]}, "NOT_ALONE"),
            ({"toward": ["king"], "against": ["king"]}, "ZERO_EFFECT"),
            ({"toward": ["king", "king"], "against": ["king"]}, "ZERO_EFFECT"),
            ({"toward": ["king", "sea"], "against": ["sea", "king", "king", "sea"]}, "ZERO_EFFECT"),
            ({"limit": 101}, "OUT_OF_RANGE"),
        ):
            with pytest.raises(InvalidRequest) as refused:
                await client.map_sense(**{"sense": 3, "words": WORDS, **fields})
            assert refused.value.reason == reason


async def test_uses_are_shown_to_whoever_may_author(system: System, served: ServedModel) -> None:
    key = await system.tenant(copy("king", "ship"))
    async with AsyncClient(system.gateway, _secret(key)) as client:
        found = await client.uses("king", limit=2)
        assert (found.token.text, len(found.uses), found.served.release) == (" king", 2, 1)
        assert found.occurrences > 2
        assert found.text_tokens > 100_000
        for use in found.uses:
            assert len(use.senses) == served.manifest.config.num_senses
            assert all(one.most >= one.contribution / len(use.after) for one in use.senses)
            assert all(0 <= one.strongest < len(use.after) for one in use.senses)
        plain = await client.uses("king", limit=2, release=0)
        assert [(use.before, use.after) for use in plain.uses] == [(use.before, use.after) for use in found.uses]
        assert plain.uses[0].senses != found.uses[0].senses
        none = await client.uses("king", limit=2, draft=[Scale("king", 0)])
        assert {one.contribution for use in none.uses for one in use.senses} == {0.0}
        with pytest.raises(InvalidRequest):
            await client.uses("king", limit=33)
    async with AsyncClient(system.gateway, await _caller_only(system, key)) as caller:
        assert await caller.map_sense(0, WORDS)
        with pytest.raises(Forbidden):
            await caller.uses("king")


async def test_a_model_without_text_has_no_uses(tmp_path: Path, served: ServedModel) -> None:
    reader = ModelReader(replace(served, folder=tmp_path))
    with pytest.raises(PreconditionFailed) as refused:
        await reader.uses("t", 5, Overlay.compile(ReleaseContent(), served.table), 1)
    assert refused.value.reason == "NO_HELD_OUT_TEXT"


async def test_a_canary_is_asked_for_by_name(system: System) -> None:
    key = await system.tenant(copy("king", "ship"))
    second = await system.release(key, copy("king", "nurse"))
    async with AsyncClient(system.gateway, _secret(key)) as client:
        with pytest.raises(PreconditionFailed) as no_canary:
            await client.score("The king", channel="live:canary")
        assert no_canary.value.reason == "NO_CANARY"
        with pytest.raises(NotFound, match="channels/nowhere doesn't exist") as refused:
            await client.score("The king", channel="nowhere:canary")
        assert refused.value.reason == "NO_SUCH_CHANNEL"
        (live,) = (await system.releases.ListChannels(ipb.ListChannelsRequest(), metadata=key)).channels
        request = ipb.StartCanaryRequest(channel="channels/live", release=second, permille=1, etag=live.etag)
        position = (await system.releases.StartCanary(request, metadata=key)).position
        await client.score("The king", since=read_position(position))
        for name in ("a", "b", "c"):
            score = await client.score("The king", channel="live:canary", request_key=name)
            assert (score.served.release, score.served.canary, score.served.channel) == (second, True, "live")
        both = await client.compare_scores("The king", ["live:canary", second, 1])
        assert [one.served.release for one in both] == [second, second, 1]


async def test_only_operators_see_replicas_and_their_load(system: System) -> None:
    key = await system.tenant()
    async with AsyncClient(system.gateway, _secret(system.admin)) as operator:
        (replica,) = await operator.replicas()
        assert (replica.slots, replica.usable, replica.draining) == (4, True, False)
        assert (replica.running, replica.sent, replica.load) == (0, 0, 0)
        assert replica.address
        async with AsyncClient(system.gateway, _secret(key)) as client:
            parts = client.stream("The king", coalesce=0, channel="live")
            await anext(parts)
            (busy,) = await operator.replicas()
            assert busy.sent > 60
            assert busy.load >= busy.sent / 4
            await parts.aclose()
            with pytest.raises(Forbidden):
                await client.replicas()


async def test_commands_show_all_that(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    key = await system.tenant(copy("king", "ship"))
    monkeypatch.setenv("BACKPACK_GATEWAY_ADDRESS", system.gateway)
    monkeypatch.setenv("BACKPACK_ADMIN_KEY", _secret(system.admin))
    monkeypatch.setenv("BACKPACK_KEY", _secret(key))
    monkeypatch.setattr("backpack_serving.cli.client.out._width", 200)

    async def command(*words: str, code: int = 0) -> str:
        result = await asyncio.to_thread(CliRunner().invoke, app, list(words), env={"NO_COLOR": "1"})
        assert result.exit_code == code, result.output
        return str(result.output)

    shown = await command("map", "3", *WORDS, "--toward", "sea")
    assert "' king'" in shown
    assert "edited" in shown
    assert "% of the variance" in shown
    uses = await command("uses", "king", "--limit", "2")
    assert " king" in uses
    assert "most for" in uses
    assert "2 of " in uses
    listed: Any = await command("replicas")
    assert "takes requests" in listed
    assert "yes" in listed
    assert "NO_CANARY" in await command("score", "The king", "--channel", "live:canary", code=1)
    assert "NO_CANARY" in await command("compare", "The king", "--release", "live:canary", code=1)
    edit = '{"scale": {"cells": [{"word": "king"}], "factor": 0}}'
    assert "over release 1 of" in await command(
        "try", "The king", "--edit", edit, "--release", "1", "--max-tokens", "2"
    )
    assert "is no edit" in await command("try", "The king", "--edit", '{"scale": 3}', code=1)
    assert "names no channel" in await command("release", "rollback", "--channel", "live:canary", code=2)
