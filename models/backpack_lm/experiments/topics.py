"""Topic control (paper, section 6.3): samples from the end-of-text token, steered to a topic at four strengths.

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
from typing import ClassVar

import torch
from torch import Tensor

from backpack_lm.experiments.experiment import Result
from backpack_lm.experiments.reader import Reader, default_reader
from backpack_lm.experiments.themes import THEMES
from backpack_lm.lab.lockstep import sample
from backpack_lm.lab.subject import Steered, Subject
from backpack_lm.lab.watch import Journal, Watch
from backpack_lm.patch import Topic
from backpack_lm.reports.plots import lines
from backpack_lm.reports.report import Entry, Report, Table
from backpack_lm.tokenizer import WordPolicy

STRENGTHS = (0, 1, 2, 3)
BIASES = (2.0, 4.0, 6.0)
"""Added to the logits of the topic's words: the baseline that any model allows."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way to steer, over all topics: success %, perplexity to the unsteered model, distinct word pairs %."""

    name: str
    strength: float
    success: float
    perplexity: float
    distinct: float
    by_topic: dict[str, float]
    example: str


@dataclass(frozen=True, slots=True)
class TopicsResult:
    ways: list[Way]
    samples: int
    length: int
    prompt: str

    def report(self) -> Report:
        base, steered = self.ways[0], [w for w in self.ways if w.name == "Backpack"]
        plain = [w for w in self.ways if w.name != "Backpack"]
        strongest = steered[-1]
        near = min(plain, key=lambda way: abs(way.success - strongest.success))
        rows = tuple((w.name, w.strength, w.success, w.perplexity, w.distinct) for w in self.ways)
        examples = tuple((w.name, w.strength, w.example) for w in self.ways)
        columns = ("way", "strength", "success %", "perplexity, unsteered reader", "distinct pairs %")
        topics: tuple[tuple[Entry, ...], ...] = tuple(
            (topic, *(w.by_topic[topic] for w in self.ways)) for topic in THEMES
        )
        heads = ("topic", *(f"{w.name} {w.strength:g}" for w in self.ways))
        curves = {
            "sense multipliers": [(w.success, w.distinct) for w in (base, *steered[1:])],
            "logit bias": [(w.success, w.distinct) for w in (base, *plain)],
        }
        return Report(
            "Topic control",
            f"At strength 3 the judge finds {strongest.success:.1f}% of the texts nearest to their topic, against "
            f"{base.success:.1f}% unsteered ({strongest.success / base.success:.1f} times). Distinct pairs: "
            f"{base.distinct:.1f}% unsteered, {strongest.distinct:.1f}% steered; the logit bias nearest in "
            f"success ({near.success:.1f}%) has {near.distinct:.1f}%.",
            (
                Table("In short", columns, rows, digits=1),
                Table("Success % by topic", heads, topics, digits=0),
                Table("One text of each", ("way", "strength", "text"), examples, digits=1),
            ),
            (lines("What success costs", curves, "success %", "distinct word pairs %"),),
            (
                f"{self.samples} ancestral samples of {self.length} tokens for each topic and way, from "
                f"{'the end-of-text token' if not self.prompt else repr(self.prompt)}; strength 0 is one set of "
                "samples, judged for every topic.",
                "Perplexity is of the text under the same model unsteered: lower is likelier, and repetition "
                "lowers it; distinct pairs are the share of a text's pairs of neighbouring words that differ.",
                *(
                    ()
                    if strongest.success >= 3 * base.success
                    else ("Strength 3 does not reach three times the unsteered success on this model.",)
                ),
                "The judge is a sentence encoder that knows nothing of the model. The paper's figures are another "
                "classifier's at p > 0.5 and aren't comparable.",
            ),
        )


