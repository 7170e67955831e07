"""Tokens → the text that a client sees: whole characters, cut before the first stop string."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from backpack_lm.tokenizer import Detokenizer, Tokenizer


class IncrementalDetokenizer:
    """Text of one generation as it grows. `stopped` is set once a stop string was found."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def add(self, tokens: Iterable[int]) -> str:
        """The text that these tokens make final. What may become a stop string is held back."""
        return self._emit(self._detokenizer.add(tokens))

    def flush(self) -> str:
        """What was held back, when no more tokens will come."""
        text = self._emit(self._detokenizer.flush())
        if self.stopped:
            return text
        rest, self._held = self._held, ""
        return text + rest

    def _emit(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        keep = max((self._overlap(stop) for stop in self._stop), default=0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins `stop`."""
        for size in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:size]):
                return size
        return 0
