"""What stands beside a Backpack in the tables: a twin of a few steps, and naive computations on its weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from backpack_lm.config import BackpackConfig
from backpack_lm.experiments.bias import BiasResult, GenderBias, null_space
from backpack_lm.experiments.language import LanguageModelling, LanguageResult
from backpack_lm.experiments.lexical import LexicalResult, LexicalSimilarity
from backpack_lm.experiments.topic_methods import TopicsResult
from backpack_lm.experiments.topics import TopicControl
from backpack_lm.lab.contrast import Contrast, Noun
from backpack_lm.lab.debias import debias
from backpack_lm.lab.lab_model import LabModel
from backpack_lm.lab.professions import ESTIMATION, EVALUATION, NOUNS
from backpack_lm.lab.progress import ResumeJournal, unwatched
from backpack_lm.lab.text import held_out, stream
from backpack_lm.lab.twin import read_twin
from backpack_lm.model import TransformerTwin
from backpack_lm.training.data import Rows
from backpack_lm.training.trainer import Recipe, Trainer
from scipy.stats import spearmanr

from tests.models.experiments.test_lexical import PAIRS, _write
from tests.models.experiments.test_topics import judge

__all__ = ["judge"]

T = TypeVar("T")


@pytest.fixture(scope="module")
def twin(subject: LabModel, folder: Path, tmp_path_factory: Any) -> Path:
    """The folder of a run, as `backpack train --twin` leaves it; of half the Backpack's context."""
    config = BackpackConfig.gpt2(subject.config.vocab_size, 32, 32, 2, 2, num_senses=4)
    records = [(folder / "corpus.jsonl").read_text()]
    ids = np.array(subject.tokenizer.encode(records[0][:20_000]), dtype=np.uint16)
    recipe = Recipe(steps=20, tokens_per_step=256, tokens_per_pass=256, short_row=32)
    trainer = Trainer(config, recipe, Rows([ids], [1.0], 0), tmp_path_factory.mktemp("run") / "twin", True)
    losses = [step.loss for step in trainer.run()]
    assert losses[-1] < losses[0] - 0.5, "it has learnt something"
    return trainer.folder


def test_perplexities_are_of_the_same_tokens(subject: LabModel, folder: Path, twin: Path) -> None:
    corpus = folder / "corpus.jsonl"
    result = LanguageModelling((corpus,), (), twin, 256).run(subject, unwatched)
    assert isinstance(result, LanguageResult)
    (measured,) = result.texts
    ids = stream(subject, held_out(corpus), 257, 33)
    rows = ids.unfold(0, 33, 32)  # of the shorter context
    assert (measured.tokens, result.context) == (256, 32)
    assert subject.config.eos_token_id in ids[1:]
    text = subject.tokenizer.decode([i for i in ids[1:257].tolist() if i != subject.config.eos_token_id])
    assert measured.bytes == len(text.encode())
    for model, value in ((subject.model, measured.perplexity), (_read(twin, subject), measured.twin_perplexity)):
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        assert value == pytest.approx(math.exp(loss), rel=1e-4)
    headline = result.headline()
    assert headline.reached is (measured.perplexity <= (measured.twin_perplexity or 0))
    assert "Against its Transformer twin" in result.report().lead


def test_the_twin_s_embeddings_are_compared(subject: LabModel, twin: Path, tmp_path: Path) -> None:
    result = LexicalSimilarity(_write(tmp_path), twin).run(subject, unwatched)
    assert isinstance(result, LexicalResult)
    assert result.twin is not None
    embedding = _read(twin, subject).embedding
    means = {word: embedding[list(subject.word_ids(word))].mean(0) for pair in PAIRS for word in pair[:2]}
    cosines = [float(torch.cosine_similarity(means[a], means[b], dim=0)) for a, b, _ in PAIRS]
    expected = spearmanr(cosines, [rating for *_, rating in PAIRS]).statistic
    assert result.twin["SimLex-999"] == pytest.approx(expected)
    assert result.centred is not None
    assert result.centred.twin is not None
    for centred, table in ((result.centred.twin, embedding), (result.centred.embedding, subject.model.embedding)):
        mean = table[: subject.config.tokens].mean(0)
        around = {word: table[list(subject.word_ids(word))].mean(0) - mean for pair in PAIRS for word in pair[:2]}
        cosines = [float(torch.cosine_similarity(around[a], around[b], dim=0)) for a, b, _ in PAIRS]
        assert centred["SimLex-999"] == pytest.approx(spearmanr(cosines, [rating for *_, rating in PAIRS]).statistic)
    assert result.twin != result.embedding
    best = [max(*result.senses[n], result.minimum[n]) > result.twin[n] for n in list(result.senses)[:2]]
    assert result.headline().reached is all(best)
    assert "| Transformer twin, embeddings |" in result.report().markdown()


