"""Texts that nobody chose: a model goes on from the beginnings of held-out records, and another one reads them.

Drawn as a server draws by default, so this is the writing that a user gets. What is counted has two sides, because
each alone can be had cheaply: how likely the reader finds the text (repetition is likely), and how many of its pairs
of words are different (noise is).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from backpack_lm.counted import counted
from backpack_lm.experiments.experiment import Headline, Result
from backpack_lm.experiments.topics import distinct_pairs
from backpack_lm.generation import FALLBACK, SamplingDefaults
from backpack_lm.gguf_file import tokenizer_of
from backpack_lm.kernels.caches import DrawParams
from backpack_lm.kernels.plain import draw_plainly
from backpack_lm.lab.batch_sampler import BatchSampler
from backpack_lm.lab.lab_model import LabModel, SteeredModel
from backpack_lm.lab.progress import Watch
from backpack_lm.lab.text import held_out
from backpack_lm.lab.twin import read_twin
from backpack_lm.manifest import TOKENIZER
from backpack_lm.reports.report import Report, Table
from backpack_lm.tokenizer import Tokenizer
from backpack_lm.training.evaluation import LanguageModel

PARAGRAPH = 40
"""Words of a paragraph that a prompt may come from: headings and lists are shorter."""
DISTINCT = 0.95
"""The share of pairs of neighbouring words that should be different."""


@dataclass(frozen=True, slots=True)
class WrittenText:
    """What a model wrote after a prompt; the reader's nats for it, over how many of the reader's tokens."""

    prompt: str
    text: str
    nats: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.tokens)

    @property
    def distinct(self) -> float:
        return distinct_pairs(self.text)


@dataclass(frozen=True, slots=True)
class TextsResult:
    """All texts in the order of their records; how they were drawn, and who read them."""

    texts: list[WrittenText]
    length: int
    words: int
    seed: int
    sampling: SamplingDefaults
    reader: str

    @property
    def perplexity(self) -> float:
        """To the reader, a token, over all texts."""
        return math.exp(sum(t.nats for t in self.texts) / sum(t.tokens for t in self.texts))

    @property
    def distinct(self) -> float:
        """Mean share of a text's pairs of neighbouring words that differ from each other."""
        return fmean(t.distinct for t in self.texts)

    def headline(self) -> Headline:
        return Headline(
            f"{counted(len(self.texts), 'text')} of {counted(self.length, 'token')}: perplexity {self.perplexity:.1f} "
            f"to {self.reader}, {self.distinct:.1%} of word pairs distinct",
            "–",
            f"at least {DISTINCT:.0%} of word pairs distinct",
            self.distinct >= DISTINCT,
        )

    def report(self) -> Report:
        rows = tuple(
            (t.prompt, " ".join(t.text.split()), f"{t.perplexity:.1f}", f"{t.distinct:.0%}") for t in self.texts
        )
        s, fewest = self.sampling, min(t.distinct for t in self.texts)
        return Report(
            "Texts that nobody chose",
            f"To {self.reader}, what the model wrote has a perplexity of {self.perplexity:.1f} a token; "
            f"{self.distinct:.1%} of its pairs of neighbouring words are different, {fewest:.0%} in the text where "
            "fewest are.",
            (Table("Every text", ("prompt", "goes on", "perplexity", "distinct pairs"), rows),),
            notes=(
                f"Prompts are the first {counted(self.words, 'word')} of the first paragraph of at least {PARAGRAPH} "
                "words in each of the first held-out records, in the order of the files. All texts are shown.",
                f"{self.length} tokens each, drawn with seeds from {self.seed} on at temperature {s.temperature:g}, "
                f"top_k {s.top_k}, top_p {s.top_p:g}, min_p {s.min_p:g} and repetition penalty "
                f"{s.repetition_penalty:g}, the model's defaults; the end of the text is never drawn.",
                "Perplexity is per token of the reader's own vocabulary, after an end-of-text token and the prompt. "
                "Lower is likelier, and repetition lowers it, so read it beside the distinct pairs.",
            ),
        )


