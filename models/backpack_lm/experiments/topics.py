"""Topic control (paper, section 6): samples from the end-of-text token, steered to a topic at four strengths.

Two ways of steering by senses stand beside a logit bias: the paper's multipliers, and the lab's frequent words
that a topic vector is added to (`lab/topic_vector.py`).

Success: of the 17 topics, the judge finds the text nearest to the one that was asked for. There is no threshold to
choose, chance is 1 in 17, and unsteered text scores exactly that when each of it is judged for every topic.
Quality has two sides, because each alone can be had cheaply: how likely the model itself, unsteered, finds the
text (repetition is likely), and how many of its word pairs are different (noise is).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import ClassVar

import torch
from torch import Tensor

from backpack_lm.experiments.experiment import Result
from backpack_lm.experiments.topic_judge import TopicJudge, default_judge
from backpack_lm.experiments.topic_methods import LOGIT_BIAS, UNSTEERED, TopicMethod, TopicsResult
from backpack_lm.experiments.topic_words import TOPIC_WORDS
from backpack_lm.lab.batch_sampler import sample
from backpack_lm.lab.lab_model import LabModel, SteeredModel
from backpack_lm.lab.progress import ResumeJournal, Watch
from backpack_lm.lab.topic import STRENGTHS, By
from backpack_lm.lab.topic_vector import FrequentWords, topic_vector_edits
from backpack_lm.lab.twin import read_twin
from backpack_lm.patch import TopicEdit
from backpack_lm.training.evaluation import LanguageModel

BIASES = (2.0, 4.0, 5.0, 6.0, 8.0)
"""Added to the logits of the topic's words: the baseline that any model allows."""


@dataclass(frozen=True, slots=True)
class TopicControl:
    """`samples` texts of `length` tokens for every topic and method, after the end-of-text token and `prompt`.

    `judge` is a sentence encoder's folder; `twin`, if given, reads the texts for their perplexity instead of the
    model itself, unsteered; `work`, if given, keeps finished parts so that a stopped run goes on.
    """

    samples: int = 8
    length: int = 100
    prompt: str = ""
    seed: int = 0
    judge: Path | None = None
    twin: Path | None = None
    work: Path | None = None
    NAME: ClassVar[str] = "topics"

    def run(self, subject: LabModel, watch: Watch) -> Result:
        if subject.config.eos_token_id is None:
            raise ValueError("this model has no end-of-text token to start a text with")
        judge = TopicJudge(self.judge or default_judge())
        twin = read_twin(self.twin, subject.config) if self.twin else None
        if twin and len(self._start_prompt(subject)) + self.length > twin.config.n_positions:
            raise ValueError(f"the twin reads {twin.config.n_positions} tokens; make the texts shorter")
        quality = twin or SteeredModel(subject, subject.overlay())
        piece = subject.tokenizer.piece
        words = {topic: [piece(token).strip() for token in _tokens(subject, topic)] for topic in TOPIC_WORDS}
        topic_embeddings = judge.embed(list(TOPIC_WORDS))
        made_by = {
            "model": subject.manifest.fingerprint,
            "samples": self.samples,
            "length": self.length,
            "prompt": self.prompt,
        }
        journal = ResumeJournal(self.work, {**made_by, "seed": self.seed})
        plan: list[tuple[str, float]] = [(UNSTEERED, 0.0)]
        plan += [(by, float(s)) for by in (By.MULTIPLIERS, By.LEAN) for s in STRENGTHS]
        plan += [(LOGIT_BIAS, bias) for bias in BIASES]
        parts = [(method, topic) for method in plan for topic in (list(TOPIC_WORDS) if method[1] else [UNSTEERED])]
        frequent = FrequentWords.of(subject)
        texts: dict[tuple[tuple[str, float], str], list[list[int]]] = {}
        for method, topic in watch(parts, "topics × methods", len(parts)):
            key = f"{method[0]} {method[1]:g}, {topic}"
            texts[method, topic] = journal.once(key, partial(self._texts, subject, frequent, method, topic))
        methods = []
        for method in watch(plan, "judging", len(plan)):
            judged = {t: texts[method, t if method[1] else UNSTEERED] for t in TOPIC_WORDS}
            methods.append(
                _judge_texts(subject, judge, quality, topic_embeddings, method, judged, self._start_prompt(subject))
            )
        name = "the twin" if twin else "the model, unsteered"
        return TopicsResult(methods, words, self.samples, self.length, self.prompt, name)

    def _start_prompt(self, subject: LabModel) -> list[int]:
        assert subject.config.eos_token_id is not None
        return [subject.config.eos_token_id, *subject.tokenizer.encode(self.prompt)]

    def _texts(
        self, subject: LabModel, frequent: FrequentWords, method: tuple[str, float], topic: str
    ) -> list[list[int]]:
        tokens, (name, strength) = _tokens(subject, topic) if topic in TOPIC_WORDS else (), method
        overlay, bias = subject.overlay(), None
        if name == By.MULTIPLIERS:
            overlay = subject.overlay(TopicEdit(tokens, int(strength)))
        elif name == By.LEAN:
            overlay = subject.overlay(*topic_vector_edits(subject, tokens, int(strength), frequent))
        elif name == LOGIT_BIAS:
            bias = torch.zeros(subject.config.tokens)
            bias[list(tokens)] = strength
        seed = self.seed + 1000 * (list(TOPIC_WORDS).index(topic) + 1 if tokens else 0)
        ids: list[list[int]] = sample(
            subject, overlay, self._start_prompt(subject), self.samples, self.length, seed, bias
        ).tolist()
        return ids


