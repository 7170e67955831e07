"""Texts of others, for people: what would command a terminal, reorder a line or hide is shown as an escape."""

from __future__ import annotations

import unicodedata

_SIGNS = frozenset("\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd")
"""Format characters by their category that have a shape of their own: Arabic's and others' signs of numbers."""

_JOINERS = "\u200c\u200d"
_LATIN = 0x24F
"""The last letter of scripts that join nothing."""


def visible(text: str) -> str:
    """The text with every control and format character and every separator but the line feed as `\\u202e`.

    So is what is invisible for another reason: unassigned tags, halves of surrogate pairs. Line feeds and tabs
    stay, and so do spaces of any width. Joiners stay where they join: Persian, Indic scripts and emoji are spelled
    with them, and they neither command nor reorder anything; after Latin letters, where they only hide, they are
    shown. At the beginning they stay, as a text may come in parts. Applied again, it changes nothing.
    """
    return text if text.isprintable() else "".join(pieces(text))


def pieces(text: str) -> list[str]:
    """What each character is shown as."""
    return [char if _harmless(char, text[at - 1 : at]) else _escaped(char) for at, char in enumerate(text)]


def _escaped(char: str) -> str:
    """As JSON and Python write it."""
    return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}"


def _harmless(char: str, before: str) -> bool:
    if char.isprintable() or char in "\n\t" or char in _SIGNS:
        return True
    if char in _JOINERS:
        return not before or (ord(before) > _LATIN and before not in _JOINERS and not before.isspace())
    number = ord(char)
    if unicodedata.category(char) == "Cn":  # perhaps a letter of a newer Unicode than Python's
        return not (number == 0x2065 or 0xFFF0 <= number <= 0xFFF8 or 0xE0000 <= number <= 0xE0FFF)
    return unicodedata.category(char) in ("Zs", "Co")