@dataclass(frozen=True, slots=True)
class UnchosenTexts:
    """`texts` continuations of `length` tokens: of the first held-out records of the files `corpus`, in their order,
    the first `words` words of the first paragraph of at least PARAGRAPH.

    Text n is drawn with `seed` + n: with one seed for all, those whose prompts are equally long would get the same
    noise. `sampling` is how tokens are drawn, `ends` those that never are. `reader` is a Transformer (a GGUF file, a
    Hugging Face folder or a run) that gives the texts their perplexity; without one, the model itself does.
    """

    corpus: tuple[Path, ...]
    reader: Path | None = None
    texts: int = 20
    length: int = 100
    words: int = 8
    seed: int = 0
    sampling: SamplingDefaults = FALLBACK
    ends: tuple[int, ...] = ()
    NAME: ClassVar[str] = "texts"

    def run(self, subject: LabModel, watch: Watch) -> Result:
        if not self.corpus:
            raise ValueError("no text to take beginnings from; give a JSON-lines file with --corpus")
        prompts = self._record_openings()
        model, tokenizer, name = self._text_reader(subject)
        texts = []
        for number, prompt in enumerate(watch(prompts, "texts", len(prompts))):
            ids = self._continue_prompt(subject, subject.ids(prompt), self.seed + number)
            text = subject.tokenizer.decode(ids)
            texts.append(WrittenText(prompt, text, *_read_text(model, tokenizer, prompt, text)))
        return TextsResult(texts, self.length, self.words, self.seed, self.sampling, name)

    def _record_openings(self) -> list[str]:
        """Raises ValueError if the files have fewer held-out records than were asked for."""
        openings = (opening(record, self.words) for path in self.corpus for record in held_out(path))
        found = list(islice(filter(None, openings), self.texts))
        if len(found) < self.texts:
            raise ValueError(
                f"{', '.join(map(str, self.corpus))}: only {counted(len(found), 'held-out record')} with a paragraph "
                f"of {PARAGRAPH} words, {self.texts} were asked for; give more files, or fewer --texts"
            )
        return found

    def _text_reader(self, subject: LabModel) -> tuple[LanguageModel, Tokenizer, str]:
        if self.reader is None:
            return SteeredModel(subject, subject.overlay()), subject.tokenizer, "the model itself"
        twin = read_twin(self.reader, subject.config)
        if self.reader.is_file():
            return twin, Tokenizer(tokenizer_of(self.reader)), self.reader.name
        own = (self.reader / TOKENIZER).exists()
        tokenizer = Tokenizer.read(self.reader / TOKENIZER) if own else subject.tokenizer
        return twin, tokenizer, self.reader.name

    @torch.inference_mode()
    def _continue_prompt(self, subject: LabModel, prompt: Sequence[int], seed: int) -> list[int]:
        """The text's ids."""
        sampler = BatchSampler(subject, subject.overlay(), 1, len(prompt) + self.length)
        ids = list(prompt)
        for token in prompt:
            logits = sampler.feed(torch.tensor([token]))
        while len(ids) < len(prompt) + self.length:
            ids.append(draw(logits[0], ids, self.sampling, seed, self.ends))
            if len(ids) < len(prompt) + self.length:
                logits = sampler.feed(torch.tensor(ids[-1:]))
        return ids[len(prompt) :]


def opening(text: str, words: int) -> str:
    """The first words of the first paragraph of at least PARAGRAPH words; nothing if there is none."""
    for paragraph in text.split("\n\n"):
        found = paragraph.split()
        if len(found) >= max(PARAGRAPH, words):
            return " ".join(found[:words])
    return ""


def draw(logits: Tensor, ids: Sequence[int], sampling: SamplingDefaults, seed: int, ends: Collection[int] = ()) -> int:
    """The token after `ids`, from logits [V]: the one that a server draws for a request with this seed, by its noise,
    but for `ends`."""
    out, seen = logits.clone(), np.unique(np.array(ids))
    out[list(ends)] = -math.inf
    now = out[seen]
    out[seen] = torch.where(now > 0, now / sampling.repetition_penalty, now * sampling.repetition_penalty)
    if sampling.min_p and sampling.temperature:
        out[out < out.max() + sampling.temperature * math.log(sampling.min_p)] = -math.inf
    params = DrawParams(sampling.temperature, seed, len(ids), sampling.top_k, sampling.top_p)
    return int(draw_plainly(out[None], [params]))


@torch.inference_mode()
def _read_text(model: LanguageModel, tokenizer: Tokenizer, prompt: str, text: str) -> tuple[float, int]:
    """Nats that the reader needs for a text after a prompt, and over how many tokens."""
    first = () if tokenizer.end_of_text is None else (tokenizer.end_of_text,)
    before, after = [*first, *tokenizer.encode(prompt)], tokenizer.encode(text)
    ids = torch.tensor([*before, *after])
    if len(ids) - 1 > model.config.n_positions:
        raise ValueError(f"the reader reads {model.config.n_positions} tokens; make the texts shorter")
    logs = (model.mix(ids[None, :-1])[0, len(before) - 1 :] @ model.embedding.t()).double().log_softmax(-1)
    return -float(logs.gather(1, ids[len(before) :, None]).sum()), len(after)
