"""A model whose texts begin with a token of their own, and may end with several."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from backpack_lm import checkpoint
from backpack_lm.generation import NAME as GENERATION
from backpack_lm.installed import folder_of
from backpack_lm.tokenizer import END_OF_TEXT, Tokenizer, begin_texts
from backpack_serving.client import Client, Sampling
from tokenizers import Tokenizer as HFTokenizer

from tests.http.conftest import PROMPT, Web, serving

MICRO = folder_of("micro")


@pytest.fixture(scope="module")
def beginning(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    folder = tmp_path_factory.mktemp("beginning")
    tokenizer = HFTokenizer.from_file(str(MICRO / checkpoint.TOKENIZER))
    begin_texts(tokenizer, END_OF_TEXT)
    tokenizer.save(str(folder / checkpoint.TOKENIZER))
    model = checkpoint.load(MICRO)
    checkpoint.save(model, folder / checkpoint.TOKENIZER, folder / "model")
    the = Tokenizer.read(folder / checkpoint.TOKENIZER).word_ids("the")
    (folder / "model" / GENERATION).write_text(json.dumps({"eos_token_id": [0, *the], "temperature": 0}))
    with serving(folder, model=str(folder / "model")) as web:
        yield web


def test_a_prompt_begins_with_it_and_an_echo_doesnt_show_it(beginning: Web) -> None:
    tokenizer = Tokenizer.read(MICRO / checkpoint.TOKENIZER)
    ids, end = tokenizer.encode(PROMPT), tokenizer.end_of_text
    assert end is not None
    with Client(beginning.gateway, beginning.key) as client:
        tokens = client.score(PROMPT).tokens
        assert [token.id for token in tokens] == [end, *ids]
        assert client.score([end, *ids]).tokens == tokens
        nothing = client.generate("", Sampling(max_tokens=2))  # from the beginning
        assert nothing.tokens
    echo = beginning.complete(echo=True, max_tokens=0, logprobs=0)
    (choice,) = echo["choices"]
    assert choice["text"] == PROMPT
    assert choice["logprobs"]["token_logprobs"] == [token.log_probability for token in tokens[1:]]
    assert choice["logprobs"]["text_offset"][0] == 0
    assert echo["usage"]["prompt_tokens"] == len(tokens)


def test_a_text_ends_at_any_end(beginning: Web) -> None:
    whole = beginning.complete(max_tokens=40, ignore_end_of_text=True)["choices"][0]
    assert " the" in whole["text"]
    ended = beginning.complete(max_tokens=40)["choices"][0]
    assert ended["finish_reason"] == "stop"
    assert ended["text"] == whole["text"][: whole["text"].index(" the")]
