"""Every experiment on one model, one after the other, and the page of Markdown that sums them up."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from backpack_lm.experiments.bias import GenderBias
from backpack_lm.experiments.experiment import Experiment, Headline, write
from backpack_lm.experiments.facts import KnowledgeEditing
from backpack_lm.experiments.finetuning import SenseFinetuning
from backpack_lm.experiments.language import LanguageModelling
from backpack_lm.experiments.lexical import LexicalSimilarity
from backpack_lm.experiments.topics import TopicControl
from backpack_lm.lab.lab_model import LabModel
from backpack_lm.lab.progress import ResumeJournal, Watch
from backpack_lm.reports.report import Table

FILE = "experiments.md"


@dataclass(frozen=True, slots=True)
class Data:
    """What lies in a folder of text: corpora as JSON lines, lists of rated word pairs, WikiText."""

    corpora: tuple[Path, ...]
    lexical: Path | None
    texts: tuple[Path, ...]

    @classmethod
    def find(cls, folder: Path) -> Data:
        """Corpora in `folder` or its corpus/, lists in lexical/, wikitext2/test.txt. Raises ValueError if there
        is no corpus."""
        corpora = sorted(p for f in (folder, folder / "corpus") for p in f.glob("*.jsonl*") if p.is_file())
        if not corpora:
            raise ValueError(f"{folder} holds no text: *.jsonl or *.jsonl.xz, there or in {folder / 'corpus'}")
        lexical, wikitext = folder / "lexical", folder / "wikitext2" / "test.txt"
        return cls(tuple(corpora), lexical if lexical.is_dir() else None, (wikitext,) if wikitext.exists() else ())


def plan(data: Data, twin: Path | None, judge: Path | None, folder: Path) -> list[Experiment]:
    """The experiments in sizes that give their figures in a quarter of an hour on one core, for a model as small
    as the default one."""
    found: list[Experiment] = [LanguageModelling(data.corpora, data.texts, twin, 100_000)]
    if data.lexical is not None:
        found.append(LexicalSimilarity(data.lexical, twin))
    work = folder / "topics.partial.jsonl"
    return [
        *found,
        GenderBias(twin),
        KnowledgeEditing(data.corpora),
        TopicControl(24, 60, "", 0, judge, twin, work),
        SenseFinetuning(data.corpora[-1]),
    ]


def run_all(
    experiments: Sequence[Experiment], subject: LabModel, watch: Watch, folder: Path, command: str
) -> Iterator[tuple[str, float]]:
    """Run each, keep its files and the summary in `folder`; yields each one's name and seconds as it ends.

    A run that was stopped goes on with the experiment at which it was.
    """
    made_by = {"model": subject.manifest.fingerprint, "experiments": [repr(one) for one in experiments]}
    journal = ResumeJournal(folder / "all.partial.jsonl", made_by)
    headlines: dict[str, Headline] = {}
    for experiment in watch(experiments, "experiments", len(experiments)):
        started = time.perf_counter()

        def work(experiment: Experiment = experiment) -> dict[str, Any]:
            result = experiment.run(subject, watch)
            write(experiment, subject, result, folder, command)
            return asdict(result.headline())

        headlines[experiment.NAME] = Headline(**journal.once(experiment.NAME, work))
        yield experiment.NAME, time.perf_counter() - started
    (folder / FILE).write_text(summary(headlines, subject, folder, command), "utf-8")
    journal.finish()


def summary(headlines: dict[str, Headline], subject: LabModel, folder: Path, command: str) -> str:
    """The headline of each experiment in one table, then the reports as they lie in `folder`."""
    reached = {True: "yes", False: "no", None: "no twin to compare with"}
    rows = tuple((name, h.figures, h.paper, h.aim, reached[h.reached]) for name, h in headlines.items())
    columns = ("experiment", "this model", "the paper's Small", "aim", "reached")
    reports = [(folder / f"{name}.md").read_text("utf-8").replace("# ", "## ", 1) for name in headlines]
    intro = (
        f"Model {subject.manifest.fingerprint[:12]}, {datetime.now(UTC):%Y-%m-%d}, by `{command}`. The paper's "
        "models have seen 52 billion tokens; where a claim of the paper doesn't show on this one, the table says "
        "so. What is chosen on what it is evaluated on, a report's notes say."
    )
    return "\n\n".join(["# The paper's experiments", intro, Table("In short", columns, rows).markdown(), *reports])
