"""Text ↔ token ids by a Hugging Face `tokenizer.json`, read as vLLM reads it, and words → ids.

No torch here: the gateway and the intervention service use it too.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path

from tokenizers import Tokenizer as HFTokenizer

END_OF_TEXT = "<|endoftext|>"


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
        # Files may ask for either, as training with them did: texts would be cut off, or go on, without a word.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        self.end_of_text: int | None = tokenizer.token_to_id(END_OF_TEXT)
        self._bytes = [_bytes_of(tokenizer, token) for token in range(self.vocab_size)]
        self.longest: int = max(map(len, self._bytes))
        """Bytes of the longest token."""

    @classmethod
    def read(cls, path: Path) -> Tokenizer:
        """Read a `tokenizer.json`. Raises ValueError naming the file if it isn't one."""
        try:
            # Read here: `from_file` keeps all other threads waiting, for ever on a disk that hangs.
            return cls(HFTokenizer.from_str(path.read_text("utf-8")))
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"{path} is not a tokenizer: {error}") from None

    def encode(self, text: str) -> list[int]:
        (ids,) = self.encode_batch([text])  # a single text's `encode` keeps all other threads waiting meanwhile
        return ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids; bytes that are not UTF-8 become U+FFFD."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 that a token stands for; it may begin or end within a character."""
        return self._bytes[token]

    def piece(self, token: int) -> str:
        """One token as text, its leading space kept."""
        return self._bytes[token].decode("utf-8", "replace")

    def word_ids(self, word: str, policy: WordPolicy = WordPolicy.SINGLE) -> tuple[int, ...]:
        """The ids that stand for a word, encoded with a leading space, as words stand in texts: " nurse".

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
                f"{word!r} is {len(ids)} tokens ({pieces}); choose another word, or, by the API or a word's "
                "`policy` in a patch file, ask for its first token or for all of them"
            )
        return (ids[0],)


def _bytes_of(tokenizer: HFTokenizer, token: int) -> bytes:
    """A byte-level vocabulary spells every byte as one printable character (Radford et al. 2019)."""
    spelling: str | None = tokenizer.id_to_token(token)
    if spelling is None:
        return b""
    try:
        return bytes(map(_BYTE_OF.__getitem__, spelling))
    except KeyError:  # an added token stands for its own text
        return spelling.encode()


def _byte_of() -> dict[str, int]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_of()


class Detokenizer:
    """Text of a growing sequence, token by token, never a broken character.

    A character whose bytes are still to come is held back; bytes that can't be one become U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, tokens: Iterable[int]) -> str:
        """The text that these tokens make final."""
        return self._decoder.decode(b"".join(map(self._tokenizer.token_bytes, tokens)))

    def flush(self) -> str:
        """What was held back, when no more tokens will come."""
        return self._decoder.decode(b"", final=True)
