"""What an experiment is: arguments in a dataclass, `run` on a model, and a result that can be read and kept."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

from backpack_lm.lab.lab_model import LabModel
from backpack_lm.lab.progress import Watch
from backpack_lm.reports.report import Report


@dataclass(frozen=True, slots=True)
class Headline:
    """A result in a line: this model's figures, the paper's of its Small, the aim, and whether it is reached;
    None if it can't be told, because there is no twin."""

    figures: str
    paper: str
    aim: str
    reached: bool | None


class Result(Protocol):
    """A frozen dataclass of figures."""

    def headline(self) -> Headline: ...

    def report(self) -> Report: ...


class Experiment(Protocol):
    """A frozen dataclass whose fields are everything that decides what `run` measures, the seed included."""

    NAME: ClassVar[str]

    def run(self, subject: LabModel, watch: Watch) -> Result: ...


@dataclass(frozen=True, slots=True)
class WrittenFiles:
    """The files of a finished experiment."""

    report: Report
    json: Path
    markdown: Path
    html: Path


def write(experiment: Experiment, subject: LabModel, result: Result, folder: Path, command: str) -> WrittenFiles:
    """Keep a result as JSON, Markdown and a page of HTML in `folder`, each named after the experiment."""
    folder.mkdir(parents=True, exist_ok=True)
    report = replace(result.report(), made_by=command)
    files = [folder / f"{experiment.NAME}.{kind}" for kind in ("json", "md", "html")]
    values = {
        "experiment": experiment.NAME,
        "command": command,
        "model": subject.manifest.fingerprint,
        "arguments": _plain(experiment),
        "headline": asdict(result.headline()),
        "result": _plain(result),
    }
    files[0].write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")
    files[1].write_text(report.markdown(), "utf-8")
    files[2].write_text(report.html(), "utf-8")
    return WrittenFiles(report, *files)


def _plain(value: object) -> Any:
    assert is_dataclass(value)
    assert not isinstance(value, type)
    return json.loads(json.dumps(asdict(value), default=str))
