"""Questions about words: a map of one sense of many, and where a word is used."""

from __future__ import annotations

from dataclasses import dataclass

from backpack_lm.config import BackpackConfig
from backpack_lm.tokenizer import Tokenizer
from backpack_proto.v1 import inference_pb2 as pb

from backpack_serving.errors import InvalidRequest
from backpack_serving.wire.edits import WordReader
from backpack_serving.wire.inference import read_limit
from backpack_serving.wire.search import read_words, shares

FEWEST_MAPPED, MOST_MAPPED = 3, 256
USES, MOST_USES = 8, 32

USE_TOKENS = 49
"""Most tokens that are read for one use of a word."""


@dataclass(frozen=True, slots=True)
class MapQuery:
    """One sense of words, as tokens; the words that x lies towards, if any, and those that they are set against."""

    sense: int
    words: tuple[int, ...]
    toward: tuple[int, ...]
    against: tuple[int, ...]
    limit: int


def read_map(request: pb.MapSenseRequest, tokenizer: Tokenizer, config: BackpackConfig) -> MapQuery:
    """Read which sense is mapped, and of which words. Raises InvalidRequest with all violations."""
    reader = WordReader(tokenizer, config.num_senses)
    if not 0 <= request.sense < config.num_senses:
        reader.refuse("sense", "OUT_OF_RANGE", f"{request.sense}; this model's are 0 to {config.num_senses - 1}")
    if len(request.words) < FEWEST_MAPPED:
        reader.refuse("words", "TOO_FEW", f"{len(request.words)}; a map needs {FEWEST_MAPPED} or more")
    words = read_words(reader, "words", request.words, MOST_MAPPED)
    toward, against = (read_words(reader, name, getattr(request, name)) for name in ("toward", "against"))
    if not reader.violations:
        if (twice := next((at for at, word in enumerate(words) if word in words[:at]), None)) is not None:
            text = f"token {words[twice]} is named twice; name each word once"
            reader.refuse(f"words[{twice}]", "DUPLICATE", text)
        if against and not toward:
            reader.refuse("against", "NOT_ALONE", "it is what `toward` is set against, and there is none; name words")
        if toward and shares(toward) == shares(against):
            reader.refuse(
                "against",
                "ZERO_EFFECT",
                "the same words as `toward`, in the same shares: every x would be 0; give others",
            )
    if reader.violations:
        raise InvalidRequest.of(*reader.violations)
    limit = min(read_limit(request.limit, default=8, largest=100), config.tokens)
    return MapQuery(request.sense, words, toward, against, limit)


def read_use_count(request: pb.ListUsesRequest) -> int:
    """How many uses of a word to list. Raises InvalidRequest."""
    return read_limit(request.limit, USES, MOST_USES)
