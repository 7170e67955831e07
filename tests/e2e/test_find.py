"""FindSenses from end to end: what is found is the model's, under the release; what is refused, and why."""

from __future__ import annotations

import asyncio
import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from backpack_lm.installed import folder_of
from backpack_lm.overlay import Overlay
from backpack_lm.patch import ReleaseContent
from backpack_lm.sense_search import CellSearch, Effect
from backpack_lm.token_counts import NAME as TOKEN_COUNTS
from backpack_proto.v1 import inference_pb2 as pb
from backpack_proto.v1 import interventions_pb2 as ipb
from backpack_serving import rpc
from backpack_serving.cli.main import app
from backpack_serving.client import AsyncClient, InvalidRequest
from backpack_serving.errors import ServiceError
from backpack_serving.inference.served_model import ServedModel
from typer.testing import CliRunner

from tests.e2e.conftest import Metadata, System, running

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPTS = ("The captain of the ship and the", "The story of the king and the")
KING = pb.Word(text="king")
EFFECTS = {
    pb.SENSE_EFFECT_UNSPECIFIED: Effect.RAISE,
    pb.SENSE_EFFECT_LOWER: Effect.LOWER,
    pb.SENSE_EFFECT_BOTH: Effect.BOTH,
}


def _zero(word: str, *senses: int) -> ipb.Edit:
    return ipb.Edit(scale=ipb.ScaleEdit(cells=[ipb.Cells(word=pb.Word(text=word), senses=senses)], factor=0.0))


async def _find(system: System, key: Metadata, **fields: Any) -> pb.FindSensesResponse:
    with rpc.errors():
        return await system.inference.FindSenses(pb.FindSensesRequest(**{"words": [KING], **fields}), metadata=key)


def _prompts(*texts: str) -> list[pb.Prompt]:
    return [pb.Prompt(text=text) for text in texts]


def _search(served: ServedModel, effect: Effect, against: str | None = None) -> CellSearch:
    (king,) = served.tokenizer.word_ids("king")
    others = None if against is None else served.tokenizer.word_ids(against)
    overlay = Overlay.compile(ReleaseContent(), served.table)
    return CellSearch(served.model, served.table, overlay, [king], others, effect, served.frequencies)


@pytest.mark.parametrize("effect", EFFECTS)
@pytest.mark.parametrize("order", [pb.SENSE_ORDER_SCORE, pb.SENSE_ORDER_USE])
async def test_what_is_found_is_the_models(system: System, served: ServedModel, effect: Any, order: Any) -> None:
    key = await system.tenant()
    fields = {"against": [pb.Word(text="queen")], "effect": effect, "order": order, "page_size": 30}
    answer = await _find(system, key, **fields)
    expected = _search(served, EFFECTS[effect], "queen").cells(0, 30, order == pb.SENSE_ORDER_USE)
    assert [(s.token.id, s.sense) for s in answer.senses] == [(cell.token, cell.sense) for cell in expected]
    for sense, cell in zip(answer.senses, expected, strict=True):
        assert sense.score == pytest.approx(cell.score, abs=1e-5)
        assert sense.frequency == cell.frequency
        assert sense.token.text == served.tokenizer.piece(cell.token)
        assert (sense.edited, sense.HasField("contribution"), sense.prompts) == (False, False, 0)
    assert [token.text for token in (*answer.words, *answer.against)] == [" king", " queen"]
    assert answer.served.release == 0
    by_default = await _find(system, key, against=fields["against"], effect=effect, order=order)
    assert list(by_default.senses) == list(answer.senses)[:20]


async def test_in_prompts_senses_add_what_explain_says(system: System) -> None:
    key = await system.tenant(_zero("ship", 1))
    answer = await _find(system, key, prompts=_prompts(*PROMPTS), effect=pb.SENSE_EFFECT_BOTH, page_size=1000)
    added: dict[tuple[int, int], list[float]] = {}
    logits = 0.0
    for text in PROMPTS:
        request = pb.ExplainRequest(prompt=pb.Prompt(text=text), target=KING, limit=1000)
        explained = await system.inference.Explain(request, metadata=key)
        logits += explained.logit
        here: dict[tuple[int, int], float] = {}
        for term in explained.contributions:
            place = term.token.id, term.sense
            here[place] = here.get(place, 0.0) + term.contribution
        for place, value in here.items():
            added.setdefault(place, []).append(value)
    assert sum(sense.contribution for sense in answer.senses) == pytest.approx(logits)
    for sense in answer.senses:
        there = added[sense.token.id, sense.sense]
        assert sense.contribution == pytest.approx(sum(there), abs=1e-9)
        assert sense.prompts == sum(value != 0 for value in there)
    sizes = [abs(sense.contribution) for sense in answer.senses]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sense.prompts for sense in answer.senses) == 2
    assert (" ship", 1) not in {(sense.token.text, sense.sense) for sense in answer.senses}, "it was scaled to zero"


