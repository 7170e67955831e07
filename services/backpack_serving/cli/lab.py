"""`backpack lab …`: from data to a patch file, with a report of what it does; nothing here touches a server."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from backpack_lm.counted import counted
from rich.text import Text

from backpack_serving.cli import hints
from backpack_serving.cli.client import Page, can_be_made, err, exits, out, show_markdown
from backpack_serving.cli.control import Senses
from backpack_serving.cli.edit_text import sense_numbers
from backpack_serving.cli.experiment import Model, ProgressWatch, Threads, command, read_subject
from backpack_serving.cli.patch_file import PatchFile
from backpack_serving.settings import model_folder

if TYPE_CHECKING:
    from backpack_lm.lab.examples import CanonicalExample
    from backpack_lm.lab.lab_model import LabModel
    from backpack_lm.patch import Edit
    from backpack_lm.reports.report import Report

app = typer.Typer(
    no_args_is_help=True,
    help="""Make patches from data, and judge them before releasing them.

    Commands that make a patch write it to --out, with a report beside it (.html); `backpack patch revise NAME
    FILE` uploads it. What takes long goes on where it was stopped when the same command is given again.
    """,
)


def _beside_its_report(file: Path) -> Path:
    """The report has the patch's name, and would overwrite it."""
    if file.suffix == ".html":
        raise typer.BadParameter(f"{file} is where the report goes; name the patch {file.with_suffix('.json')}")
    can_be_made(file.parent)
    return file


Out = Annotated[
    Path,
    typer.Option("--out", help="Patch file to write.", callback=_beside_its_report, dir_okay=False),
]
Contrast = Annotated[
    tuple[str, str], typer.Option(metavar="WORD WORD", help="The two words between which to remove the bias.")
]
Templates = Annotated[
    list[str] | None,
    typer.Option("--prompt", help="A prompt with {} for the word; repeatable. The paper's five if none."),
]
MostMoved = Annotated[
    float,
    typer.Option(
        help="Most of the probability that may move among other words, after any prompt that is fitted on and on "
        "the average after neutral ones; 1 bounds nothing.",
        min=0,
        max=1,
    ),
]
MOST_MOVED = 0.25  # backpack_lm.lab.elsewhere's, of which help is shown without loading torch
DESCRIPTION = 4000  # characters of a report that go into a patch's description


@app.command("find-sense")
def find_sense(
    words: Annotated[
        list[str] | None, typer.Argument(help="Words whose senses to rank (default: 40 role nouns).")
    ] = None,
    contrast: Contrast = ("he", "she"),
    prompts: Templates = None,
    model: Model = None,
    threads: Threads = 0,
) -> None:
    """Rank the senses of WORDS by how much each one separates the two contrast words."""
    with exits():
        from backpack_lm.lab import contrast as finder
        from backpack_lm.lab.professions import ESTIMATION, NOUNS

        subject = read_subject(model, threads)
        with ProgressWatch() as watch:
            found = finder.find_sense(subject, words or NOUNS, *contrast, prompts or ESTIMATION, watch)
        _print_report(found.report())


@app.command("debias")
def debias(
    words: Annotated[list[str] | None, typer.Argument(help="Words to debias (default: 40 role nouns).")] = None,
    contrast: Contrast = ("he", "she"),
    by: Annotated[
        Literal["vector", "scale"],
        typer.Option(
            help="vector: add one vector, fitted for each word, to all its senses. scale: the paper's, one sense of "
            "each word times a number; on some models that removes little."
        ),
    ] = "vector",
    sense: Annotated[
        int | None, typer.Option(help="By scale: sense to scale (default: the one that separates most).", min=0)
    ] = None,
    prompts: Templates = None,
    shown: Annotated[
        list[str] | None,
        typer.Option(
            "--show",
            help="A prompt with {} to report on; nothing is fitted on it. Repeatable. The paper's 13 if none.",
        ),
    ] = None,
    penalty: Annotated[
        float | None,
        typer.Option(
            help="By scale: what a scale's distance from 1 costs beside the bias. 0, the default, lowers the ratio as "
            "far as a scale can; with the paper's 1 a scale stays 1 unless the ratio falls by more than it moves.",
            min=0,
        ),
    ] = None,
    most_moved: MostMoved = MOST_MOVED,
    file: Out = Path("debias.json"),
    model: Model = None,
    threads: Threads = 0,
) -> None:
    """Reduce a bias: edit each word so that two others become equally likely after it (paper, section 6)."""
    with exits():
        from backpack_lm.lab import balance as vectors
        from backpack_lm.lab import debias as scales
        from backpack_lm.lab.professions import ESTIMATION, EVALUATION, NOUNS
        from backpack_lm.lab.progress import ResumeJournal

        for option, value in (("--sense", sense), ("--penalty", penalty)):
            if by == "vector" and value is not None:
                raise ValueError(f"{option} {value:g} is of a scale, and a vector is fitted; add --by scale")
        subject = read_subject(model, threads)
        fitted, told = prompts or list(ESTIMATION), shown or list(EVALUATION)
        if both := set(fitted) & set(told):
            raise ValueError(f"{min(both)!r} is in --prompt and --show; what is fitted on shows nothing")
        made_by = {
            "model": subject.manifest.fingerprint,
            "words": words,
            "contrast": contrast,
            "by": by,
            "sense": sense,
            "prompts": fitted,
            "shown": told,
            "penalty": penalty,
            "most_moved": most_moved,
        }
        journal = ResumeJournal(file.with_suffix(".partial.jsonl"), made_by)
        found: scales.Debiased | vectors.Balanced
        with ProgressWatch(goes_on=True) as watch:
            begin = (subject, words or NOUNS, watch, journal, *contrast)
            if by == "vector":
                found = vectors.balance(*begin, fitted, told, most_moved)
            else:
                found = scales.debias(*begin, sense, fitted, told, penalty or 0.0, most_moved=most_moved)
        _write_patch_file(subject, found.edits(subject), found.report(), file)
        journal.finish()


