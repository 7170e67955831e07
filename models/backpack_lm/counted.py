"""A count and what it counts, for people."""

from __future__ import annotations


def counted(count: float, noun: str, several: str = "") -> str:
    """`1 release`, `2 releases`; `several` is the plural of a noun that has another one."""
    return f"{count:.15g} {noun if count == 1 else several or f'{noun}s'}"