async def test_the_release_decides(system: System) -> None:
    """A sense that a release takes away is found in no answer under it; in the model it still is."""
    key = await system.tenant()
    first = (await _find(system, key)).senses[0]
    number = await system.release(key, _zero(first.token.text.strip(), first.sense))
    steered, plain = [await _find(system, key, release=release) for release in (number, 0)]
    place = first.token.id, first.sense
    assert place not in {(s.token.id, s.sense) for s in steered.senses}
    assert plain.senses[0] == first
    assert list(steered.senses)[:19] == list(plain.senses)[1:]
    drafted = await _find(system, key, release=0, draft=pb.Draft(edits=[_zero(first.token.text.strip(), first.sense)]))
    assert (list(drafted.senses), bool(drafted.served.draft_digest)) == (list(steered.senses), True)
    doubled = await system.release(
        key,
        ipb.Edit(scale=ipb.ScaleEdit(cells=[ipb.Cells(word=pb.Word(token=first.token.id))], factor=2.0)),
    )
    found = (await _find(system, key, release=doubled)).senses[0]
    assert (found.token.id, found.sense, found.edited) == (*place, True)
    assert found.score == pytest.approx(2 * first.score, rel=1e-5)


async def test_pages_fit_together_and_end(system: System) -> None:
    key = await system.tenant()
    fields = {"prompts": _prompts(PROMPTS[0]), "effect": pb.SENSE_EFFECT_BOTH}
    whole = await _find(system, key, page_size=1000, **fields)
    pages, token = [], None
    while token != "":
        page = await _find(system, key, page_size=7, page_token=token or "", **fields)
        pages += page.senses
        token = page.next_page_token
    assert pages == list(whole.senses)
    assert whole.next_page_token == ""
    of_all = await _find(system, key, page_size=40)
    first = await _find(system, key)
    assert [*first.senses, *(await _find(system, key, page_token=first.next_page_token)).senses] == list(of_all.senses)
    assert len((await _find(system, key, page_size=5000)).senses) == 1000, "as many as a page may have"
    _, query, release = json.loads(base64.urlsafe_b64decode(first.next_page_token))
    last = base64.urlsafe_b64encode(json.dumps([9_990, query, release]).encode()).decode()
    page = await _find(system, key, page_size=100, page_token=last)
    assert (len(page.senses), page.next_page_token) == (10, ""), "all pages together list 10,000"
    with pytest.raises(ServiceError) as refused:
        await _find(system, key, words=[pb.Word(text="ship")], page_token=first.next_page_token)
    assert (refused.value.reason, "another search" in refused.value.message) == ("BAD_PAGE_TOKEN", True)
    await system.activate(key, await system.release(key, _zero("ship", 1)))
    await system.known(key)
    with pytest.raises(ServiceError) as refused:
        await _find(system, key, page_token=first.next_page_token)
    assert (refused.value.code, refused.value.reason) == ("ABORTED", "RELEASE_CHANGED")
    assert (await _find(system, key, page_token=first.next_page_token, release=0)).senses