@app.command("topic")
def topic(
    words: Annotated[list[str], typer.Argument(help="Words of the topic.")],
    strength: Annotated[
        int,
        typer.Option(help="1, 2 or 3. 2 leads most texts, 1 is enough for a tone, 3 spoils texts.", min=1, max=3),
    ] = 2,
    by: Annotated[
        Literal["lean", "multipliers"],
        typer.Option(
            help="lean: frequent words say some of the topic, the topic's own words less, so that it leads any "
            "text and fades where it appears. multipliers: the paper's, as in `backpack patch topic`; they raise "
            "what a text's own words say of the topic, which those of a small model seldom do."
        ),
    ] = "lean",
    prompts: Annotated[
        list[str] | None, typer.Option("--prompt", help="Prompt to show the topic's effect after; repeatable.")
    ] = None,
    file: Out = Path("topic.json"),
    model: Model = None,
    threads: Threads = 0,
) -> None:
    """Steer text towards a topic; shows the words or senses involved, and the effect of each strength."""
    with exits():
        from backpack_lm.lab.topic import By, choose_topic

        subject = read_subject(model, threads)
        with err.status("trying the strengths"):
            found = choose_topic(subject, words, strength, prompts or (), By(by))
        _write_patch_file(subject, found.edits(), found.report(), file)


@app.command("swap-fact")
def swap_fact(
    word: Annotated[str, typer.Argument(help="Word whose senses to edit.")],
    old: Annotated[str, typer.Option(help="Word that they promote now.")],
    new: Annotated[str, typer.Option(help="Word that they must promote instead.")],
    prompts: Annotated[list[str], typer.Option("--prompt", help="Prompt that holds the word; repeatable.")],
    senses: Senses = "",
    strength: Annotated[
        float, typer.Option(help="1 is the paper's swap, more moves the two words further apart.", min=1)
    ] = 1.0,
    fit: Annotated[
        bool,
        typer.Option(
            "--fit",
            help="Least strength of 1, 2, 4, … 32 that gives the new word 80% of the two, within --most-moved.",
        ),
    ] = False,
    most_moved: MostMoved = MOST_MOVED,
    file: Out = Path("swap.json"),
    model: Model = None,
    threads: Threads = 0,
) -> None:
    """Edit a fact: make a word promote one word instead of another (paper, section 6); shows side effects."""
    with exits():
        from backpack_lm.lab import swap as lab

        subject, chosen = read_subject(model, threads), sense_numbers(senses)
        if fit:
            found = lab.fit_swap(subject, word, old, new, prompts, chosen, most_moved)
        else:
            found = lab.swap_fact(subject, word, old, new, prompts, chosen, strength, most_moved=most_moved)
        edits = [] if fit and not found.bounded else found.edits(subject)
        _write_patch_file(subject, edits, found.report(), file)


