"""Searches for senses: what is looked for, and which page of it."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from backpack_lm.config import BackpackConfig
from backpack_lm.tokenizer import Tokenizer
from backpack_proto.v1 import inference_pb2 as pb

from backpack_serving.errors import Conflict, InvalidRequest
from backpack_serving.wire.edits import WordReader
from backpack_serving.wire.inference import read_prompt

MOST_WORDS, MOST_PROMPTS, MOST_PROMPT_TOKENS = 64, 16, 4096
PAGE, LARGEST_PAGE, MOST_FOUND = 20, 1000, 10_000


@dataclass(frozen=True, slots=True)
class SearchQuery:
    """A search: words and what they are set against, as tokens; the name of an `Effect`; prompts as tokens."""

    words: tuple[int, ...]
    against: tuple[int, ...]
    effect: str
    by_use: bool
    prompts: tuple[tuple[int, ...], ...] = ()
    against_all: bool = False

    @property
    def tokens(self) -> int:
        """Those of all prompts."""
        return sum(map(len, self.prompts))

    @property
    def digest(self) -> str:
        """What tells its pages from those of another search."""
        named = [self.words, self.against, self.against_all, self.effect, self.by_use, self.prompts]
        return hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class SearchPage:
    """`size` senses from place `start` on. `of` is the search and the release that the page before was of, by digest;
    None for a first page."""

    start: int
    size: int
    of: tuple[str, str] | None = None

    def check(self, query: SearchQuery, release: str) -> None:
        """Raises InvalidRequest if this page is of another search; Conflict if it is of another release."""
        if self.of is None:
            return
        if self.of[0] != query.digest:
            raise InvalidRequest.at("page_token", "BAD_PAGE_TOKEN", "is of another search; begin with its first page")
        if self.of[1] != release:
            message = "the page before was of another release; begin again, or name a release or a request key"
            raise Conflict("RELEASE_CHANGED", message)

    def following(self, found: int, query: SearchQuery, release: str) -> str:
        """The token of the next page, after so many senses on this one; "" after the last."""
        after = self.start + found
        if found < self.size or after >= MOST_FOUND:
            return ""
        return base64.urlsafe_b64encode(json.dumps([after, query.digest, release]).encode()).decode()


def read_search(request: pb.FindSensesRequest, tokenizer: Tokenizer, config: BackpackConfig) -> SearchQuery:
    """Read what is looked for. Raises InvalidRequest for a bad prompt, else with all other violations."""
    reader = WordReader(tokenizer, config.num_senses)
    if not request.words:
        reader.refuse("words", "EMPTY", "no word; give 1 to 64 words that senses are to raise or lower")
    words, against = read_words(reader, "words", request.words), read_words(reader, "against", request.against)
    if not reader.violations and shares(words) == shares(against):
        reader.refuse(
            "against",
            "ZERO_EFFECT",
            "the same words as `words`, in the same shares: every score would be 0; give others",
        )
    if against and request.against_all:
        reader.refuse("against_all", "BOTH_GIVEN", "`against` names words; leave it out for all words")
    if request.effect not in pb.SenseEffect.values():
        reader.refuse("effect", "UNKNOWN_VALUE", f"{request.effect} is no effect of senses")
    if request.order not in pb.SenseOrder.values():
        reader.refuse("order", "UNKNOWN_VALUE", f"{request.order} is no order of senses")
    by_use = request.order == pb.SENSE_ORDER_USE
    if by_use and request.prompts:
        text = "with prompts, senses are ordered by what they add there; leave it out, or the prompts"
        reader.refuse("order", "NOT_WITH_PROMPTS", text)
    if len(request.prompts) > MOST_PROMPTS:
        reader.refuse("prompts", "TOO_MANY", f"{len(request.prompts)}; at most {MOST_PROMPTS}")
    if reader.violations:
        raise InvalidRequest.of(*reader.violations)
    prompts = tuple(
        read_prompt(f"prompts[{at}]", prompt, tokenizer, config) for at, prompt in enumerate(request.prompts)
    )
    effect = pb.SenseEffect.Name(request.effect or pb.SENSE_EFFECT_RAISE).removeprefix("SENSE_EFFECT_")
    query = SearchQuery(words, against, effect, by_use, prompts, request.against_all)
    if query.tokens > MOST_PROMPT_TOKENS:
        text = f"{query.tokens} tokens in all prompts; together at most {MOST_PROMPT_TOKENS}"
        raise InvalidRequest.at("prompts", "TOO_LONG", text)
    return query


def read_words(reader: WordReader, field: str, words: Sequence[pb.Word], most: int = MOST_WORDS) -> tuple[int, ...]:
    """The tokens of words, one each; with violations recorded for those that have none, and for too many."""
    if len(words) > most:
        reader.refuse(field, "TOO_MANY", f"{len(words)}; at most {most}")
    return tuple(reader.token(f"{field}[{at}]", word) for at, word in enumerate(words[:most]))


def shares(words: Sequence[int]) -> dict[int, Fraction]:
    """The share of each word in a mean over words, of which some may be named twice."""
    return {word: Fraction(count, len(words)) for word, count in Counter(words).items()}


def read_search_page(request: pb.FindSensesRequest) -> SearchPage:
    """Read which page is asked for. Raises InvalidRequest."""
    size, token = request.page_size, request.page_token
    if size < 0:
        raise InvalidRequest.at("page_size", "OUT_OF_RANGE", f"{size}; 1 to {LARGEST_PAGE}, or 0 for {PAGE}")
    size = min(size or PAGE, LARGEST_PAGE)
    if not token:
        return SearchPage(0, size)
    try:
        start, query, release = json.loads(base64.urlsafe_b64decode(token))
    except (binascii.Error, ValueError, TypeError, RecursionError):
        start, query, release = 0, "", ""
    if not (type(start) is int and 0 < start < MOST_FOUND and isinstance(query, str) and isinstance(release, str)):
        raise InvalidRequest.at("page_token", "BAD_PAGE_TOKEN", f"{token!r} is not from a page of this list")
    return SearchPage(start, min(size, MOST_FOUND - start), (query, release))