@pytest.mark.parametrize(
    ("fields", "reason", "says"),
    [
        ({"words": []}, "EMPTY", "words: no word"),
        ({"words": [pb.Word(text="kingdomless")]}, "NOT_ONE_TOKEN", "words[0]: 'kingdomless' is"),
        ({"words": [KING, pb.Word(token=99_999)]}, "UNKNOWN_TOKEN", "words[1]: token 99999"),
        ({"words": [KING] * 65}, "TOO_MANY", "words: 65; at most 64"),
        ({"against": [pb.Word(text="queen")] * 65}, "TOO_MANY", "against: 65; at most 64"),
        ({"against": [pb.Word(text=" ")]}, "EMPTY", "against[0]"),
        ({"against": [KING]}, "ZERO_EFFECT", "against: the same words"),
        ({"against": [KING, KING]}, "ZERO_EFFECT", "against: the same words"),
        ({"against": [pb.Word(text="queen")], "against_all": True}, "BOTH_GIVEN", "leave it out for all words"),
        ({"effect": 9}, "UNKNOWN_VALUE", "effect: 9"),
        ({"order": 9}, "UNKNOWN_VALUE", "order: 9"),
        ({"order": pb.SENSE_ORDER_USE, "prompts": _prompts("a")}, "NOT_WITH_PROMPTS", "order: with prompts"),
        ({"prompts": _prompts(*["a"] * 17)}, "TOO_MANY", "prompts: 17; at most 16"),
        ({"prompts": _prompts("a", "")}, "EMPTY", "prompts[1]"),
        ({"prompts": [pb.Prompt(tokens=pb.TokenIds(ids=[5] * 513))]}, "TOO_LONG", "prompts[0]: 513 tokens"),
        ({"prompts": [pb.Prompt(tokens=pb.TokenIds(ids=[5] * 512))] * 9}, "TOO_LONG", "4608 tokens in all prompts"),
        ({"prompts": [pb.Prompt(text="a " * 200_000)]}, "TOO_LONG", "prompts[0]: 400000 bytes"),
        ({"page_size": -1}, "OUT_OF_RANGE", "page_size: -1"),
        ({"page_token": "!"}, "BAD_PAGE_TOKEN", "not from a page"),
        ({"page_token": base64.urlsafe_b64encode(b'[0, "a", "b"]').decode()}, "BAD_PAGE_TOKEN", "not from a page"),
        ({"page_token": base64.urlsafe_b64encode(b'[5, "a", "b"]').decode()}, "BAD_PAGE_TOKEN", "another search"),
        ({"release": -1}, "OUT_OF_RANGE", "release"),
    ],
)
async def test_bad_searches_are_refused(system: System, fields: Any, reason: str, says: str) -> None:
    key = await system.tenant()
    with pytest.raises(ServiceError) as refused:
        await _find(system, key, **fields)
    assert (refused.value.code, refused.value.reason) == ("INVALID_ARGUMENT", reason)
    assert says in refused.value.message


