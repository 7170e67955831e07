"""Text, tokens and words, on GPT-2's tokenizer where it is at hand and on the default model's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from backpack_lm.adapting.adapter import Adapter
from backpack_lm.config import BackpackConfig
from backpack_lm.generation import end_tokens
from backpack_lm.installed import ADAPTER, folder_of, weights
from backpack_lm.manifest import Manifest
from backpack_lm.tokenizer import END_OF_TEXT, Detokenizer, Tokenizer, WordError, WordPolicy, begin_texts
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as HFTokenizer
from transformers import AutoTokenizer

OURS = Tokenizer.read(folder_of("micro") / "tokenizer.json")
THEIRS = HFTokenizer.from_file(str(folder_of("micro") / "tokenizer.json"))
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
    values = json.loads((folder_of("micro") / "tokenizer.json").read_text("utf-8"))
    values["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    values["padding"] = {
        **{"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None},
        **{"pad_id": 0, "pad_type_id": 0, "pad_token": END_OF_TEXT},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(values), "utf-8")
    text = "The story of the king"
    assert Tokenizer.read(tmp_path / "tokenizer.json").encode(text) == OURS.encode(text)


def test_a_text_begins_as_the_file_says() -> None:
    """And where it goes on, nothing is added; nor behind it, where the model is to go on."""
    assert OURS.bos_ids == ()
    assert OURS.encode_prompt("the king") == OURS.encode("the king")
    theirs = HFTokenizer.from_file(str(folder_of("micro") / "tokenizer.json"))
    begin_texts(theirs, END_OF_TEXT)
    begin_texts(theirs, END_OF_TEXT)  # once is enough
    ours, end = Tokenizer(theirs), THEIRS.token_to_id(END_OF_TEXT)
    assert ours.bos_ids == (end,)
    assert ours.encode("the king") == OURS.encode("the king")
    for text in ("the king", "", "a\nb"):
        assert ours.encode_prompt(text) == theirs.encode(text).ids == [end, *OURS.encode(text)]
    assert ours.word_ids("king") == OURS.word_ids("king")
    theirs.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A {END_OF_TEXT}", special_tokens=[(END_OF_TEXT, end)]
    )
    assert Tokenizer(theirs).encode_prompt("the king") == [end, *OURS.encode("the king")]


@pytest.mark.parametrize("name", ["micro", "smollm2"])
def test_transformers_reads_the_same_ids(name: str) -> None:
    """And so does vLLM, which reads tokenizers by it."""
    folder = weights() / name
    ours, theirs = Tokenizer.read(folder / "tokenizer.json"), AutoTokenizer.from_pretrained(folder)
    for text in ("The story of the king and 1,234 ships", "", " naïve\n\n\tif x:", "日本 🙂"):
        assert theirs(text).input_ids == ours.encode_prompt(text)
        assert theirs.decode(ours.encode(text), clean_up_tokenization_spaces=False) == text
    assert theirs.eos_token_id in end_tokens(folder, config_of(folder))


def config_of(folder: Path) -> BackpackConfig:
    """Of a model folder, or of an adapter."""
    if (folder / ADAPTER).exists():
        return Adapter.read(folder).config
    return Manifest.read(folder).config


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


@given(st.lists(st.integers(0, OURS.vocab_size - 1)))
def test_without_added_letters_the_library_decodes_alike(ids: list[int]) -> None:
    assert OURS.decode(ids) == THEIRS.decode(ids, skip_special_tokens=False)


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
    assert OURS.word_ids("kingdomless", WordPolicy.LAST) == several[-1:]
    with pytest.raises(WordError, match="not a word"):
        OURS.word_ids("  ")


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(ValueError, match=r"t\.json is not a tokenizer"):
        Tokenizer.read(tmp_path / "t.json")


ADDED = ("đem", "Ġnhà", "éà", "<|đ|>", "ąę ćł", "日本", "<|end|>")
"""Their letters are those with which a byte-level vocabulary spells bytes, but for the last two."""


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    tokenizer = HFTokenizer.from_file(str(folder_of("micro") / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ADDED if "<" not in text])
    tokenizer.add_special_tokens([text for text in ADDED if "<" in text])
    file = tmp_path_factory.mktemp("extended") / "tokenizer.json"
    tokenizer.save(str(file))
    return Tokenizer.read(file)


@pytest.mark.parametrize("text", ADDED)
def test_an_added_token_is_its_own_text(extended: Tokenizer, text: str) -> None:
    token = extended._tokenizer.token_to_id(text)
    assert token >= OURS.vocab_size
    assert extended.piece(token) == text
    assert extended.token_bytes(token) == text.encode()
    assert extended.decode([token]) == text
    grown = Detokenizer(extended)
    assert grown.add([token]) + grown.flush() == text
    if "<" not in text:
        assert token in extended.encode(f"Xin {text}.")


@given(st.lists(st.sampled_from([*ADDED, " ", "Xin", "\x11", "é", "あ"])).map("".join))
def test_texts_with_added_tokens_come_back(extended: Tokenizer, text: str) -> None:
    ids = extended.encode(text)
    assert extended.decode(ids) == text
    grown = Detokenizer(extended)
    assert "".join(grown.add([token]) for token in ids) + grown.flush() == text


def test_ids_beyond_the_vocabulary_have_no_text() -> None:
    assert OURS.decode([OURS.vocab_size, 300, -1]) == OURS.piece(300)


def test_ids_with_gaps_between_them_all_have_a_place(tmp_path: Path) -> None:
    values = json.loads((folder_of("micro") / "tokenizer.json").read_text("utf-8"))
    kept = {word: token for word, token in values["model"]["vocab"].items() if token != 16_000}
    used = {f"{a}{b}" for a, b in (m if isinstance(m, list) else m.split(" ", 1) for m in values["model"]["merges"])}
    (removed,) = values["model"]["vocab"].keys() - kept.keys()
    assert removed in used
    merges = [m for m in values["model"]["merges"] if removed not in ("".join(m), *m, m)]
    values["model"] |= {"vocab": kept, "merges": merges}
    (tmp_path / "t.json").write_text(json.dumps(values), "utf-8")
    tokenizer = Tokenizer.read(tmp_path / "t.json")
    assert tokenizer.vocab_size == OURS.vocab_size
    assert tokenizer.token_bytes(16_000) == b""
    assert tokenizer.piece(16_383) == OURS.piece(16_383)


@pytest.mark.parametrize("text", ["é", "đ", "Ġthe"])
def test_an_added_token_that_shares_an_id_with_bytes_is_refused(text: str) -> None:
    """The library gives it the id of the bytes that are spelled so: "é" would be a part of other characters."""
    tokenizer = HFTokenizer.from_file(str(folder_of("micro") / "tokenizer.json"))
    tokenizer.add_tokens([text])
    with pytest.raises(ValueError, match=f"added token {text!r} and for the bytes .* Give the added token an id"):
        Tokenizer(tokenizer)


def _byte_level(model: object) -> HFTokenizer:
    tokenizer = HFTokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    return tokenizer


def _with(name: str, value: object) -> HFTokenizer:
    tokenizer = _byte_level(models.BPE({"a": 0}, []))
    setattr(tokenizer, name, value)
    return tokenizer


OTHERS = {
    "its model is WordLevel": lambda: _byte_level(models.WordLevel({"a": 0}, "a")),
    "its model is Unigram": lambda: _byte_level(models.Unigram([("a", 0.0)], 0)),
    "its decoder is Metaspace": lambda: _with("decoder", decoders.Metaspace()),
    "its decoder is Sequence": lambda: _with("decoder", decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])),
    "nothing in it turns texts into bytes": lambda: _with("pre_tokenizer", pre_tokenizers.Metaspace()),
    "its byte_fallback is True": lambda: _byte_level(models.BPE({"a": 0}, [], byte_fallback=True)),
    "its end_of_word_suffix is '</w>'": lambda: _byte_level(models.BPE({"a": 0}, [], end_of_word_suffix="</w>")),
    "its largest id is None": lambda: _byte_level(models.BPE({}, [])),
}


@pytest.mark.parametrize("reason", OTHERS)
def test_tokenizers_of_other_kinds_are_refused(reason: str, tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    OTHERS[reason]().save(str(file))
    with pytest.raises(ValueError, match=rf"t\.json is not a tokenizer: {reason}"):
        Tokenizer.read(file)


def test_bytes_may_be_made_in_a_sequence_or_by_a_normalizer() -> None:
    steps = pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel()])
    assert Tokenizer(_with("pre_tokenizer", steps)).vocab_size == 1
    normalizing = _with("pre_tokenizer", None)
    normalizing.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.ByteLevel()])
    assert Tokenizer(normalizing).encode("a") == [0]


def test_two_tokens_of_one_id_are_refused(tmp_path: Path) -> None:
    values = json.loads(_byte_level(models.BPE({"a": 0, "b": 1}, [])).to_str())
    values["model"]["vocab"]["b"] = 0
    (tmp_path / "t.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"several tokens have the id 0, '[ab]' among them"):
        Tokenizer.read(tmp_path / "t.json")
