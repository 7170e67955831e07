"""What topic control found: methods beside each other, in success and in both sides of quality."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from backpack_lm.experiments.experiment import Headline
from backpack_lm.experiments.topic_words import TOPIC_WORDS
from backpack_lm.lab.topic import By
from backpack_lm.reports.plots import lines
from backpack_lm.reports.report import Entry, Report, Table

UNSTEERED, LOGIT_BIAS = "unsteered", "logit bias"


@dataclass(frozen=True, slots=True)
class TopicMethod:
    """One method of steering, over all topics: success %, perplexity to the unsteered model, distinct word pairs %."""

    name: str
    strength: float
    success: float
    perplexity: float
    distinct: float
    by_topic: dict[str, float]
    example: str


@dataclass(frozen=True, slots=True)
class TopicsResult:
    """All methods in all their strengths, the unsteered first; the words of each topic; the model that perplexity is
    measured with. The fields are keys of topics.json."""

    ways: list[TopicMethod]
    words: dict[str, list[str]]
    samples: int
    length: int
    prompt: str
    reader: str

    @property
    def base(self) -> TopicMethod:
        return self.ways[0]

    def of(self, name: str) -> list[TopicMethod]:
        """One method in its strengths."""
        return [method for method in self.ways if method.name == name]

    def times(self, method: TopicMethod) -> float:
        """Its success, in times the unsteered."""
        return method.success / self.base.success

    def bias_at(self, success: float) -> tuple[float, float] | None:
        """Perplexity and distinct pairs of the logit bias where it has this success, between the biases that were
        measured; None if none of them has as much."""
        for one, two in pairwise([self.base, *self.of(LOGIT_BIAS)]):
            if one.success <= success <= two.success and two.success > one.success:
                part = (success - one.success) / (two.success - one.success)
                log = (1 - part) * math.log(one.perplexity) + part * math.log(two.perplexity)
                return math.exp(log), (1 - part) * one.distinct + part * two.distinct
        return None

    def reached(self, method: TopicMethod) -> bool:
        """Three times the unsteered success, and neither side of quality below the logit bias of equal success."""
        plain = self.bias_at(method.success)
        kept = plain is not None and method.perplexity <= plain[0] and method.distinct >= plain[1]
        return kept and self.times(method) >= 3

    def headline(self) -> Headline:
        base, frequent = self.base, self.of(By.LEAN)[-1]
        found = {by: self.of(by) for by in By}
        told = {
            by: f"{' / '.join(f'{w.success:.1f}' for w in methods)} % ({self.times(methods[-1]):.1f} times)"
            for by, methods in found.items()
        }
        figures = (
            f"success unsteered {base.success:.1f} %; strength 1 / 2 / 3 by multipliers, the paper's way: "
            f"{told[By.MULTIPLIERS]}; by frequent words that lean to the topic, the lab's way: {told[By.LEAN]}, "
            f"perplexity {base.perplexity:.0f} → {frequent.perplexity:.0f}, distinct pairs {base.distinct:.0f} → "
            f"{frequent.distinct:.0f} %"
        )
        if plain := self.bias_at(frequent.success):
            figures += f"; a logit bias of equal success: {plain[0]:.0f}, {plain[1]:.0f} %"
        return Headline(
            figures,
            "7.4 / 12.1 / 24.3 / 35.3 %, another judge",
            "3 times; text likelier and of more distinct pairs than by a logit bias of equal success",
            any(self.reached(methods[-1]) for methods in found.values()),
        )

    def report(self) -> Report:
        base, (plainly, frequent) = self.base, (self.of(by)[-1] for by in (By.MULTIPLIERS, By.LEAN))
        rows: list[tuple[Entry, ...]] = []
        for w in self.ways:
            plain = None if w.name in (UNSTEERED, LOGIT_BIAS) else self.bias_at(w.success)
            rows.append((w.name, w.strength, w.success, w.perplexity, w.distinct, *(plain or (None, None))))
        examples = tuple((w.name, w.strength, w.example) for w in self.ways)
        columns = (
            "way",
            "strength",
            "success %",
            f"perplexity to {self.reader}",
            "distinct pairs %",
            "perplexity, logit bias of equal success",
            "distinct pairs %, the same",
        )
        topics: tuple[tuple[Entry, ...], ...] = tuple(
            (topic, *(w.by_topic[topic] for w in self.ways), ", ".join(self.words[topic])) for topic in TOPIC_WORDS
        )
        heads = ("topic", *(f"{w.name} {w.strength:g}" for w in self.ways), "words")
        curves = {name: [base, *self.of(name)] for name in (By.MULTIPLIERS, By.LEAN, LOGIT_BIAS)}
        plain = self.bias_at(frequent.success)
        compared = (
            "no logit bias that was tried has as much success"
            if plain is None
            else f"a logit bias of equal success has perplexity {plain[0]:.0f} and {plain[1]:.1f}% distinct pairs"
        )
        return Report(
            "Topic control",
            f"Unsteered, the judge finds {base.success:.1f}% of the texts nearest to their topic. At strength 3, "
            f"by the paper's multipliers {plainly.success:.1f}% ({self.times(plainly):.1f} times), by the lab's "
            f"leaning words {frequent.success:.1f}% ({self.times(frequent):.1f} times), whose text has perplexity "
            f"{frequent.perplexity:.0f} (unsteered {base.perplexity:.0f}) and {frequent.distinct:.1f}% distinct pairs "
            f"(unsteered {base.distinct:.1f}%); {compared}.",
            (
                Table("In short", columns, tuple(rows), digits=1),
                Table("Success % by topic", heads, topics, digits=0),
                Table("One text of each", ("way", "strength", "text"), examples, digits=1),
            ),
            (
                lines(
                    "What success costs in distinct pairs",
                    {name: [(w.success, w.distinct) for w in methods] for name, methods in curves.items()},
                    "success %",
                    "distinct word pairs %",
                ),
                lines(
                    "What success costs in perplexity",
                    {name: [(w.success, w.perplexity) for w in methods] for name, methods in curves.items()},
                    "success %",
                    f"perplexity to {self.reader}",
                ),
            ),
            (
                f"{self.samples} ancestral samples of {self.length} tokens for each topic and way, from "
                f"{'the end-of-text token' if not self.prompt else repr(self.prompt)}; unsteered is one set of "
                "samples, judged for every topic.",
                "Multipliers are the paper's: a cell's by the quantile of its score, fading as the text satisfies "
                "it. Lean is `backpack lab topic`'s: the words that the model writes most say some of the topic, "
                "the topic's own words less. It was made with ten other topics.",
                f"Perplexity of the text to {self.reader}: lower is likelier, and repetition "
                "lowers it; distinct pairs are the share of a text's pairs of neighbouring words that differ. "
                "Those of the logit bias at equal success lie on the line between the biases that were measured.",
                "A topic's words are those of its name and what else anybody would name, if they are one token; "
                "the paper has those of the name alone. Every way gets the same.",
                *(
                    f"Strength 3 by {by} does not reach three times the unsteered success on this model, or loses "
                    "more quality than the logit bias."
                    for by in By
                    if not self.reached(self.of(by)[-1])
                ),
                "The judge is a sentence encoder that knows nothing of the model. The paper's figures are another "
                "classifier's at p > 0.5 and aren't comparable.",
            ),
        )