async def test_a_model_without_counts_finds_by_score_only(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in folder_of("micro").iterdir():
        if file.is_file() and file.name != TOKEN_COUNTS:
            (folder / file.name).symlink_to(file)
    async with running(tmp_path / "state", model=folder) as system:
        key = await system.tenant()
        assert not any(sense.HasField("frequency") for sense in (await _find(system, key)).senses)
        with pytest.raises(ServiceError) as refused:
            await _find(system, key, order=pb.SENSE_ORDER_USE)
        assert (refused.value.code, refused.value.reason) == ("FAILED_PRECONDITION", "NO_TOKEN_COUNTS")
        assert "backpack model count" in refused.value.message


async def test_the_client_collects_pages(system: System) -> None:
    key = await system.tenant()
    async with AsyncClient(system.gateway, _secret(key)) as client:
        found = await client.find_senses("king", ["queen"], effect="both", limit=1003)
        request = {"against": [pb.Word(text="queen")], "effect": pb.SENSE_EFFECT_BOTH, "page_size": 1000}
        first = await _find(system, key, **request)
        second = await _find(system, key, page_token=first.next_page_token, **{**request, "page_size": 3})
        expected = [(s.token.id, s.sense, s.score) for s in (*first.senses, *second.senses)]
        assert [(s.token.id, s.sense, s.score) for s in found.senses] == expected
        assert (found.words[0].text, found.against[0].text, found.served.release) == (" king", " queen", 0)
        of_all, bare = [await client.find_senses(found.words, against) for against in (None, ())]
        for same, against_all in ((of_all, True), (bare, False)):
            answer = await _find(system, key, against_all=against_all)
            assert [s.score for s in same.senses] == [s.score for s in answer.senses]
        assert bare.senses[0].score > of_all.senses[0].score
        (best,) = (await client.find_senses(found.words, prompts=PROMPTS[0], limit=1)).senses
        assert (best.prompts, best.contribution is not None) == (1, True)
        for wrong in ({"limit": 0}, {"limit": 10_001}, {"effect": "up"}, {"order": "name"}):
            with pytest.raises(InvalidRequest, match=next(iter(wrong))):
                await client.find_senses("king", **wrong)  # type: ignore[arg-type]


def _secret(key: Metadata) -> str:
    return key[0][1].removeprefix("Bearer ")


# ---- commands


@pytest_asyncio.fixture(loop_scope="module")
async def backpack(system: System, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A command as a tenant, one sense of whose “ship” is scaled to zero."""
    key = await system.tenant(_zero("ship", 1))
    monkeypatch.setenv("BACKPACK_GATEWAY_ADDRESS", system.gateway)
    monkeypatch.setenv("BACKPACK_KEY", _secret(key))
    monkeypatch.setitem(os.environ, "NO_COLOR", "1")

    async def call(*words: str, code: int = 0) -> str:
        result = await asyncio.to_thread(CliRunner().invoke, app, list(words))
        assert result.exit_code == code, result.output
        return " ".join(result.output.split())

    return call


async def test_find_shows_senses_the_tokens_taken_and_what_to_do_next(
    system: System, served: ServedModel, backpack: Any
) -> None:
    (king,) = served.tokenizer.word_ids("king")
    shown = await backpack("find", "king", "--limit", "3")
    best = _search(served, Effect.RAISE).cells(0, 3)
    for cell in best:
        piece = served.tokenizer.piece(cell.token)
        assert f"{piece!r} {cell.sense} {cell.score:+.2f} {cell.frequency:.1f}" in shown
    (start, *_) = served.tokenizer.encode("king")
    assert f"king: the token ' king' ({king}), as inside a text; at the start of a text it is" in shown
    assert f"({start})" in shown
    named = next(c for c in best if served.tokenizer.piece(c.token).startswith(" "))
    word = served.tokenizer.piece(named.token).strip()
    assert f"backpack try PROMPT --edit 'scale {word}:{named.sense} 0'" in shown
    lowered = await backpack("find", "king", "--against", "queen", "--lowers", "--by", "use", "--limit", "1")
    (cell,) = _search(served, Effect.LOWER, "queen").cells(0, 1, by_use=True)
    assert f"{served.tokenizer.piece(cell.token)!r} {cell.sense} {cell.score:+.2f}" in lowered
    raw = await backpack("find", "king", "--raw", "--limit", "1")
    assert raw.split("million")[1].split("█")[0] != shown.split("million")[1].split("█")[0]
    assert "--raw is against nothing" in await backpack("find", "king", "--raw", "--against", "queen", code=2)
    in_prompts = await backpack("find", "king", "--prompt", PROMPTS[0], "--prompt", PROMPTS[1])
    assert "adds prompts" in in_prompts
    refused = await backpack("find", "king", "--by", "use", "--prompt", "a", code=1)
    assert "NOT_WITH_PROMPTS" in refused
    assert "NOT_ONE_TOKEN" in await backpack("find", "kingdomless", code=1)


async def test_tokenize_shows_ids_and_both_forms_of_a_word(served: ServedModel, backpack: Any) -> None:
    text = "The king and"
    shown = await backpack("tokenize", text)
    for token in served.tokenizer.encode(text):
        assert f"{token} {served.tokenizer.piece(token)!r}" in shown
    shown = await backpack("tokenize", "king")
    start, inside = served.tokenizer.encode("king"), served.tokenizer.encode(" king")
    assert f"at the start of a text {start[0]} {served.tokenizer.piece(start[0])!r}" in shown
    assert f"inside a text {inside[0]} ' king'" in shown


async def test_a_sense_that_is_zero_is_shown_as_zero(backpack: Any, tmp_path: Path) -> None:
    for more in ((), ("--neighbours", "2"), ("--html", str(tmp_path / "ship.html"))):
        shown = await backpack("senses", "ship", "--limit", "2", *more)
        assert "1 edited 0.00 zero 2 " in shown
        assert shown.count(" 0.00 zero ") == 1
    cards = (tmp_path / "ship.html").read_text("utf-8").split("<section")
    assert [card.count("class=chip") for card in cards[2:4]] == [0, 4]