def _tokens(subject: LabModel, topic: str) -> tuple[int, ...]:
    """A topic's words that are one token; if there is none, the first token of each word, as the paper's code has
    it."""
    words = subject.single_token_words(TOPIC_WORDS[topic])
    ids = map(subject.token, words) if words else (subject.word_ids(word)[0] for word in TOPIC_WORDS[topic])
    return tuple(dict.fromkeys(ids))


def _judge_texts(
    subject: LabModel,
    judge: TopicJudge,
    quality: LanguageModel,
    topic_embeddings: Tensor,
    method: tuple[str, float],
    judged: dict[str, list[list[int]]],
    prompt: list[int],
) -> TopicMethod:
    success: dict[str, float] = {}
    flat = [ids for texts in judged.values() for ids in texts]
    distinct_texts = [list(t) for t in dict.fromkeys(map(tuple, flat))]
    vectors = judge.embed([subject.tokenizer.decode(ids) for ids in distinct_texts])
    nearest = {
        tuple(t): int(at) for t, at in zip(distinct_texts, (vectors @ topic_embeddings.t()).argmax(1), strict=True)
    }
    for number, (topic, texts) in enumerate(judged.items()):
        success[topic] = 100 * sum(nearest[tuple(ids)] == number for ids in texts) / len(texts)
    example = subject.tokenizer.decode(judged["food and dining"][0][:60])
    return TopicMethod(
        method[0],
        method[1],
        fmean(success.values()),
        _perplexity(quality, prompt, distinct_texts),
        100 * fmean(distinct_pairs(subject.tokenizer.decode(ids)) for ids in distinct_texts),
        success,
        " ".join(example.split()) + " …",
    )


def distinct_pairs(text: str) -> float:
    """Share of a text's pairs of neighbouring words that differ from each other."""
    words = text.lower().split()
    pairs = list(pairwise(words))
    return len(set(pairs)) / len(pairs) if pairs else 1.0


@torch.inference_mode()
def _perplexity(model: LanguageModel, prompt: list[int], texts: Sequence[Sequence[int]]) -> float:
    """Of texts of one length, after the prompt."""
    total, ids = 0.0, torch.tensor(texts)
    rows = torch.cat([torch.tensor(prompt).expand(len(ids), -1), ids], 1)
    for part in rows.split(8):
        logs = (model.mix(part[:, :-1])[:, len(prompt) - 1 :] @ model.embedding.t()).log_softmax(-1)
        total -= float(logs.gather(2, part[:, len(prompt) :, None]).double().sum())
    return math.exp(total / ids.numel())
