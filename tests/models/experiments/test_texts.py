"""Texts that nobody chose: drawn as a server draws, read by another model, from prompts by a rule."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from backpack_lm.experiments.texts import TextsResult, UnchosenTexts, WrittenText, draw, opening
from backpack_lm.generation import UNTRUNCATED, SamplingDefaults
from backpack_lm.gguf_file import tokenizer_of
from backpack_lm.lab.lab_model import LabModel
from backpack_lm.lab.progress import unwatched
from backpack_lm.lab.text import held_out
from backpack_lm.lab.twin import read_twin
from backpack_lm.tokenizer import Tokenizer
from backpack_serving.cli.main import app
from backpack_serving.engine.logits import change
from backpack_serving.engine.sampler import choose
from backpack_serving.sampling import SamplingParams
from typer.testing import CliRunner

from tests.models.test_gguf import TOKENS, _theirs, _write

GREEDY = SamplingDefaults(temperature=0.0)


def _run(subject: LabModel, corpus: Path, **given: Any) -> TextsResult:
    result = UnchosenTexts((corpus,), **{"texts": 3, "length": 12, "words": 4, **given}).run(subject, unwatched)
    assert isinstance(result, TextsResult)
    return result


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingDefaults(0.7, 30, 1.0, 0.0, 1.15),
        SamplingDefaults(1.0, 0, 0.8, 0.0, 1.0),
        SamplingDefaults(1.3, 0, 1.0, 0.2, 0.8),
        SamplingDefaults(0.0, 0, 1.0, 0.0, 1.5),
    ],
)
def test_a_token_is_the_one_that_the_engine_draws(sampling: SamplingDefaults) -> None:
    params = SamplingParams(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        min_tokens=99,
        seed=7,
    )
    random, drawn = torch.Generator().manual_seed(0), set()
    for n in range(1, 60):
        logits = 3 * torch.randn(200, generator=random)
        ids = torch.randint(200, (n,), generator=random).tolist()
        changed = change(logits, ids[:1], ids[1:], params, (3, 5))
        token = draw(logits, ids, sampling, 7, (3, 5))
        assert token == choose(changed, params, n)
        drawn.add(token)
    assert len(drawn) > 20


def test_a_text_is_what_the_oracle_writes(subject: LabModel, folder: Path) -> None:
    result = _run(subject, folder / "corpus.jsonl", sampling=GREEDY)
    for text in result.texts:
        oracle = subject.model.generate(subject.ids(text.prompt))
        assert text.text == subject.tokenizer.decode([next(oracle) for _ in range(12)])
    first = subject.ids(result.texts[0].text)[0]
    forbidden = _run(subject, folder / "corpus.jsonl", sampling=GREEDY, ends=(first,))
    assert first not in subject.ids(forbidden.texts[0].text)


def test_each_text_has_a_seed_of_its_own(subject: LabModel, folder: Path) -> None:
    one, two = (_run(subject, folder / "corpus.jsonl", seed=seed, sampling=UNTRUNCATED).texts for seed in (5, 6))
    for number, text in enumerate(one):
        ids = subject.ids(text.prompt)
        for _ in range(12):
            ids.append(draw(subject.model(torch.tensor([ids]))[0, -1], ids, UNTRUNCATED, 5 + number))
        assert text.text == subject.tokenizer.decode(ids[-12:])
    assert one != two


def test_prompts_are_the_beginnings_of_held_out_paragraphs(subject: LabModel, tmp_path: Path, folder: Path) -> None:
    long = " ".join(f"w{n}" for n in range(40))
    assert opening(f"A heading\n\n{long}\n\nother", 3) == "w0 w1 w2"
    assert opening("A heading\n\nand a list", 3) == ""
    corpus = folder / "corpus.jsonl"
    records = [opening(record, 4) for record in held_out(corpus)]
    assert [text.prompt for text in _run(subject, corpus).texts] == records[:3]
    with pytest.raises(ValueError, match=f"only {len(records)} held-out records with a paragraph of 40 words, 99 were"):
        _run(subject, corpus, texts=99)
    with pytest.raises(ValueError, match="no text to take beginnings from"):
        UnchosenTexts(()).run(subject, unwatched)


def test_the_model_reads_its_texts_itself(subject: LabModel, folder: Path) -> None:
    result = _run(subject, folder / "corpus.jsonl")
    for text in result.texts:
        before = [subject.tokenizer.end_of_text, *subject.tokenizer.encode(text.prompt)]
        after = subject.tokenizer.encode(text.text)
        logs = subject.model(torch.tensor([before + after]))[0].double().log_softmax(-1)
        nats = -sum(float(logs[len(before) + n - 1, token]) for n, token in enumerate(after))
        assert text.tokens == len(after)
        assert text.nats == pytest.approx(nats, rel=1e-4)
    total = sum(t.nats for t in result.texts) / sum(t.tokens for t in result.texts)
    assert result.perplexity == pytest.approx(math.exp(total))
    assert "To the model itself" in result.report().markdown()
    with pytest.raises(ValueError, match="the context holds 1 to 64"):
        _run(subject, folder / "corpus.jsonl", length=64)


def test_another_model_reads_them_by_its_own_tokenizer(subject: LabModel, folder: Path, tmp_path: Path) -> None:
    tokens = [*TOKENS, *(f"zz{n}" for n in range(subject.config.tokens))]  # no fewer than the model's
    theirs: Any = _theirs()
    theirs.resize_token_embeddings(len(tokens))
    types = [3] + [1] * (len(tokens) - 1)
    path = _write(tmp_path / "reader.gguf", theirs, token_list=tokens, token_types=types)
    reader, tokenizer = read_twin(path, subject.config), Tokenizer(tokenizer_of(path))
    own, read = (_run(subject, folder / "corpus.jsonl", reader=at) for at in (None, path))
    assert [t.text for t in own.texts] == [t.text for t in read.texts]
    text = read.texts[0]
    before, after = tokenizer.encode(text.prompt), tokenizer.encode(text.text)
    logs = reader(torch.tensor([[*before, *after]]))[0].log_softmax(-1)
    nats = -sum(float(logs[len(before) + n - 1, token]) for n, token in enumerate(after))
    assert (text.tokens, text.nats) == (len(after), pytest.approx(nats, rel=1e-4))
    assert "To reader.gguf" in read.report().markdown()
    with pytest.raises(ValueError, match="the reader reads 64 tokens; make the texts shorter"):
        _run(subject, folder / "corpus.jsonl", reader=path, length=50)


def test_both_sides_of_quality_are_counted() -> None:
    texts = [WrittenText("a", "one two one two one two", 6 * math.log(2), 6), WrittenText("b", "three four", 0.0, 6)]
    result = TextsResult(texts, 6, 1, 0, GREEDY, "the model itself")
    assert result.perplexity == pytest.approx(2**0.5)
    assert result.distinct == pytest.approx((2 / 5 + 1) / 2)
    assert not result.headline().reached
    assert "70.0% of its pairs" in result.report().markdown()
    assert "40% in the text where fewest are" in result.report().markdown()


def test_a_command_draws_by_the_model_s_defaults(folder: Path, tmp_path: Path) -> None:
    words = ["texts", "--corpus", folder / "corpus.jsonl", "--texts", 2, "--length", 6, "--model", folder]
    result = CliRunner().invoke(app, ["experiment", *map(str, words), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    values = json.loads((tmp_path / "out" / "texts.json").read_text())
    assert values["arguments"]["sampling"] == {
        "temperature": 0.7,
        "top_k": 30,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }
    assert values["arguments"]["ends"] == [0]
    assert len(values["result"]["texts"]) == 2
    words[4] = 999
    result = CliRunner().invoke(app, ["experiment", *map(str, words), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "999 were asked for; give more files, or fewer --texts" in " ".join(result.output.split())
