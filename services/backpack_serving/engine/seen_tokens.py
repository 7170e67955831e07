"""Which tokens a text has, and how often each was made: what penalties are computed from at every step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class SeenTokens:
    """The distinct tokens of one growing text. Its prompt is sorted once and each further token looked up once, so a
    step costs the same however long the text is."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self._tokens = np.unique(np.asarray(prompt, np.int64))
        self._counts = np.zeros(len(self._tokens), np.int64)
        self._places = {token: place for place, token in enumerate(self._tokens.tolist())}
        self._read = len(prompt)

    def of(self, text: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The distinct tokens [n] of the prompt and what follows it, and how often each stands behind the prompt [n].

        `text` begins with that of the last call. Both arrays are views that the next call may change.
        """
        for token in text[self._read :]:
            place = self._places.setdefault(token, len(self._places))
            if place == len(self._tokens):
                self._tokens, self._counts = (np.pad(each, (0, place + 64)) for each in (self._tokens, self._counts))
            self._tokens[place] = token
            self._counts[place] += 1
        self._read = len(text)
        return self._tokens[: len(self._places)], self._counts[: len(self._places)]