@dataclass(frozen=True, slots=True)
class TopicControl:
    """`samples` texts of `length` tokens for every topic and way, after the end-of-text token and `prompt`.

    `judge` is a sentence encoder's folder; `work`, if given, keeps finished parts so that a stopped run goes on.
    """

    samples: int = 8
    length: int = 100
    prompt: str = ""
    seed: int = 0
    judge: Path | None = None
    work: Path | None = None
    NAME: ClassVar[str] = "topics"

    def run(self, subject: Subject, watch: Watch) -> Result:
        if subject.config.eos_token_id is None:
            raise ValueError("this model has no end-of-text token to start a text with")
        reader = Reader(self.judge or default_reader())
        themes = reader.embed(list(THEMES))
        made_by = {
            "model": subject.manifest.fingerprint,
            "samples": self.samples,
            "length": self.length,
            "prompt": self.prompt,
        }
        journal = Journal(self.work, {**made_by, "seed": self.seed})
        plan = [("Backpack", float(s)) for s in STRENGTHS] + [("logit bias", b) for b in BIASES]
        parts = [(way, theme) for way in plan for theme in (list(THEMES) if way[1] else ["unsteered"])]
        texts: dict[tuple[tuple[str, float], str], list[list[int]]] = {}
        for way, theme in watch(parts, "topics × ways", len(parts)):
            key = f"{way[0]} {way[1]:g}, {theme}"
            texts[way, theme] = journal.once(key, partial(self._texts, subject, way, theme))
        ways = []
        for way in watch(plan, "judging", len(plan)):
            judged = {t: texts[way, t if way[1] else "unsteered"] for t in THEMES}
            ways.append(_judge(subject, reader, themes, way, judged, self._prompt(subject)))
        return TopicsResult(ways, self.samples, self.length, self.prompt)

    def _prompt(self, subject: Subject) -> list[int]:
        assert subject.config.eos_token_id is not None
        return [subject.config.eos_token_id, *subject.tokenizer.encode(self.prompt)]

    def _texts(self, subject: Subject, way: tuple[str, float], theme: str) -> list[list[int]]:
        words = THEMES.get(theme, ())
        # As the paper's code has it: the first token of each word, with its space.
        tokens = tuple(dict.fromkeys(subject.tokenizer.word_ids(word, WordPolicy.FIRST)[0] for word in words))
        overlay, bias = subject.overlay(), None
        if way[0] == "Backpack" and way[1]:
            overlay = subject.overlay(Topic(tokens, int(way[1])))
        elif way[1]:
            bias = torch.zeros(subject.config.tokens)
            bias[list(tokens)] = way[1]
        seed = self.seed + 1000 * (list(THEMES).index(theme) + 1 if words else 0)
        ids: list[list[int]] = sample(
            subject, overlay, self._prompt(subject), self.samples, self.length, seed, bias
        ).tolist()
        return ids


def _judge(
    subject: Subject,
    reader: Reader,
    themes: Tensor,
    way: tuple[str, float],
    judged: dict[str, list[list[int]]],
    prompt: list[int],
) -> Way:
    success: dict[str, float] = {}
    flat = [ids for texts in judged.values() for ids in texts]
    distinct_texts = [list(t) for t in dict.fromkeys(map(tuple, flat))]
    vectors = reader.embed([subject.tokenizer.decode(ids) for ids in distinct_texts])
    nearest = {tuple(t): int(at) for t, at in zip(distinct_texts, (vectors @ themes.t()).argmax(1), strict=True)}
    for number, (theme, texts) in enumerate(judged.items()):
        success[theme] = 100 * sum(nearest[tuple(ids)] == number for ids in texts) / len(texts)
    example = subject.tokenizer.decode(judged["food and dining"][0][:60])
    return Way(
        way[0],
        way[1],
        _mean(list(success.values())),
        _perplexity(subject, prompt, distinct_texts),
        100 * _mean([distinct_pairs(subject.tokenizer.decode(ids)) for ids in distinct_texts]),
        success,
        " ".join(example.split()) + " …",
    )


def distinct_pairs(text: str) -> float:
    """Share of a text's pairs of neighbouring words that differ from each other."""
    words = text.lower().split()
    pairs = list(pairwise(words))
    return len(set(pairs)) / len(pairs) if pairs else 1.0


@torch.inference_mode()
def _perplexity(subject: Subject, prompt: list[int], texts: Sequence[Sequence[int]]) -> float:
    """Of texts of one length, under the unsteered model, after the prompt."""
    model, total = Steered(subject, subject.overlay()), 0.0
    ids = torch.tensor(texts)
    rows = torch.cat([torch.tensor(prompt).expand(len(ids), -1), ids], 1)
    for part in rows.split(8):
        logs = (model.mix(part[:, :-1])[:, len(prompt) - 1 :] @ subject.head.t()).log_softmax(-1)
        total -= float(logs.gather(2, part[:, len(prompt) :, None]).double().sum())
    return math.exp(total / ids.numel())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