@app.command("finetune")
def finetune(
    examples: Annotated[
        Path, typer.Argument(help='JSON lines such as {"prompt": "The sea is", "target": "deep"}.', exists=True)
    ],
    text: Annotated[
        Path | None,
        typer.Option(
            help="JSON-lines or plain text (.xz or not): a part to stay close on, and the held-out one to be "
            "judged on. The model folder's held_out.txt.xz if none.",
            exists=True,
        ),
    ] = None,
    budget: Annotated[float, typer.Option(help="Most that held-out loss may rise, as a share of it.", min=0)] = 1e-3,
    cells: Annotated[int, typer.Option(help="Cells for each example.", min=1)] = 8,
    steps: Annotated[int, typer.Option(help="Steps of the optimiser.", min=1)] = 300,
    tokens: Annotated[int, typer.Option(help="Most tokens of each part of the text.", min=256)] = 20_000,
    seed: Annotated[int, typer.Option(help="Seed of the text's order.", min=0)] = 0,
    file: Out = Path("finetune.json"),
    model: Model = None,
    threads: Threads = 0,
) -> None:
    """Finetune a few sense vectors on canonical examples, within a loss budget (arXiv 2402.06155)."""
    with exits():
        from backpack_lm.lab.examples import CanonicalExample
        from backpack_lm.lab.finetune import Finetuner, Finetuning
        from backpack_lm.lab.text import both_parts
        from backpack_lm.ordinary_text import shipped

        text = text or shipped(model_folder(model))
        subject, taught = read_subject(model, threads), CanonicalExample.read(examples)
        with err.status("reading the text, choosing cells"):
            near, judged = both_parts(subject, text, tokens)
            plan = Finetuning(cells, budget=budget, steps=steps, seed=seed)
            state = file.with_suffix(".partial.pt")
            run = Finetuner(subject, taught, near, judged, plan, state)
        with ProgressWatch(goes_on=True) as watch:
            found = run.run(watch)[budget]
        _write_patch_file(subject, found.edits(), found.report(subject, taught), file)
        state.unlink(missing_ok=True)


@app.command("judge")
def judge(
    patch: Annotated[Path, typer.Argument(help="Patch file: of the lab, or what `patch show` prints.", exists=True)],
    prompts: Annotated[list[str] | None, typer.Option("--prompt", help="Prompt to try; repeatable.")] = None,
    examples: Annotated[
        Path | None, typer.Option(help="JSON lines of prompts with targets, as `lab finetune` reads them.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="JSON-lines or plain text whose held-out part is measured.", exists=True)
    ] = None,
    tokens: Annotated[int, typer.Option(help="Most tokens of that text.", min=1)] = 20_000,
    page: Page = None,
    model: Model = None,
    threads: Threads = 0,
) -> None:
    """Measure a patch: held-out loss, prompts, and the neighbours of the words it edits."""
    with exits():
        from backpack_lm.lab.examples import CanonicalExample
        from backpack_lm.lab.judge import judge as lab
        from backpack_lm.lab.text import held_out, stream

        subject = read_subject(model, threads)
        edits = PatchFile.read(patch).edits_for(subject)
        asked: list[CanonicalExample] = [CanonicalExample(prompt, "") for prompt in prompts or ()]
        asked += CanonicalExample.read(examples) if examples else []
        with err.status("judging"):
            least = subject.config.n_positions + 1
            ids = stream(subject, held_out(text), max(tokens, least), least) if text else None
            report = replace(lab(subject, edits, asked, ids).report(), made_by=command())
        _print_report(report)
        if page is not None:
            page.parent.mkdir(parents=True, exist_ok=True)
            page.write_text(report.html(), "utf-8")


def _print_report(report: Report) -> None:
    """Print it, and what wasn't reached once more on stderr, where a pipe doesn't hide it."""
    show_markdown(report.markdown())
    if report.warning:
        err.print(Text(report.warning, "yellow"))


def _write_patch_file(subject: LabModel, edits: Sequence[Edit], report: Report, file: Path) -> None:
    """Write the patch with its report, and say how it is uploaded."""
    report = replace(report, made_by=command())
    _print_report(report)
    if not edits:
        err.print("[yellow]nothing to patch[/]: no edit within the bounds was better than the model as it is")
        return
    PatchFile.of(subject, edits, report.markdown()[:DESCRIPTION]).write(file)
    page = file.with_suffix(".html")
    page.write_text(report.html(), "utf-8")
    out.print(f"{file}: {counted(len(edits), 'edit')}; the report is {page}", markup=False)  # a name may have brackets
    named = re.sub("[^a-z0-9]+", "-", file.stem.lower()).lstrip("-0123456789").rstrip("-")[:63]
    upload = f"patch revise {named or 'patch'} {shlex.quote(str(file))}"
    advice = "it falls short, as said above; to upload it all the same" if report.warning else "upload it"
    out.print(Text(f"{advice}: {hints.backpack(upload)}", "dim"))
