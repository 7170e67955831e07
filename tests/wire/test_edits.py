"""Edits on the wire: words become ids, every mistake is told with its path, and what is stored reads back."""

from __future__ import annotations

import json
import math
import struct
import tracemalloc
from pathlib import Path

import pytest
from backpack_lm import patch
from backpack_lm.installed import folder_of
from backpack_lm.patch import Cell
from backpack_lm.tokenizer import Tokenizer, WordPolicy
from backpack_proto.v1 import inference_pb2
from backpack_proto.v1 import interventions_pb2 as pb
from backpack_serving.cli.patch_file import PatchFile
from backpack_serving.errors import InvalidRequest
from backpack_serving.wire.edits import read_edits, write_edit
from google.protobuf import json_format

TOKENIZER = Tokenizer.read(folder_of("micro") / "tokenizer.json")
SENSES = 16
(KING,), (SHIP,) = TOKENIZER.word_ids("king"), TOKENIZER.word_ids("ship")
(SHIP_FIRST,) = TOKENIZER.encode("ship")


def _word(text: str) -> inference_pb2.Word:
    return inference_pb2.Word(text=text)


def _cells(word: str, *senses: int) -> pb.Cells:
    return pb.Cells(word=_word(word), senses=senses)


def _vector(*values: float, form: str = "f") -> pb.Vector:
    dtype = pb.DATA_TYPE_FLOAT32 if form == "f" else pb.DATA_TYPE_FLOAT16
    return pb.Vector(data=struct.pack(f"<{len(values)}{form}", *values), dtype=dtype, shape=[len(values)])


def _all(token: int) -> tuple[Cell, ...]:
    return tuple(Cell(token, sense) for sense in range(SENSES))


@pytest.mark.parametrize(
    ("message", "edit"),
    [
        (
            pb.Edit(scale=pb.ScaleEdit(cells=[_cells("king", 3, 5), _cells("ship", 1)], factor=0.5)),
            patch.ScaleEdit((Cell(KING, 3), Cell(KING, 5), Cell(SHIP, 1)), 0.5),
        ),
        (
            pb.Edit(add=pb.AddEdit(cells=[_cells("king", 3)], delta=_vector(1, -0.0, 2.5))),
            patch.AddEdit((Cell(KING, 3),), patch.Vector.of([1, 0, 2.5])),
        ),
        (
            pb.Edit(set=pb.SetEdit(cells=[_cells("king", 3)], vector=_vector(1, 2.5, form="e"))),
            patch.SetEdit((Cell(KING, 3),), patch.Vector.of([1, 2.5])),
        ),
        (
            pb.Edit(copy=pb.CopyEdit(cells=[_cells("king")], source=_word("ship"))),
            patch.CopyEdit(_all(KING), SHIP),
        ),
        (
            pb.Edit(copy=pb.CopyEdit(cells=[_cells("king", 2)], source=_word("ship"), source_sense=0)),
            patch.CopyEdit((Cell(KING, 2),), SHIP, 0),
        ),
        (
            pb.Edit(project_out=pb.ProjectOutEdit(cells=[_cells("king")], direction=_word("ship"))),
            patch.ProjectOutEdit(_all(KING), SHIP),
        ),
        (
            pb.Edit(swap=pb.SwapEdit(cells=[_cells("king", 0)], old=_word("king"), new=_word("ship"))),
            patch.SwapEdit((Cell(KING, 0),), KING, SHIP),
        ),
        (
            pb.Edit(topic=pb.TopicEdit(words=[_word("ship"), _word("king"), _word("ship")], strength=2)),
            patch.TopicEdit((SHIP, KING), 2),
        ),
        (
            pb.Edit(topic=pb.TopicEdit(words=[_word("ship")], strength=3, constant=True)),
            patch.TopicEdit((SHIP,), 3, annealed=False),
        ),
        (
            pb.Edit(bias=pb.BiasEdit(words=[inference_pb2.Word(token=SHIP), _word("king")], amount=-5)),
            patch.BiasEdit((SHIP, KING, *TOKENIZER.encode("king")), -5.0),
        ),
        (
            pb.Edit(bias=pb.BiasEdit(words=[_word("ship"), _word("ship")], amount=-math.inf)),
            patch.BiasEdit((SHIP, SHIP_FIRST), -math.inf),
        ),
    ],
    ids=lambda value: value.WhichOneof("kind") if isinstance(value, pb.Edit) else "",
)
def test_every_kind_is_read_and_comes_back(message: pb.Edit, edit: patch.Edit) -> None:
    assert read_edits([message], TOKENIZER, SENSES) == [edit]
    answer = write_edit(edit, TOKENIZER)
    assert read_edits([answer], TOKENIZER, SENSES) == [edit]
    assert " ship" in str(answer) or " king" in str(answer)


