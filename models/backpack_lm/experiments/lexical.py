"""Lexical similarity (paper, section 5): do cosines of sense vectors rank word pairs as people do?

A word gets a leading space; one of several tokens is the mean of their vectors. The mean of pieces is no sense of
the word: over all pairs a correlation measures the tokenizer as well. So each is shown twice, over all pairs and
over those of two single tokens.

Each is also shown around the mean. A sense's weights sum to one over the positions, so a vector that is added to all of
one sense's vectors and taken from another sense's changes no prediction. Plain cosines depend on it; those of vectors
less their mean over the vocabulary don't.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from backpack_lm.experiments.experiment import Headline, Result
from backpack_lm.lab.lab_model import LabModel
from backpack_lm.lab.progress import Watch
from backpack_lm.lab.twin import read_twin
from backpack_lm.ordinary_text import plain
from backpack_lm.reports.plots import bars
from backpack_lm.reports.report import Entry, Report, Table, best

Pair = tuple[str, str, float]


@dataclass(frozen=True, slots=True)
class DataSet:
    """Where a published list of rated pairs lies, and how it is written."""

    name: str
    file: str
    delimiter: str
    column: int
    header: bool

    def read(self, folder: Path) -> list[Pair]:
        """Raises ValueError naming the file, and the line that isn't a rated pair."""
        path = folder / self.file
        if not path.exists():
            raise ValueError(f"{path} doesn't exist; --data is the folder that holds {self.file} as it is published")
        rows = list(csv.reader(plain(path).splitlines(), delimiter=self.delimiter))
        pairs = []
        for number, row in enumerate(rows[self.header :], 1 + self.header):
            try:
                pairs.append((row[0].strip(), row[1].strip(), float(row[self.column])))
                if math.isnan(pairs[-1][2]):
                    raise ValueError("it ranks nothing")
            except (IndexError, ValueError):
                raise ValueError(f"{path}:{number}: {row} is not two words and a rating") from None
        if not pairs:
            raise ValueError(f"{path} holds no pairs of words")
        return pairs


DATA_SETS = (
    DataSet("SimLex-999", "SimLex-999.txt", "\t", 3, header=True),
    DataSet("SimVerb-3500", "SimVerb-3500.txt", "\t", 3, header=False),
    DataSet("RG-65", "RG65.csv", ";", 2, header=False),
    DataSet("WordSim-353", "WS353.csv", ",", 2, header=True),
)


FEWEST = 3
"""Pairs of single tokens that are ranked at least: two are always in order or not."""


