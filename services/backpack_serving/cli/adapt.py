"""`backpack adapt`: a pretrained Transformer in, a servable Backpack out."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress

from backpack_serving.cli import hints
from backpack_serving.cli.client import err, exits
from backpack_serving.cli.train import COLUMNS, tokenise
from backpack_serving.settings import Settings

if TYPE_CHECKING:
    from backpack_lm.adapting.recipe import AdaptRecipe
    from backpack_lm.adapting.trainer import AdaptTrainer, HeldOut

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
        typer.Argument(help="JSON-lines files (.xz or not), each record with a `text`; PATH or PATH:SHARE."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run; an unfinished run there resumes.")],
    budget: Annotated[
        str, typer.Option(help="How long it may take here, as in 10m or 3h; steps are chosen by what some take.")
    ] = "",
    recipe: Annotated[
        Path | None, typer.Option(help="JSON with what a recipe may say (see docs/models.md), `steps` and `fresh`.")
    ] = None,
    disk: Annotated[float, typer.Option(help="GB that states of the Transformer may take on disk.", min=0.1)] = 20.0,
    device: Annotated[str, typer.Option(help="cpu or cuda; the GPU if there is one.")] = "",
    seed: Annotated[int | None, typer.Option(help="Seed of weights and data order.", min=0)] = None,
    threads: Annotated[int, typer.Option(help="Threads; 0 for torch's choice, at most one for each core.", min=0)] = 0,
) -> None:
    """Adapt a pretrained Transformer: make a Backpack of it, that predicts as it does.

    The Transformer becomes the trunk. Senses begin as the best that can be made of its predictions after each lone
    word, and are trained to predict what it predicts; in the end its uppermost layers are trained with them. Writes
    OUT/adapter (what was learnt), OUT/model (a folder to serve), OUT/loss.svg and OUT/run/held-out.jsonl. A stopped
    run resumes with the same command, and loses less than a minute.

    `backpack adapt SmolLM2-135M-Instruct.Q4_1.gguf text.jsonl.xz --out run --budget 3h`
    """
    Settings.check_threads()
    import torch
    from backpack_lm.adapting import adapter as adapters
    from backpack_lm.checkpoint import TOKENIZER
    from backpack_lm.cores import set_threads
    from backpack_lm.manifest import NAME as MANIFEST
    from backpack_lm.training import data
    from backpack_lm.whole_folder import whole

    began = time.monotonic()
    seconds = _seconds(budget) if budget else None
    if seconds is None and recipe is None and not (out / RECIPE).exists():
        raise ValueError("say how long it may take with --budget, or give a --recipe with steps and fresh")
    set_threads(threads)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    corpus = data.parse_sources(sources)
    out.mkdir(parents=True, exist_ok=True)
    with Progress(*COLUMNS, console=err) as progress:
        where = _transformer(transformer)
        tokenizer = _tokenizer_of_transformer(where, out / "data")
        tokenise(corpus, tokenizer, out / "data", progress)
        trainer = _trainer(where, corpus, out, recipe, seed, device, disk, seconds, began, progress)
        _adapt_with_progress(trainer, progress)
        adapters.write_adapter(trainer.student, where, out / "data" / TOKENIZER, out / "adapter")
        task = progress.add_task("assemble", total=trainer.config.vocab_size, note="")
        with whole(out / "model", MANIFEST) as scratch:
            adapters.assemble(out / "adapter", where, scratch, lambda done, of: progress.update(task, completed=done))
    model = out / "model"
    err.print(f"wrote {model}; serve it with BACKPACK_MODEL={shlex.quote(str(model))} {hints.backpack('run')}")


def _transformer(name: str) -> Path:
    """Where the Transformer is; one of the hub is fetched. Raises ValueError with what can be done instead."""
    if (where := Path(name)).exists():
        return where
    from backpack_lm import hub
    from backpack_lm.layouts import CheckpointError

    try:
        return hub.fetch(name)
    except CheckpointError as error:
        raise ValueError(f"{name} is no folder or file here: {error}") from None


def _tokenizer_of_transformer(where: Path, folder: Path) -> Any:
    """The Transformer's, copied into the run's folder."""
    from backpack_lm.checkpoint import TOKENIZER
    from backpack_lm.gguf_file import SUFFIX, tokenizer_of
    from backpack_lm.tokenizer import Tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / TOKENIZER
    if not file.exists():
        if where.suffix == SUFFIX:
            tokenizer_of(where).save(str(file))
        else:
            shutil.copyfile(where / TOKENIZER, file)
    return Tokenizer.read(file)


def _trainer(
    where: Path, corpus: list[Any], out: Path, file: Path | None, seed: int | None, device: str, disk: float,
    seconds: float | None, began: float, progress: Progress,
) -> AdaptTrainer:  # fmt: skip
    """The run, with the recipe that it was begun with or that fits into the budget."""
    import torch
    from backpack_lm.adapting.lessons import Lessons
    from backpack_lm.adapting.recipe import AdaptRecipe
    from backpack_lm.adapting.trainer import AdaptTrainer, within
    from backpack_lm.checkpoint import TOKENIZER, read_transformer
    from backpack_lm.model import Trunk
    from backpack_lm.tokenizer import Tokenizer
    from backpack_lm.training import data

    task = progress.add_task("read the Transformer", total=None, note="")
    spec, tensors = read_transformer(where)
    head = tensors.pop("lm_head.weight", None)
    with torch.device("meta"):
        trunk = Trunk(spec)
    trunk.load_state_dict(tensors, assign=True)
    embedding = trunk.wte.weight if head is None else head
    tokenizer = Tokenizer.read(out / "data" / TOKENIZER)
    if tokenizer.end_of_text is None:
        raise ValueError(f"{where}'s tokenizer has no end-of-text token")
    begun = out / RECIPE
    more: dict[str, Any] = {} if seed is None else {"seed": seed}
    if begun.exists():
        chosen = AdaptRecipe.read(begun, **more)
    elif file is not None:
        chosen = AdaptRecipe.read(file, **({"steps": 1, "fresh": 1} if seconds else {}), **more)
    else:
        chosen = AdaptRecipe(steps=100, fresh=100, **more)
    progress.remove_task(task)

    def made(recipe: AdaptRecipe) -> AdaptTrainer:
        rows = data.Rows.open(corpus, out / "data", recipe.seed, tokenizer.end_of_text)
        assert tokenizer.end_of_text is not None
        config = recipe.config(spec, tokenizer.end_of_text, tokenizer.vocab_size)
        held_out = {source.name: data.stream(source, out / "data", "heldout") for source in corpus}
        return AdaptTrainer(trunk, embedding, config, recipe, rows, held_out, out / "run", out / "kept", device)

    if not begun.exists():
        if seconds is not None:
            task = progress.add_task("measure some steps", total=None, note="")
            trial = made(AdaptRecipe.of({**chosen.to_json(), "steps": 100, "fresh": 100}))
            costs = trial.seconds()
            per_row = Lessons.size(1, chosen.row, len(trial.layers), spec.width)
            left = max(0.8 * seconds - (time.monotonic() - began) - _start_seconds(costs, chosen), 0.2 * seconds)
            chosen = within(chosen, left, costs, max(1, math.floor(disk * 1e9 / per_row)))
            shutil.rmtree(out / "run", ignore_errors=True)
            progress.remove_task(task)
            err.print(
                f"a step of {chosen.rows_per_step} rows takes {costs[1]:.2f} s, reading them first {costs[0]:.2f} s: "
                f"{chosen.steps} steps on {chosen.fresh} rows"
            )
        begun.write_text(json.dumps(chosen.to_json(), indent=2) + "\n", "utf-8")
    return made(chosen)


def _start_seconds(costs: tuple[float, float, float], recipe: AdaptRecipe) -> float:
    """About what the first senses take: reading their rows, and as much again for the regression."""
    return 2 * costs[0] * recipe.start_rows / recipe.rows_per_step


def _adapt_with_progress(trainer: AdaptTrainer, progress: Progress) -> None:
    """Take the remaining steps, with a progress bar and now and then a look at held-out text."""
    from backpack_lm.training.curve import plot_adapting

    recipe = trainer.recipe
    if not trainer.step:
        task = progress.add_task("first senses", total=100, note="")
        for done in trainer.start():
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
            f"held-out {name}: {each.backpack:.3f} nats a token, the Transformer {each.original:.3f}", markup=False
        )


def _log_held_out(trainer: AdaptTrainer, found: dict[str, HeldOut]) -> None:
    line = {"step": trainer.step, "held_out": {name: asdict(each) for name, each in found.items()}}
    with (trainer.folder / "held-out.jsonl").open("a") as log:
        log.write(json.dumps(line) + "\n")
