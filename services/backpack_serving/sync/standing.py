"""A reader's status as text, for NOTIFY between processes of the intervention service."""

from __future__ import annotations

import base64
from dataclasses import replace

from backpack_proto.v1 import sync_pb2

from backpack_serving.references import Position
from backpack_serving.sync.messages import Hello, ReaderReport
from backpack_serving.sync.wire import read_from_reader, write_from_reader


def write_standing(hello: Hello, report: ReaderReport, most: int) -> str:
    """Encode a reader's status in at most `most` characters. If it is too long, tallies are dropped first, then the
    position and refusals, as if the reader held nothing. Raises ValueError if its names alone are too long.
    """
    parts = (write_from_reader(message).SerializeToString() for message in (hello, report))
    text = " ".join(base64.b64encode(part).decode() for part in parts)
    if len(text) <= most:
        return text
    if report.tallies:  # canaries are judged where the reader is connected; waits need positions everywhere
        return write_standing(hello, replace(report, tallies=report.tallies[: len(report.tallies) // 2]), most)
    least = replace(hello, position=Position(), refusals=(), digests=frozenset())
    counts = ReaderReport(releases=report.releases)
    if (hello, report) == (least, counts):
        raise ValueError(f"the status of reader {hello.name[:40]!r} takes {len(text)} characters; at most {most}")
    return write_standing(least, counts, most)


def read_standing(text: str) -> tuple[Hello, ReaderReport]:
    """Decode a reader's status. Raises ValueError, DecodeError or InvalidRequest if this version can't."""
    hello, report = (
        read_from_reader(sync_pb2.SyncRequest.FromString(base64.b64decode(part))) for part in text.split(" ")
    )
    if not isinstance(hello, Hello) or not isinstance(report, ReaderReport):
        raise ValueError(f"{text[:40]!r}… isn't where a reader stands")
    return hello, report
