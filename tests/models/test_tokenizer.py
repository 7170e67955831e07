"""Text, tokens and words, on GPT-2's tokenizer where it is at hand and on the default model's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from backpack_lm.tokenizer import END_OF_TEXT, Detokenizer, Tokenizer, WordError, WordPolicy
from backpack_serving.settings import default_model
from hypothesis import given
from hypothesis import strategies as st

OURS = Tokenizer.read(default_model() / "tokenizer.json")
BROKEN = "\N{REPLACEMENT CHARACTER}"
GPT2 = Path(__file__).parents[3] / "shared/data/tokenizers/gpt2/tokenizer.json"


def test_gpt2s_published_ids() -> None:
    if not GPT2.exists():
        pytest.skip("GPT-2's tokenizer isn't on this machine")
    tokenizer = Tokenizer.read(GPT2)
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.piece(995) == " world"


@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    assert OURS.decode(OURS.encode(text)) == text


def test_a_file_that_asks_for_cutting_and_filling_up_gets_neither(tmp_path: Path) -> None:
    values = json.loads((default_model() / "tokenizer.json").read_text("utf-8"))
    values["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    values["padding"] = {
        **{"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None},
        **{"pad_id": 0, "pad_type_id": 0, "pad_token": END_OF_TEXT},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(values), "utf-8")
    text = "The story of the king"
    assert Tokenizer.read(tmp_path / "tokenizer.json").encode(text) == OURS.encode(text)


def _grow(ids: list[int], step: int) -> list[str]:
    stream = Detokenizer(OURS)
    parts = [stream.add(ids[at : at + step]) for at in range(0, len(ids), step)]
    return [*parts, stream.flush()]


@given(st.text(), st.integers(1, 5))
def test_a_growing_text_is_the_whole_text_and_never_a_broken_character(text: str, step: int) -> None:
    parts = _grow(OURS.encode(text), step)
    assert "".join(parts) == text
    if BROKEN not in text:
        assert not any(BROKEN in part for part in parts)


@given(st.lists(st.integers(0, OURS.vocab_size - 1)), st.integers(1, 5))
def test_bytes_that_are_no_text_become_replacement_characters(ids: list[int], step: int) -> None:
    assert "".join(_grow(ids, step)) == OURS.decode(ids)


def test_special_tokens_are_never_read_out_of_a_text() -> None:
    ids = OURS.encode("<|endoftext|>")
    assert OURS.end_of_text not in ids
    assert OURS.decode(ids) == "<|endoftext|>"


def test_words_are_looked_up_with_a_leading_space() -> None:
    (nurse,) = OURS.word_ids("nurse")
    assert OURS.piece(nurse) == " nurse"
    assert OURS.word_ids(" nurse ") == (nurse,)


def test_a_word_of_several_tokens_needs_a_policy() -> None:
    with pytest.raises(WordError, match=r"'kingdomless' is \d tokens .*; choose another word, or"):
        OURS.word_ids("kingdomless")
    several = OURS.word_ids("kingdomless", WordPolicy.ALL)
    assert len(several) > 1
    assert OURS.word_ids("kingdomless", WordPolicy.FIRST) == several[:1]
    with pytest.raises(WordError, match="not a word"):
        OURS.word_ids("  ")


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(ValueError, match=r"t\.json is not a tokenizer"):
        Tokenizer.read(tmp_path / "t.json")