def test_the_null_space_is_projected_out_of_one_word_s_input_alone(subject: LabModel, twin: Path) -> None:
    model = _read(twin, subject)
    found = null_space(subject, model, ["nurse", "cook"], unwatched)
    head = model.embedding.clone()
    direction = head[subject.token("she")] - head[subject.token("he")]

    def ratios(keep: float) -> float:
        all_of_them = []
        for noun in ("nurse", "cook"):
            changed, token = _read(twin, subject), subject.token(noun)
            row = head[token]
            changed.embedding[token] = row - (1 - keep) * (row @ direction) / (direction @ direction) * direction
            for template in EVALUATION:
                ids = torch.tensor([subject.ids(template.replace("{}", noun))[-32:]])
                p = (changed.mix(ids)[0, -1] @ head.t()).double().softmax(-1)
                he, she = (float(p[subject.token(word)]) for word in ("he", "she"))
                all_of_them.append(max(he / she, she / he))
        return sum(all_of_them) / len(all_of_them)

    assert found.unmodified == pytest.approx(ratios(1.0), rel=1e-4)
    assert found.removed == pytest.approx(ratios(0.0), rel=1e-4)
    assert found.removed != pytest.approx(found.unmodified, rel=1e-6)
    assert torch.equal(model.embedding, head), "the twin is as it was"
    shown: list[str] = []

    def noting(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        shown.append(what)
        return iter(items)

    result = GenderBias(twin).run(subject, noting)
    assert isinstance(result, BiasResult)
    assert shown == ["senses", *["nouns"] * 3, "nouns, null space"], "the sense is searched once for all fits"
    assert result.free.search is result.backpack.search
    assert result.backpack == debias(subject, NOUNS, unwatched, ResumeJournal(None, {}), penalty=1.0, most_moved=1.0)
    assert result.bounded == debias(subject, NOUNS, unwatched, ResumeJournal(None, {})), "as the lab does"
    for one, other in zip(result.free.nouns, result.backpack.nouns, strict=True):
        noun = Noun(subject, one.noun, ESTIMATION, Contrast.of(subject, "he", "she"))
        free, held = (noun.bias(*noun.scaled(result.free.sense, n.scale)) for n in (one, other))
        assert free <= held + 1e-3, "nothing holds a free scale"
    assert "| Transformer, null space |" in result.report().markdown()
    assert "twin, null space" in result.headline().figures


def test_the_twin_reads_all_prompts_of_a_scale_at_once(
    subject: LabModel, twin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One by one, the weights of a large twin went through memory five times for each of a hundred scales."""
    read: list[int] = []
    real = TransformerTwin.mix

    def counting(model: TransformerTwin, ids: torch.Tensor) -> torch.Tensor:
        read.append(len(ids))
        return real(model, ids)

    monkeypatch.setattr(TransformerTwin, "mix", counting)
    null_space(subject, _read(twin, subject), ["nurse"], unwatched)
    assert set(read[:-3]) == {len(ESTIMATION)}, "the fit"
    assert read[-3:] == [len(EVALUATION)] * 3


def test_the_twin_reads_the_texts_of_topics(subject: LabModel, twin: Path, judge: Path) -> None:
    given = {"samples": 2, "length": 6, "judge": judge}
    own, read = (TopicControl(**given, twin=t).run(subject, unwatched) for t in (None, twin))
    assert isinstance(own, TopicsResult)
    assert isinstance(read, TopicsResult)
    assert "perplexity to the twin" in read.report().markdown()
    for one, other in zip(own.ways, read.ways, strict=True):
        assert one.success == other.success, "the same texts"
        assert one.perplexity != pytest.approx(other.perplexity, rel=1e-3)


def _read(folder: Path, subject: LabModel) -> TransformerTwin:
    return read_twin(folder, subject.config)