def test_a_bias_reaches_a_word_within_a_text_and_at_its_start() -> None:
    assert (TOKENIZER.piece(SHIP), TOKENIZER.piece(SHIP_FIRST)) == (" ship", "ship")
    assert len(TOKENIZER.encode("money")) > 1, "at the start of a text it is in pieces, and they begin other words"
    bias = pb.BiasEdit(words=[_word("ship"), _word("money")], amount=1)
    (edit,) = read_edits([pb.Edit(bias=bias)], TOKENIZER, SENSES)
    assert isinstance(edit, patch.BiasEdit)
    assert edit.tokens == (SHIP, SHIP_FIRST, *TOKENIZER.encode(" money"))
    several = TOKENIZER.encode(" kingdomless")
    last = inference_pb2.Word(text="kingdomless", policy=inference_pb2.WORD_POLICY_LAST_TOKEN)
    for word, tokens in ((_first("kingdomless"), several[:1]), (last, several[-1:]), (_whole("kingdomless"), several)):
        (edit,) = read_edits([pb.Edit(bias=pb.BiasEdit(words=[word], amount=1))], TOKENIZER, SENSES)
        assert isinstance(edit, patch.BiasEdit)
        assert edit.tokens == tuple(tokens)
    with pytest.raises(InvalidRequest, match="ask for its first token, its last or all"):
        read_edits([pb.Edit(bias=pb.BiasEdit(words=[_word("kingdomless")], amount=1))], TOKENIZER, SENSES)


def test_json_has_what_forbids() -> None:
    message = pb.Edit(bias=pb.BiasEdit(words=[_word("ship")], amount=-math.inf))
    written = json.loads(json_format.MessageToJson(message))
    assert written == {"bias": {"words": [{"text": "ship"}], "amount": "-Infinity"}}
    assert json_format.ParseDict(written, pb.Edit()) == message


def test_biases_of_all_edits_count_together_up_to_the_limit() -> None:
    edits = [pb.Edit(bias=pb.BiasEdit(words=[_word("ship"), _word("money")], amount=1))] * 2
    assert len(read_edits(edits, TOKENIZER, SENSES, patch.PatchLimits(biased=6))) == 2
    with pytest.raises(InvalidRequest, match=r"6 tokens by edits\[1\]\.bias\.words\[1\], at most 5") as refused:
        read_edits(edits, TOKENIZER, SENSES, patch.PatchLimits(biased=5))
    assert refused.value.reason == "TOO_MANY_WORDS"


def test_a_topic_takes_the_first_token_of_each_word() -> None:
    several = TOKENIZER.encode(" kingdomless")
    (edit,) = read_edits([pb.Edit(topic=pb.TopicEdit(words=[_word("kingdomless")], strength=1))], TOKENIZER, SENSES)
    assert isinstance(edit, patch.TopicEdit)
    assert edit.tokens == (several[0],)


