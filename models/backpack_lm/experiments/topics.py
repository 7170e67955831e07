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

from backpack_lm.experiments.experiment import Headline, Result
from backpack_lm.experiments.reader import Reader, default_reader
from backpack_lm.experiments.themes import THEMES
from backpack_lm.lab.lockstep import sample
from backpack_lm.lab.subject import Steered, Subject
from backpack_lm.lab.twin import read_twin
from backpack_lm.lab.watch import Journal, Watch
from backpack_lm.patch import Topic
from backpack_lm.reports.plots import lines
from backpack_lm.reports.report import Entry, Report, Table
from backpack_lm.training.trainer import LanguageModel

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
    words: dict[str, list[str]]
    samples: int
    length: int
    prompt: str
    reader: str

    @property
    def base(self) -> Way:
        return self.ways[0]

    @property
    def steered(self) -> list[Way]:
        """By sense multipliers, strengths 1 to 3."""
        return [way for way in self.ways[1:] if way.name == self.base.name]

    @property
    def biased(self) -> list[Way]:
        return [way for way in self.ways if way.name != self.base.name]

    def bias_at(self, success: float) -> tuple[float, float] | None:
        """Perplexity and distinct pairs of the logit bias where it has this success, between the biases that were
        measured; None if none of them has as much."""
        for one, two in pairwise([self.base, *self.biased]):
            if one.success <= success <= two.success and two.success > one.success:
                part = (success - one.success) / (two.success - one.success)
                log = (1 - part) * math.log(one.perplexity) + part * math.log(two.perplexity)
                return math.exp(log), (1 - part) * one.distinct + part * two.distinct
        return None

    def headline(self) -> Headline:
        base, strongest = self.base, self.steered[-1]
        times, plain = strongest.success / base.success, self.bias_at(strongest.success)
        kept = plain is not None and strongest.distinct >= plain[1]
        figures = (
            f"success unsteered / strength 1 / 2 / 3: "
            f"{' / '.join(f'{w.success:.1f}' for w in (base, *self.steered))} % "
            f"({times:.1f} times); distinct pairs {base.distinct:.0f} → {strongest.distinct:.0f} %, perplexity "
            f"{base.perplexity:.0f} → {strongest.perplexity:.0f}"
        )
        if plain is not None:
            figures += f"; a logit bias of equal success: {plain[1]:.0f} %, {plain[0]:.0f}"
        return Headline(
            figures,
            "7.4 / 12.1 / 24.3 / 35.3 %, another judge",
            "3 times; more distinct pairs than a logit bias of equal success",
            times >= 3 and kept,
        )

    def report(self) -> Report:
        base, strongest = self.base, self.steered[-1]
        rows = tuple((w.name, w.strength, w.success, w.perplexity, w.distinct) for w in self.ways)
        examples = tuple((w.name, w.strength, w.example) for w in self.ways)
        columns = ("way", "strength", "success %", f"perplexity to {self.reader}", "distinct pairs %")
        topics: tuple[tuple[Entry, ...], ...] = tuple(
            (topic, *(w.by_topic[topic] for w in self.ways), ", ".join(self.words[topic])) for topic in THEMES
        )
        heads = ("topic", *(f"{w.name} {w.strength:g}" for w in self.ways), "words")
        curves = {
            "sense multipliers": [(w.success, w.distinct) for w in (base, *self.steered)],
            "logit bias": [(w.success, w.distinct) for w in (base, *self.biased)],
        }
        plain = self.bias_at(strongest.success)
        compared = (
            "no logit bias that was tried has as much success"
            if plain is None
            else f"a logit bias of equal success, {plain[1]:.1f}%"
        )
        return Report(
            "Topic control",
            f"At strength 3 the judge finds {strongest.success:.1f}% of the texts nearest to their topic, against "
            f"{base.success:.1f}% unsteered ({strongest.success / base.success:.1f} times). Distinct pairs: "
            f"{base.distinct:.1f}% unsteered, {strongest.distinct:.1f}% steered; {compared}.",
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
                f"Perplexity of the text to {self.reader}: lower is likelier, and repetition "
                "lowers it; distinct pairs are the share of a text's pairs of neighbouring words that differ. "
                "Those of the logit bias at equal success lie on the line between the biases that were measured.",
                "A topic's words are those of its name and what else anybody would name, if they are one token; "
                "the paper has those of the name alone. Senses and logit bias get the same.",
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

    def run(self, subject: Subject, watch: Watch) -> Result:
        if subject.config.eos_token_id is None:
            raise ValueError("this model has no end-of-text token to start a text with")
        reader = Reader(self.judge or default_reader())
        twin = read_twin(self.twin, subject.config) if self.twin else None
        if twin and len(self._prompt(subject)) + self.length > twin.config.n_positions:
            raise ValueError(f"the twin reads {twin.config.n_positions} tokens; make the texts shorter")
        quality = twin or Steered(subject, subject.overlay())
        piece = subject.tokenizer.piece
        words = {theme: [piece(token).strip() for token in _tokens(subject, theme)] for theme in THEMES}
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
            ways.append(_judge(subject, reader, quality, themes, way, judged, self._prompt(subject)))
        name = "the twin" if twin else "the model, unsteered"
        return TopicsResult(ways, words, self.samples, self.length, self.prompt, name)

    def _prompt(self, subject: Subject) -> list[int]:
        assert subject.config.eos_token_id is not None
        return [subject.config.eos_token_id, *subject.tokenizer.encode(self.prompt)]

    def _texts(self, subject: Subject, way: tuple[str, float], theme: str) -> list[list[int]]:
        tokens = _tokens(subject, theme) if theme in THEMES else ()
        overlay, bias = subject.overlay(), None
        if way[0] == "Backpack" and way[1]:
            overlay = subject.overlay(Topic(tokens, int(way[1])))
        elif way[1]:
            bias = torch.zeros(subject.config.tokens)
            bias[list(tokens)] = way[1]
        seed = self.seed + 1000 * (list(THEMES).index(theme) + 1 if tokens else 0)
        ids: list[list[int]] = sample(
            subject, overlay, self._prompt(subject), self.samples, self.length, seed, bias
        ).tolist()
        return ids


def _tokens(subject: Subject, theme: str) -> tuple[int, ...]:
    """A topic's words that are one token; if there is none, the first token of each word, as the paper's code has
    it."""
    words = subject.known(THEMES[theme])
    ids = map(subject.token, words) if words else (subject.word_ids(word)[0] for word in THEMES[theme])
    return tuple(dict.fromkeys(ids))


def _judge(
    subject: Subject,
    reader: Reader,
    quality: LanguageModel,
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
        _perplexity(quality, prompt, distinct_texts),
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
def _perplexity(model: LanguageModel, prompt: list[int], texts: Sequence[Sequence[int]]) -> float:
    """Of texts of one length, after the prompt."""
    total, ids = 0.0, torch.tensor(texts)
    rows = torch.cat([torch.tensor(prompt).expand(len(ids), -1), ids], 1)
    for part in rows.split(8):
        logs = (model.mix(part[:, :-1])[:, len(prompt) - 1 :] @ model.embedding.t()).log_softmax(-1)
        total -= float(logs.gather(2, part[:, len(prompt) :, None]).double().sum())
    return math.exp(total / ids.numel())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
