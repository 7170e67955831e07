"""Stop strings, however tokens cut them."""

from __future__ import annotations

import pytest
from backpack_lm.installed import folder_of
from backpack_lm.tokenizer import Tokenizer
from backpack_serving.inference.detokenizer import IncrementalDetokenizer
from hypothesis import given
from hypothesis import strategies as st

TOKENIZER = Tokenizer.read(folder_of("micro") / "tokenizer.json")


def _stream(text: str, stop: list[str]) -> tuple[list[str], bool]:
    stream, parts = IncrementalDetokenizer(TOKENIZER, stop), []
    for token in TOKENIZER.encode(text):
        parts.append(stream.add([token]))
        if stream.stopped:
            break
    return [*parts, stream.flush()], stream.stopped


@given(st.text("ab \n", max_size=30), st.lists(st.text("ab \n", min_size=1, max_size=4), max_size=3))
def test_the_text_is_cut_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    parts, stopped = _stream(text, stop)
    assert ("".join(parts), stopped) == _cut(text, stop)


def _cut(text: str, stop: list[str]) -> tuple[str, bool]:
    """By definition: it ends with the first token after which a stop string is there, before that string."""
    ids = TOKENIZER.encode(text)
    for count in range(1, len(ids) + 1):
        sofar = TOKENIZER.decode(ids[:count])
        if found := [sofar.find(s) for s in stop if s in sofar]:
            return sofar[: min(found)], True
    return text, False


@pytest.mark.parametrize("stop", ["the sea", "sea and", "\n\n"])
def test_what_may_become_a_stop_string_is_held_back(stop: str) -> None:
    text = "They went to the sea and\n\nback"
    sent = ""
    for part in _stream(text, [stop])[0]:
        sent += part
        assert text.startswith(sent)
        assert stop not in sent
    assert sent == text[: text.find(stop)]
