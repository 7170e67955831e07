"""Text ↔ token ids by a Hugging Face `tokenizer.json`, read as vLLM reads it, and words → ids.

No torch here: the gateway and the intervention service use it too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path

from tokenizers import Tokenizer as HFTokenizer

END_OF_TEXT = "<|endoftext|>"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class WordError(ValueError):
    """A word that can't stand for one token: the word, its pieces, and what to ask for instead."""


class WordPolicy(Enum):
    """What to do with a word of several tokens."""

    SINGLE = "single"
    FIRST = "first"
    ALL = "all"


class Tokenizer:
    """Byte-level BPE. Special tokens are only ever produced by id, never read out of a text."""

    def __init__(self, tokenizer: HFTokenizer) -> None:
        self._tokenizer = tokenizer
        # A client that writes "<|endoftext|>" gets those thirteen characters, not the token.
        self._tokenizer.encode_special_tokens = True
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        self.end_of_text: int | None = tokenizer.token_to_id(END_OF_TEXT)

    @classmethod
    def read(cls, path: Path) -> Tokenizer:
        """Read a `tokenizer.json`. Raises ValueError naming the file if it isn't one."""
        try:
            return cls(HFTokenizer.from_file(str(path)))
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"{path} is not a tokenizer: {error}") from None

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids; bytes that are not UTF-8 become U+FFFD."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def piece(self, token: int) -> str:
        """One token as text, its leading space kept."""
        return self.decode([token])

    def word_ids(self, word: str, policy: WordPolicy = WordPolicy.SINGLE) -> tuple[int, ...]:
        """The ids that stand for a word, encoded with a leading space: " nurse" (BACKPACK.md, section 2).

        A token of the vocabulary spelled out with its own leading space is taken as it is. Raises
        WordError if the word is empty, or has several tokens and `policy` is SINGLE.
        """
        if not word.strip():
            raise WordError(f"{word!r} is not a word")
        ids = self.encode(" " + word.strip())
        if policy is WordPolicy.ALL:
            return tuple(ids)
        if policy is WordPolicy.FIRST:
            return (ids[0],)
        if len(ids) > 1:
            pieces = " + ".join(repr(self.piece(i)) for i in ids)
            raise WordError(
                f"{word!r} is {len(ids)} tokens ({pieces}); ask for its first token or for all of them"
            )
        return (ids[0],)


class Detokenizer:
    """Text of a growing sequence, token by token, never a broken character.

    Keeps the tokens since the last clean boundary: a character whose bytes are still to come is held back.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending: list[int] = []

    def add(self, tokens: Iterable[int]) -> str:
        """The text that these tokens make final."""
        self._pending.extend(tokens)
        text = self._tokenizer.decode(self._pending)
        # At most three bytes of a character can be missing; longer is a byte that is never completed.
        if text.endswith(REPLACEMENT) and len(self._pending) < 4:
            return ""
        self._pending.clear()
        return text

    def flush(self) -> str:
        """What was held back, when no more tokens will come."""
        text = self._tokenizer.decode(self._pending)
        self._pending.clear()
        return text