@dataclass(frozen=True, slots=True)
class LexicalResult:
    """Spearman's ρ for each data set: of each sense, of their minimum, of the embeddings, of the twin's.

    `single` is the same over the pairs of two single tokens, in the data sets that have FEWEST of them; None if
    none has. `centred` is the same of vectors less their mean over the vocabulary.
    """

    pairs: dict[str, int]
    tokens_per_word: float
    senses: dict[str, list[float]]
    minimum: dict[str, float]
    embedding: dict[str, float]
    twin: dict[str, float] | None
    single: LexicalResult | None = None
    centred: LexicalResult | None = None

    def headline(self) -> Headline:
        whose = "its own" if self.twin is None else "the twin's"
        names = list(self.senses)[:2]
        against = self.embedding if self.twin is None else self.twin
        above = all(max(*self.senses[n], self.minimum[n]) > against[n] for n in names)
        figures = f"over all pairs, which measures the tokenizer too, {self._correlations()}"
        if self.single is not None:
            figures += f"; over pairs of single tokens {self.single._correlations()}"
        if self.centred is not None:
            figures += f"; over all pairs, around the mean, {self.centred._correlations()}"
        return Headline(
            f"best sense / minimum / {whose} embeddings, {figures}",
            "SimLex-999: .522 / .540 / .478; SimVerb-3500: .502 / .471 / .363",
            "best sense or minimum above the twin's embeddings on both",
            None if self.twin is None else above,
        )

    def _correlations(self) -> str:
        against = self.embedding if self.twin is None else self.twin
        return "; ".join(
            f"{n}: {max(self.senses[n]):.3f} / {self.minimum[n]:.3f} / {against[n]:.3f}" for n in list(self.senses)[:2]
        )

    def _rows(self) -> tuple[tuple[str, ...], tuple[tuple[Entry, ...], ...]]:
        """Columns and rows of the table in short."""
        names = list(self.senses)
        one = best([sum(self.senses[n][s] for n in names) for s in range(len(self.senses[names[0]]))])
        rows: list[tuple[Entry, ...]] = []
        if self.twin is not None:
            rows.append(("Transformer twin, embeddings", *(self.twin[n] for n in names)))
        rows.append(("embeddings", *(self.embedding[n] for n in names)))
        rows.append(("minimum over senses", *(self.minimum[n] for n in names)))
        rows.append((f"sense {one}, the best on all together", *(self.senses[n][one] for n in names)))
        rows.append(("best sense of each", *(f"{max(self.senses[n]):.3f} ({best(self.senses[n])})" for n in names)))
        if self.centred is not None:
            _, around = self.centred._rows()
            rows += [(f"{label}, around the mean", *entries) for label, *entries in around]
        return ("vectors", *(f"{n} ({self.pairs[n]})" for n in names)), tuple(rows)

    def _every(self) -> tuple[tuple[str, ...], tuple[tuple[Entry, ...], ...]]:
        names = list(self.senses)
        senses = range(len(self.senses[names[0]]))
        return ("vectors", *names), tuple((f"sense {s}", *(self.senses[n][s] for n in names)) for s in senses)

    def _below(self) -> list[str]:
        """The first two data sets where senses aren't above embeddings."""
        against = self.embedding if self.twin is None else self.twin
        names = list(self.senses)[:2]
        return [n for n in names if max(*self.senses[n], self.minimum[n]) <= against[n]]

    def report(self) -> Report:
        short, every, single = self._rows(), self._every(), self.single
        tables = [Table("In short", *short), Table("Every sense", *every)]
        if single is not None:
            tables = [
                Table("In short, all pairs: the tokenizer is measured too", *short),
                Table("In short, pairs of single tokens", *single._rows()),
                Table("Every sense, all pairs", *every),
                Table("Every sense, pairs of single tokens", *single._every()),
            ]
        alone = sum(single.pairs.values()) if single else 0
        labels = [str(s) for s in range(len(every[1]))]
        claims = [
            ("all pairs of", self._below()),
            ("pairs of single tokens of", single._below() if single else []),
        ]
        return Report(
            "Lexical similarity",
            f"Spearman correlation of cosines with people's ratings of {sum(self.pairs.values()):,} word pairs.",
            tuple(tables),
            (bars("Spearman's ρ of each sense", labels, self.senses, "sense", "ρ"),),
            (
                f"A word is {self.tokens_per_word:.2f} tokens on average; of several, the mean of their vectors, "
                f"which is no sense of the word. {sum(self.pairs.values()) - alone:,} pairs have such a word"
                + (
                    f"; the tables of single tokens are without them, over {alone:,} pairs."
                    if single
                    else ", and no list has enough pairs without: these figures measure the tokenizer as well."
                ),
                "The best sense is picked on the data that it is scored on, as in the paper's table 3; "
                "the minimum over senses and the embeddings pick nothing.",
                "Around the mean: each sense's vectors, and the embeddings, less their mean over the vocabulary. "
                "A vector added to one sense of all words, and taken from another, changes no prediction, "
                "but plain cosines.",
                *(
                    f"The paper's claim, senses above embeddings, does not show on {which} {', '.join(below)}."
                    for which, below in claims
                    if below
                ),
            ),
        )