@pytest.mark.parametrize(
    ("message", "field", "reason"),
    [
        (pb.Edit(), "edits[0]", "UNKNOWN_KIND"),
        (pb.Edit(scale=pb.ScaleEdit()), "edits[0].scale.cells", "EMPTY"),
        (
            pb.Edit(scale=pb.ScaleEdit(cells=[_cells("kingdomless")])),
            "edits[0].scale.cells[0].word",
            "NOT_ONE_TOKEN",
        ),
        (pb.Edit(scale=pb.ScaleEdit(cells=[_cells("king"), _cells("")])), "edits[0].scale.cells[1].word", "EMPTY"),
        (
            pb.Edit(scale=pb.ScaleEdit(cells=[pb.Cells(word=inference_pb2.Word(token=2**20))])),
            "edits[0].scale.cells[0].word",
            "UNKNOWN_TOKEN",
        ),
        (
            pb.Edit(add=pb.AddEdit(cells=[_cells("king")], delta=pb.Vector(data=b"1234"))),
            "edits[0].add.delta.dtype",
            "UNKNOWN_VALUE",
        ),
        (
            pb.Edit(
                set=pb.SetEdit(
                    cells=[_cells("king")],
                    vector=pb.Vector(data=b"12345678", dtype=pb.DATA_TYPE_FLOAT32, shape=[3]),
                )
            ),
            "edits[0].set.vector",
            "WRONG_SHAPE",
        ),
        (
            pb.Edit(
                copy=pb.CopyEdit(
                    cells=[_cells("king")],
                    source=inference_pb2.Word(text="kingdomless", policy=inference_pb2.WORD_POLICY_ALL_TOKENS),
                )
            ),
            "edits[0].copy.source",
            "NOT_ONE_TOKEN",
        ),
        (
            pb.Edit(topic=pb.TopicEdit(words=[_word("ship")], strength=-1)),
            "edits[0].topic.strength",
            "OUT_OF_RANGE",
        ),
        (
            pb.Edit(bias=pb.BiasEdit(words=[_word("ship"), _word("kingdomless")], amount=1)),
            "edits[0].bias.words[1]",
            "NOT_ONE_TOKEN",
        ),
        (
            pb.Edit(bias=pb.BiasEdit(words=[inference_pb2.Word(token=2**20)], amount=1)),
            "edits[0].bias.words[0]",
            "UNKNOWN_TOKEN",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isupper() else "",
)
def test_a_mistake_is_told_with_its_path(message: pb.Edit, field: str, reason: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read_edits([message], TOKENIZER, SENSES)
    assert [(v.field, v.reason) for v in refused.value.violations] == [(field, reason)]


def test_all_tokens_of_a_word_when_asked_for() -> None:
    word = inference_pb2.Word(text="kingdomless", policy=inference_pb2.WORD_POLICY_ALL_TOKENS)
    scale = pb.Edit(scale=pb.ScaleEdit(cells=[pb.Cells(word=word, senses=[7])], factor=0))
    (edit,) = read_edits([scale], TOKENIZER, SENSES)
    assert edit.cells == tuple(Cell(token, 7) for token in TOKENIZER.encode(" kingdomless"))


def _refused(edits: list[pb.Edit]) -> tuple[InvalidRequest, int]:
    """Why edits are refused, and the most bytes that it took to find out."""
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest) as refused:
            read_edits(edits, TOKENIZER, SENSES)
        return refused.value, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_short_message_that_stands_for_very_many_cells_is_refused_before_they_are_made() -> None:
    word = inference_pb2.Word(text="q z " * 750, policy=inference_pb2.WORD_POLICY_ALL_TOKENS)
    bomb = pb.Cells(word=word, senses=[0] * 300)
    edits = [pb.Edit(scale=pb.ScaleEdit(cells=[_cells("king"), bomb, bomb]))]
    TOKENIZER.word_ids(word.text, WordPolicy.ALL)  # what the tokenizer remembers isn't measured
    refused, peak = _refused(edits)
    assert [(v.field, v.reason) for v in refused.violations] == [("edits", "TOO_MANY_CELLS")]
    assert "by edits[0].scale.cells[1], at most 4096" in refused.message
    assert peak < 2**20, "bytes; one cell is 56 of them"


def _first(text: str) -> inference_pb2.Word:
    return inference_pb2.Word(text=text, policy=inference_pb2.WORD_POLICY_FIRST_TOKEN)


def _whole(text: str) -> inference_pb2.Word:
    return inference_pb2.Word(text=text, policy=inference_pb2.WORD_POLICY_ALL_TOKENS)


@pytest.mark.parametrize(
    ("edit", "field", "says"),
    [
        (
            pb.Edit(scale=pb.ScaleEdit(cells=[pb.Cells(word=_first("ab " * 100))])),
            "edits[0].scale.cells[0].word",
            "a word of 300 bytes; at most 256",
        ),
        (
            pb.Edit(topic=pb.TopicEdit(words=[_word("ab " * 100)], strength=1)),
            "edits[0].topic.words[0]",
            "a word of 300 bytes; at most 256",
        ),
        (
            pb.Edit(scale=pb.ScaleEdit(cells=[pb.Cells(word=_whole("ab " * 1_000_000))])),
            "edits[0].scale.cells[0].word",
            f"a word of 3000000 bytes; at most {4096 * TOKENIZER.longest}",
        ),
        (
            pb.Edit(topic=pb.TopicEdit(words=[_word("king")] * 5000, strength=1)),
            "edits[0].topic.words",
            "5000, at most 4096",
        ),
        (
            pb.Edit(bias=pb.BiasEdit(words=[_word("")] * 999 + [_word("ab " * 100)] * 4001, amount=1)),
            "edits[0].bias.words",
            "5000, at most 4096",
        ),
        (
            pb.Edit(add=pb.AddEdit(cells=[_cells("king")], delta=pb.Vector(dtype=1, shape=[1] * 1_000_000))),
            "edits[0].add.delta",
            "shape [1, 1, 1, 1, 1, 1, 1, 1]… of 1000000 sizes of 4-byte numbers, but 0 bytes of data; give one "
            "size, and as many numbers",
        ),
    ],
    ids=["first token", "topic", "all tokens", "words", "words of a bias", "shape"],
)
def test_what_would_be_read_for_seconds_is_refused_before(edit: pb.Edit, field: str, says: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read_edits([edit], TOKENIZER, SENSES)
    assert (field, says) in [(v.field, v.description) for v in refused.value.violations]


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (pb.Edit(), "give one of scale, add, set, copy, project_out, swap, topic"),
        (
            pb.Edit(scale=pb.ScaleEdit(cells=[pb.Cells(word=inference_pb2.Word(text="king", policy=9))])),  # type: ignore[arg-type]
            "9; use WORD_POLICY_SINGLE or WORD_POLICY_FIRST_TOKEN or WORD_POLICY_ALL_TOKENS",
        ),
    ],
)
def test_of_what_this_server_doesnt_know_the_alternatives_are_told(edit: pb.Edit, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        read_edits([edit], TOKENIZER, SENSES)


@pytest.mark.parametrize(("word", "reason"), [("king", "TOO_MANY_CELLS"), ("", "EMPTY")])
def test_of_very_many_senses_no_list_is_made(word: str, reason: str) -> None:
    edits = [pb.Edit(scale=pb.ScaleEdit(cells=[_cells(word, *[0] * 1_000_000)]))]
    refused, peak = _refused(edits)
    assert refused.reason == reason
    assert peak < 2**20


def test_cells_of_all_edits_count_together_up_to_the_limit() -> None:
    edits = [pb.Edit(scale=pb.ScaleEdit(cells=[_cells("king"), _cells("ship")], factor=0.5))] * 2
    assert len(read_edits(edits, TOKENIZER, SENSES, patch.PatchLimits(cells=4 * SENSES))) == 2
    with pytest.raises(InvalidRequest, match=r"64 cells by edits\[1\]\.scale\.cells\[1\], at most 63"):
        read_edits(edits, TOKENIZER, SENSES, patch.PatchLimits(cells=4 * SENSES - 1))


@pytest.mark.parametrize(
    "edits",
    [
        [pb.Edit()] * 8209,
        [pb.Edit()] * 2000,
        [pb.Edit(scale=pb.ScaleEdit(cells=[pb.Cells()] * 100_000))],
        [pb.Edit(topic=pb.TopicEdit(words=[inference_pb2.Word()] * 100_000))],
        [pb.Edit(bias=pb.BiasEdit(words=[inference_pb2.Word()] * 100_000))],
    ],
    ids=["edits", "kinds", "cells", "words", "words of a bias"],
)
def test_reading_ends_where_there_are_more_mistakes_than_anybody_reads(edits: list[pb.Edit]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read_edits(edits, TOKENIZER, SENSES)
    assert len(refused.value.violations) <= 1000


def test_a_patch_file_may_have_plain_words(tmp_path: Path) -> None:
    plain, spelled = tmp_path / "plain.json", tmp_path / "spelled.json"
    plain.write_text(
        '[{"topic": {"words": ["sea", "ship"], "strength": 1}}, {"scale": {"cells": [{"word": "king"}], "factor": 0}}]'
    )
    spelled.write_text(
        '[{"topic": {"words": [{"text": "sea"}, {"text": "ship"}], "strength": 1}},'
        ' {"scale": {"cells": [{"word": {"text": "king"}}], "factor": 0}}]'
    )
    assert PatchFile.read(plain) == PatchFile.read(spelled)
    plain.write_text('[{"bias": {"words": ["sea", "ship"], "amount": "-Infinity"}}]')
    (edit,) = PatchFile.read(plain).edits
    assert edit == pb.Edit(bias=pb.BiasEdit(words=[_word("sea"), _word("ship")], amount=-math.inf))
    plain.write_text('[{"scale": {"cells": "king", "factor": 0}}]')
    with pytest.raises(ValueError, match="is not a patch file"):
        PatchFile.read(plain)


@pytest.mark.parametrize(
    ("text", "form", "any_case", "pieces"),
    [
        ("king", "UNSPECIFIED", False, [" king"]),
        ("king", "INNER", False, [" king"]),
        ("The", "INITIAL", False, ["The"]),
        ("The", "BOTH", False, [" The", "The"]),
        ("the", "INNER", True, [" the", " The"]),
        ("the", "BOTH", True, [" the", "the", " The", "The"]),
        ("captain", "BOTH", False, [" captain", "captain"]),
    ],
)
def test_a_word_stands_for_its_tokens_of_the_form_and_case_that_are_asked_for(
    text: str, form: str, any_case: bool, pieces: list[str]
) -> None:
    known = [piece for piece in pieces if len(TOKENIZER.encode(piece)) == 1]
    assert known, "of this vocabulary"
    word = inference_pb2.Word(text=text, form=f"WORD_FORM_{form}", any_case=any_case)  # type: ignore[arg-type]
    cells = [pb.Cells(word=word, senses=[0])]
    (edit,) = read_edits([pb.Edit(scale=pb.ScaleEdit(cells=cells, factor=0.5))], TOKENIZER, SENSES)
    assert isinstance(edit, patch.ScaleEdit)
    found = [TOKENIZER.piece(cell.token) for cell in edit.cells]
    assert [piece for piece in found if piece in pieces] == known
    assert all(piece.strip().lower() == text.lower() for piece in found)
    if not any_case:
        assert found == known


def test_a_form_that_is_no_token_or_none_at_all_is_refused() -> None:
    bare = next(w for w in ("captain", "palace", "horse", "nurse") if len(TOKENIZER.encode(w)) > 1)
    for word, field, says in (
        (inference_pb2.Word(text=bare, form="WORD_FORM_INITIAL"), "word", "at the start of a text is several tokens"),
        (inference_pb2.Word(text="king", form=9), "word.form", "9; use WORD_FORM_INNER or"),  # type: ignore[arg-type]
        (inference_pb2.Word(text=" ", form="WORD_FORM_BOTH"), "word", "is not a word"),
        (inference_pb2.Word(text=" ", form="WORD_FORM_INITIAL"), "word", "several tokens"),
    ):
        with pytest.raises(InvalidRequest) as refused:
            read_edits([pb.Edit(scale=pb.ScaleEdit(cells=[pb.Cells(word=word)], factor=0.5))], TOKENIZER, SENSES)
        assert refused.value.violations[0].field == f"edits[0].scale.cells[0].{field}"
        assert says in refused.value.message
