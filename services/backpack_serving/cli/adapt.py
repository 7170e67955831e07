"""`backpack adapt`: a pretrained Transformer in, a servable Backpack out."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress

from backpack_serving.cli import hints
from backpack_serving.cli.client import err, exits
from backpack_serving.cli.train import COLUMNS, tokenise
from backpack_serving.settings import Settings

if TYPE_CHECKING:
    from backpack_lm.adapting.recipe import AdaptRecipe
    from backpack_lm.adapting.trainer import AdaptTrainer, HeldOut, Teacher
    from backpack_lm.tokenizer import Tokenizer
    from backpack_lm.training.data import Source

RECIPE = "recipe.json"
CHECKS = 20
"""How often held-out text is looked at."""
_UNITS = {"s": 1, "m": 60, "h": 3600}


def _seconds(budget: str) -> float:
    """10m → 600. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", budget.strip())
    if not match or not float(match[1]):
        raise ValueError(f"--budget {budget!r}: write a number and s, m or h, as in 10m or 3h")
    return float(match[1]) * _UNITS[match[2]]


@exits("train")
def adapt(
    transformer: Annotated[
        str,
        typer.Argument(help="A Hugging Face folder or a GGUF file; else a name on the Hugging Face hub."),
    ],
    sources: Annotated[
        list[str],
        typer.Argument(
            help="JSON-lines files (.xz or not), each record with a `text` or `input_ids`; PATH or PATH:SHARE."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run; an unfinished run there resumes.")],
    budget: Annotated[
        str,
        typer.Option(help="How long it may take here: 10m, 3h. Some steps are measured to choose how many."),
    ] = "",
    recipe: Annotated[
        Path | None, typer.Option(help="JSON file of AdaptRecipe's fields; without --budget, with steps among them.")
    ] = None,
    disk: Annotated[float, typer.Option(help="GB that the Transformer's states may take on disk.", min=0.1)] = 20.0,
    device: Annotated[str, typer.Option(help="cpu or cuda; the GPU if there is one.")] = "",
    seed: Annotated[int | None, typer.Option(help="Seed of weights and data order.", min=0)] = None,
    after: Annotated[
        Path | None, typer.Option(help="Folder of an adapter to begin with: what another run has learnt.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads; 0 for torch's choice, at most one for each core.", min=0)] = 0,
) -> None:
    """Adapt a pretrained Transformer: make a Backpack of it, that predicts as it does.

    The Transformer becomes the trunk. Senses begin as the best that can be made of its predictions after each lone
    word, and are trained to predict what it predicts; in the end its uppermost layers are trained with them. Writes
    OUT/adapter (what was learnt), OUT/model (a folder to serve), OUT/loss.svg and OUT/run/held-out.jsonl. A stopped
    run resumes with the same command; training loses less than a minute.

    `backpack adapt SmolLM2-135M-Instruct.Q4_1.gguf text.jsonl.xz --out run --budget 3h`
    """
    Settings.check_threads()
    from backpack_lm.adapting import adapter as adapters
    from backpack_lm.checkpoint import TOKENIZER
    from backpack_lm.cores import set_threads
    from backpack_lm.manifest import NAME as MANIFEST
    from backpack_lm.training import data
    from backpack_lm.whole_folder import whole

    run = _Run(out, disk, _device(device), time.monotonic(), _seconds(budget) if budget else None, after)
    corpus, begun = data.parse_sources(sources), run.recipe(recipe, seed)
    set_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    with Progress(*COLUMNS, console=err) as progress:
        task = progress.add_task("read the Transformer", total=None, note="")
        where, teacher = _read_teacher(transformer)
        progress.remove_task(task)
        tokenizer = _tokenizer_of_transformer(where, out / "data")
        begun.config(teacher.trunk.spec, 0, tokenizer.vocab_size)  # what it can't be is told before the work begins
        tokenise(corpus, tokenizer, out / "data", progress)
        trainer = run.trainer(teacher, tokenizer, corpus, begun, progress)
        _adapt_with_progress(trainer, progress)
        adapters.write_adapter(trainer.student, teacher.digest, out / "data" / TOKENIZER, out / "adapter")
        task = progress.add_task("assemble", total=trainer.config.vocab_size, note="")
        with whole(out / "model", MANIFEST) as scratch:
            adapters.assemble(out / "adapter", where, scratch, lambda done, of: progress.update(task, completed=done))
    model = shlex.quote(str(out / "model"))
    err.print(f"wrote {model}; serve it with {hints.backpack('run')} --model {model}", markup=False)


def _device(name: str) -> str:
    """Raises ValueError if there is no such device."""
    import torch

    available = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if name and name not in available:
        raise ValueError(f"--device {name!r}: there is {' and '.join(available)} here")
    return name or available[-1]


def _read_teacher(name: str) -> tuple[Path, Teacher]:
    """Where the Transformer is, fetched from the hub if it isn't here, and what it is. Raises ValueError."""
    from backpack_lm import hub
    from backpack_lm.adapting.adapter import digest
    from backpack_lm.adapting.trainer import Teacher
    from backpack_lm.checkpoint import read_trunk
    from backpack_lm.layouts import CheckpointError

    where = Path(name)
    if not where.exists():
        try:
            where = hub.fetch(name)
        except CheckpointError as error:
            raise ValueError(f"{name} is no folder or file here: {error}") from None
    return where, Teacher(*read_trunk(where), digest(where))


def _tokenizer_of_transformer(where: Path, folder: Path) -> Tokenizer:
    """The Transformer's, copied into the run's folder, with texts that begin with an end-of-text token: a Transformer
    reads the first position of a text as nothing else. Raises ValueError if it has none, or none that can be used."""
    from backpack_lm.checkpoint import TOKENIZER, tokenizer_for
    from backpack_lm.gguf_file import SUFFIX, tokenizer_of
    from backpack_lm.tokenizer import END_OF_TEXT, Tokenizer, begin_texts
    from tokenizers import Tokenizer as HFTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / TOKENIZER
    if where.suffix == SUFFIX:
        tokenizer_of(where).save(str(file))
    else:
        shutil.copyfile(tokenizer_for(where)[0], file)
    if Tokenizer.read(file).end_of_text is None:
        raise ValueError(f"{where}'s tokenizer has no {END_OF_TEXT} token, which texts begin with here")
    with_first = HFTokenizer.from_file(str(file))
    begin_texts(with_first, END_OF_TEXT)
    with_first.save(str(file))
    return Tokenizer.read(file)


class _Run:
    """A run's folder, and what it may take: GB on disk, and seconds from `began` on, if there is a budget. It begins
    with what the adapter `after` has, if there is one."""

    def __init__(
        self, out: Path, disk: float, device: str, began: float, seconds: float | None, after: Path | None
    ) -> None:
        self._out, self._disk, self._device, self._began, self._seconds = out, disk, device, began, seconds
        self._after = after
        self._file = out / RECIPE

    def recipe(self, file: Path | None, seed: int | None) -> AdaptRecipe:
        """The recipe that the run was begun with; else that of the command, whose steps a budget will set.

        Raises ValueError if there is neither, or both and they differ.
        """
        from backpack_lm.adapting.recipe import AdaptRecipe

        more: dict[str, Any] = {} if seed is None else {"seed": seed}
        steps = {"steps": 1, "distinct_rows": 1}
        if self._file.exists():
            begun = AdaptRecipe.read(self._file)
            length = {name: getattr(begun, name) for name in steps}
            asked = AdaptRecipe.read(file, **more, **(length if self._seconds else {})) if file else None
            wanted = asked or AdaptRecipe.of({**begun.to_json(), **more})
            if wanted != begun:
                raise ValueError(
                    f"{self._file} is the recipe of this run, and another than is asked for; give another --out"
                )
            return begun
        if self._seconds is None and file is None:
            raise ValueError("say how long it may take with --budget, or give a --recipe with steps and distinct_rows")
        more |= steps if self._seconds else {}
        return AdaptRecipe.read(file, **more) if file else AdaptRecipe.of(more)

    def trainer(
        self, teacher: Teacher, tokenizer: Tokenizer, corpus: list[Source], recipe: AdaptRecipe, progress: Progress
    ) -> AdaptTrainer:
        """The run, begun or gone on with. Raises ValueError if its rows take more of the disk than they may."""
        from backpack_lm.adapting.teacher_cache import TeacherCache
        from backpack_lm.adapting.trainer import AdaptTrainer, kept_layers
        from backpack_lm.training import data

        end_of_text, data_folder = tokenizer.end_of_text, self._out / "data"
        assert end_of_text is not None
        config = recipe.config(teacher.trunk.spec, end_of_text, tokenizer.vocab_size)
        rows = data.Rows.open(corpus, data_folder, recipe.seed, end_of_text)
        held_out = {source.name: data.stream(source, data_folder, "heldout") for source in corpus}

        def build(recipe: AdaptRecipe, folder: Path) -> AdaptTrainer:
            cache = self._out / "cache"
            return AdaptTrainer(teacher, config, recipe, rows, held_out, folder, cache, self._device, self._after)

        layers = len(kept_layers(config, recipe))
        row_bytes = TeacherCache.row_bytes(recipe.row_tokens, layers, teacher.trunk.spec.width)
        most_rows = max(1, int(self._disk * 1e9 / row_bytes))
        if not self._file.exists():
            if self._seconds is not None:
                recipe = self._fitted(recipe, build, most_rows, progress)
            elif recipe.distinct_rows > most_rows:
                raise ValueError(
                    f"{recipe.distinct_rows} rows take {recipe.distinct_rows * row_bytes / 1e9:.1f} GB, --disk allows "
                    f"{self._disk:g}; raise it, or lower the recipe's distinct_rows to {most_rows}"
                )
            self._file.write_text(json.dumps(recipe.to_json(), indent=2) + "\n", "utf-8")
        return build(recipe, self._out / "run")

    def _fitted(
        self, recipe: AdaptRecipe, build: Callable[[AdaptRecipe, Path], AdaptTrainer], most_rows: int,
        progress: Progress,
    ) -> AdaptRecipe:  # fmt: skip
        """The recipe with the steps and rows that what is left of the budget allows."""
        from backpack_lm.adapting.trainer import fit_to_budget

        assert self._seconds is not None
        task = progress.add_task("measure some steps", total=None, note="")
        with TemporaryDirectory(dir=self._out) as scratch:
            trial = replace(recipe, steps=100, distinct_rows=recipe.rows_per_step)
            costs = build(trial, Path(scratch)).measure()
        first_senses = 2 * costs.reading * recipe.start_rows / recipe.rows_per_step  # the regression takes as long
        left = 0.8 * self._seconds - (time.monotonic() - self._began) - first_senses  # assembly, checks
        fitted = fit_to_budget(recipe, max(left, 0.2 * self._seconds), costs, most_rows)
        progress.remove_task(task)
        err.print(
            f"a step of {fitted.rows_per_step} rows takes {costs.frozen:.2f} s, reading them first {costs.reading:.2f} "
            f"s: {fitted.steps} steps on {fitted.distinct_rows} rows"
        )
        return fitted


def _adapt_with_progress(trainer: AdaptTrainer, progress: Progress) -> None:
    """Take the remaining steps, with a progress bar and now and then a look at held-out text."""
    from backpack_lm.training.curve import plot_adapting

    recipe = trainer.recipe
    if not trainer.has_first_senses:
        task = progress.add_task("first senses", total=100, note="")
        for done in trainer.fit_first_senses():
            progress.update(task, completed=100 * done)
    task = progress.add_task("adapt", total=recipe.steps, completed=trainer.step, note="")
    every = max(1, recipe.steps // CHECKS)
    found = trainer.held_out()
    _log_held_out(trainer, found)
    for step in trainer.run():
        speed = step.tokens / step.seconds
        if step.step % every == 0 or step.step == recipe.steps:
            found = trainer.held_out()
            _log_held_out(trainer, found)
            plot_adapting(trainer.folder, trainer.folder.parent / "loss.svg")
        read = ", ".join(f"{name} {each.backpack:.2f}" for name, each in found.items())
        progress.update(
            task, completed=step.step, note=f"divergence {step.divergence:.2f}, {read}, {speed:.0f} tokens/s"
        )
    for name, each in found.items():
        err.print(
            f"held-out {name}: {each.backpack:.3f} nats a token, the Transformer {each.teacher:.3f}", markup=False
        )


def _log_held_out(trainer: AdaptTrainer, found: dict[str, HeldOut]) -> None:
    from backpack_lm.training.curve import HELD_OUT
    from backpack_lm.training.trainer import append_line

    line = {"step": trainer.step, "held_out": {name: asdict(each) for name, each in found.items()}}
    append_line(trainer.folder / HELD_OUT, line)