@dataclass(frozen=True, slots=True)
class LexicalSimilarity:
    """`data` holds the four lists as they are published; `twin` is a Transformer to compare with."""

    data: Path
    twin: Path | None = None
    NAME: ClassVar[str] = "lexical"

    def run(self, subject: LabModel, watch: Watch) -> Result:
        lists = {data_set.name: data_set.read(self.data) for data_set in DATA_SETS}
        twin = read_twin(self.twin, subject.config).embedding if self.twin else None
        words = sorted({word for pairs in lists.values() for one, two, _ in pairs for word in (one, two)})
        ids = {word: torch.tensor(subject.word_ids(word)) for word in words}
        known = {word for word in words if len(ids[word]) == 1}
        alone = {n: [p for p in pairs if {p[0], p[1]} <= known] for n, pairs in lists.items()}
        alone = {n: pairs for n, pairs in alone.items() if len(pairs) >= FEWEST}
        as_they_are, centred = (
            _WordVectors.of(subject, ids, watch(words, what), twin, less_mean)
            for what, less_mean in (("words", False), ("words, around the mean", True))
        )
        single = replace(as_they_are.measure(alone), centred=centred.measure(alone)) if alone else None
        return replace(as_they_are.measure(lists), single=single, centred=centred.measure(lists))


@dataclass(frozen=True, slots=True)
class _WordVectors:
    """Of each word: its tokens, the vectors of its senses [k, d], its embedding [d], and the twin's."""

    ids: dict[str, Tensor]
    senses: dict[str, Tensor]
    embedding: dict[str, Tensor]
    twin: dict[str, Tensor] | None

    @classmethod
    def of(
        cls, subject: LabModel, ids: dict[str, Tensor], words: Iterable[str], twin: Tensor | None, less_mean: bool
    ) -> _WordVectors:
        def of_table(table: Tensor, words: Iterable[str]) -> dict[str, Tensor]:
            mean = _mean(table[: subject.config.tokens]) if less_mean else torch.zeros(table.shape[1:])
            return {word: table[ids[word]].mean(0) - mean for word in words}

        senses = of_table(subject.table.rows, words)
        return cls(
            ids, senses, of_table(subject.model.embedding, senses), None if twin is None else of_table(twin, senses)
        )

    def measure(self, lists: dict[str, list[Pair]]) -> LexicalResult:
        """Some pairs of each list: correlations with the cosines of words' vectors."""
        words = {word for pairs in lists.values() for one, two, _ in pairs for word in (one, two)}
        result = LexicalResult(
            {name: len(pairs) for name, pairs in lists.items()},
            sum(len(self.ids[word]) for word in words) / len(words),
            {},
            {},
            {},
            None if self.twin is None else {},
        )
        for name, pairs in lists.items():
            ratings = [rating for *_, rating in pairs]
            cosines = _cosines(pairs, self.senses)  # [pairs, k]
            result.senses[name] = [_spearman(ratings, column) for column in cosines.t()]
            result.minimum[name] = _spearman(ratings, cosines.amin(1))
            result.embedding[name] = _spearman(ratings, _cosines(pairs, self.embedding))
            if self.twin is not None and result.twin is not None:
                result.twin[name] = _spearman(ratings, _cosines(pairs, self.twin))
        return result


def _mean(table: Tensor) -> Tensor:
    """Of all rows, by parts: a large table isn't copied."""
    return torch.stack([part.sum(0, dtype=torch.float64) for part in table.split(4096)]).sum(0).div(len(table)).float()


def _cosines(pairs: Iterable[Pair], vectors: dict[str, Tensor]) -> Tensor:
    one, two = zip(*((vectors[one], vectors[two]) for one, two, _ in pairs), strict=True)
    return torch.nn.functional.cosine_similarity(torch.stack(one), torch.stack(two), dim=-1)


def _spearman(ratings: list[float], cosines: Tensor) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(ratings, cosines.numpy()).statistic)
