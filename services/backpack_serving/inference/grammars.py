"""Grammars that texts are held to: llguidance's, over the tokens of one model."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Collection

import numpy as np
from backpack_lm.tokenizer import Tokenizer
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from backpack_serving import tasks
from backpack_serving.errors import InvalidRequest
from backpack_serving.inference.fair_lock import FairLock
from backpack_serving.inference.grammar_check import LIMITS, GrammarError, check, shorten
from backpack_serving.sampling import TextStructure

KEPT = 64
"""Compiled grammars, and refusals, that are kept for who asks again."""


class GrammarCompiler:
    """Compiles what requests want their texts to be, one at a time, off the event loop; tenants take turns."""

    def __init__(self, tokenizer: Tokenizer, tokens: int, ends: Collection[int]) -> None:
        """`tokens` are so many as the model has logits, `ends` those that end a text."""
        self._vocabulary = _Vocabulary(tokenizer, tokens, ends)
        self._lock = FairLock()
        self._kept: OrderedDict[TextStructure, CompiledGrammar | InvalidRequest] = OrderedDict()

    async def compiled(self, tenant: str, structure: TextStructure) -> CompiledGrammar:
        """Raises InvalidRequest for what can't be compiled, or allows no text."""
        if structure not in self._kept:
            async with self._lock.acquire(tenant):
                if structure not in self._kept:
                    # To its end, also if the caller leaves: several would take the engine's cores.
                    self._kept[structure] = await tasks.finish(asyncio.to_thread(self._compile, structure))
        self._kept.move_to_end(structure)
        found = self._kept[structure]
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        if isinstance(found, InvalidRequest):
            raise InvalidRequest.of(*found.violations)
        return found

    def _compile(self, structure: TextStructure) -> CompiledGrammar | InvalidRequest:
        """Blocks."""
        try:
            return self._vocabulary.compile(check(structure.form, structure.text))
        except GrammarError as error:
            return InvalidRequest.at(f"sampling.{structure.form}", "BAD_GRAMMAR", str(error))


class CompiledGrammar:
    """A grammar before its first token."""

    def __init__(self, matcher: LLMatcher, vocabulary: _Vocabulary) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary

    def start(self) -> MatcherState:
        return MatcherState(self._matcher.deep_copy(), self._vocabulary)


class MatcherState:
    """A copy of a grammar's matcher, which goes on with one text."""

    def __init__(self, matcher: LLMatcher, vocabulary: _Vocabulary) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary
        self.complete, self.failure = False, ""

    def allowed(self) -> np.ndarray:
        """Which tokens may come next [V] bool."""
        mask = self._vocabulary.unpack(self._matcher.compute_bitmask())
        if self._failed():  # the library then allows the ends of texts
            mask[:] = False
        elif not self._matcher.is_accepting():  # a grammar may name such a token within its texts
            mask[self._vocabulary.ends] = False
        return mask

    def add(self, token: int) -> None:
        self._matcher.consume_token(token)
        self.complete = not self._failed() and self._matcher.is_stopped()

    def _failed(self) -> bool:
        if self._matcher.is_error():
            self.failure = shorten(self._matcher.get_error())
        return bool(self.failure)


class _Vocabulary:
    """The tokens of a model, for llguidance. It reads them for a fifth of a second, in which no other thread runs
    Python: at the start, not when a grammar first comes."""

    def __init__(self, tokenizer: Tokenizer, tokens: int, ends: Collection[int]) -> None:
        self._tokenizer, self._count = tokenizer, tokens
        self.ends = sorted(ends)
        # A model whose texts nothing ends has a token more here, which it never makes.
        self._read = LLTokenizer(TokenizerWrapper(self), eos_token=self.ends or [self._count])

    def compile(self, grammar: str) -> CompiledGrammar:
        """Raises GrammarError."""
        matcher = LLMatcher(self._read, grammar, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise GrammarError(shorten(matcher.get_error()))
        first = MatcherState(matcher, self)  # what it computes for this mask, copies find done
        if not first.allowed().any():
            raise GrammarError(f"it allows no text{first.failure and f' ({first.failure})'}")
        return CompiledGrammar(matcher, self)

    def unpack(self, bits: bytes) -> np.ndarray:
        """[V] bool."""
        packed = np.frombuffer(bits, np.uint8)
        return np.unpackbits(packed, count=self._count, bitorder="little").view(np.bool_)

    # ---- what TokenizerWrapper reads

    @property
    def tokens(self) -> list[bytes]:
        known = min(self._count, self._tokenizer.vocab_size)
        spelled = [self._tokenizer.token_bytes(token) for token in range(known)]
        return spelled + [b""] * (self._count - known + (not self.ends))

    @property
    def special_token_ids(self) -> list[int]:
        return sorted({*self._tokenizer.special_ids, *self.ends, *([] if self.ends else [self._count])})

    @property
    def eos_token_id(self) -> int:
        return self.ends[0] if self.ends else self._count

    bos_token_id = None

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8"))
