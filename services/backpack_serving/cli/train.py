"""`backpack train`: text in, a servable model folder out."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from shutil import copyfile
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from backpack_serving.cli import hints
from backpack_serving.cli.client import err, exits
from backpack_serving.settings import Settings

if TYPE_CHECKING:
    from backpack_lm.tokenizer import Tokenizer
    from backpack_lm.training.data import Source
    from backpack_lm.training.trainer import Trainer

TrainingPrecision = Literal["auto", "float32", "bfloat16"]

COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeRemainingColumn(),
    TextColumn("{task.fields[note]}"),
)


@exits("train")
def train(
    sources: Annotated[
        list[str],
        typer.Argument(help="JSON-lines files (.xz or not), each record with a `text`; PATH or PATH:SHARE."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run; an unfinished run there resumes.")],
    steps: Annotated[int, typer.Option(help="Optimiser steps.", min=1)],
    twin: Annotated[bool, typer.Option(help="Train the Transformer of the same trunk instead.")] = False,
    layers: Annotated[int, typer.Option(help="Trunk layers L.", min=1)] = 6,
    heads: Annotated[int, typer.Option(help="Trunk heads H.", min=1)] = 6,
    width: Annotated[int, typer.Option(help="Width d.", min=1)] = 192,
    senses: Annotated[int, typer.Option(help="Senses k of each word.", min=1)] = 16,
    context: Annotated[int, typer.Option(help="Context T in tokens.", min=1)] = 512,
    vocabulary: Annotated[
        int, typer.Option(help="Size of the byte-level BPE vocabulary to train first.", min=1, max=2**16)
    ] = 16384,
    shape: Annotated[
        Path | None,
        typer.Option("--config", help="A config.json with the whole shape, of any family of trunks, instead of sizes."),
    ] = None,
    tokens_per_step: Annotated[int, typer.Option(help="Tokens of one optimiser step.", min=1)] = 2048,
    lr: Annotated[float, typer.Option(help="Peak learning rate of AdamW.", min=0)] = 3e-3,
    matrix_lr: Annotated[float, typer.Option(help="Peak learning rate of Muon (matrices of layers).", min=0)] = 6e-3,
    decay: Annotated[
        float,
        typer.Option(help="Share of the steps, at the end, over which learning rates fall to zero.", min=0, max=1),
    ] = 0.5,
    short_row: Annotated[int, typer.Option(help="Tokens of a row in the first 70 % of the steps.", min=1)] = 256,
    after: Annotated[
        Path | None, typer.Option(help="Start from the weights and the tokenizer of this run (its --out).")
    ] = None,
    precision: Annotated[TrainingPrecision, typer.Option(help="Precision of products; weights are float32.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of weights and data order.", min=0)] = 0,
    threads: Annotated[int, typer.Option(help="Threads; 0 for torch's choice, at most one for each core.", min=0)] = 0,
) -> None:
    """Train a Backpack (or its Transformer twin) from text.

    Trains a tokenizer, tokenises the text, trains the model, and writes OUT/model (a folder to serve),
    OUT/loss.svg and held-out perplexities. A stopped run resumes from its last checkpoint with the same command
    and ends with the same weights. To continue a finished run, or on other text, start another one after it:
    --after RUN --seed 1 --out RUN2.
    """
    Settings.check_threads()
    import torch
    from backpack_lm.checkpoint import TOKENIZER, save
    from backpack_lm.config import BackpackConfig
    from backpack_lm.cores import set_threads
    from backpack_lm.kernels import Precision
    from backpack_lm.model import Backpack
    from backpack_lm.training import data
    from backpack_lm.training.curve import plot
    from backpack_lm.training.evaluation import held_out
    from backpack_lm.training.trainer import Recipe, Trainer

    set_threads(threads)
    corpus = data.parse_sources(sources)
    if shape is not None:
        config = BackpackConfig.read(shape)
        vocabulary = config.vocab_size
    else:
        config = BackpackConfig.gpt2(vocabulary, context, width, layers, heads, num_senses=senses)
    recipe = Recipe(
        steps,
        seed=seed,
        tokens_per_step=tokens_per_step,
        lr=lr,
        matrix_lr=matrix_lr,
        decay=decay,
        short_row=short_row,
        precision=Precision.BFLOAT16 if Precision(precision).dtype() == torch.bfloat16 else Precision.FLOAT32,
    )
    folder = out / "data"
    tokenizer = _tokenizer(corpus, folder, vocabulary, after)
    with Progress(*COLUMNS, console=err) as progress:
        tokenise(corpus, tokenizer, folder, progress)
        config = config.with_vocabulary(tokenizer.vocab_size, tokenizer.end_of_text)
        name = "twin" if twin else "backpack"
        run, rows = out / name, data.Rows.open(corpus, folder, seed, tokenizer.end_of_text)
        trainer = Trainer(config, recipe, rows, run, twin, after / name if after else None)
        _train_with_progress(trainer, progress)
        if not twin:
            assert isinstance(trainer.model, Backpack)
            save(trainer.model, folder / TOKENIZER, out / "model", topics=True)
        note = progress.add_task("evaluate", total=None, note="")
        perplexities = held_out(trainer.model, corpus, folder)
        progress.remove_task(note)
    (run / "perplexity.json").write_text(json.dumps(perplexities, indent=2) + "\n")
    for source in corpus:
        value = perplexities.get(source.name)
        shown = f"none, fewer than {context + 1} tokens are held out" if value is None else f"{value:.2f}"
        err.print(f"held-out perplexity, {source.name}: {shown}", markup=False)
    parts = [after, out] if after else [out]
    made = [name for name in ("backpack", "twin") if (out / name / "log.jsonl").exists()]
    plot({name: [part / name for part in parts] for name in made}, out / "loss.svg")
    if not twin:
        model = out / "model"
        serve = f"BACKPACK_MODEL={shlex.quote(str(model))} {hints.backpack('run')}"
        err.print(f"wrote {model}; serve it with {serve}", markup=False)


def _tokenizer(corpus: Sequence[Source], folder: Path, vocabulary: int, after: Path | None) -> Tokenizer:
    """The tokenizer of the run: from its folder, from the previous run, or newly trained."""
    from backpack_lm.checkpoint import TOKENIZER
    from backpack_lm.tokenizer import Tokenizer
    from backpack_lm.training import data

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / TOKENIZER
    if after is not None:
        _same_tokenizer(after / folder.name / TOKENIZER, file)
    elif not file.exists():
        err.print(f"Learning a tokenizer of {vocabulary} tokens")
        data.train_tokenizer(corpus, vocabulary, file)
    tokenizer = Tokenizer.read(file)
    if tokenizer.vocab_size != vocabulary:  # learnt before, or from a text too short for more
        err.print(f"{file} has {tokenizer.vocab_size} tokens, not {vocabulary}", markup=False)
    return tokenizer


def _same_tokenizer(before: Path, here: Path) -> None:
    """Copy the tokenizer of the previous run. Raises ValueError if the folder has a different one."""
    if not before.exists():
        raise ValueError(f"{before.parent.parent} is no run to begin after: it has no {before.name}")
    if not here.exists():
        copyfile(before, here)
    elif here.read_bytes() != before.read_bytes():
        raise ValueError(f"{here} isn't the tokenizer of {before.parent.parent}: give another --out, or no --after")


def tokenise(corpus: Sequence[Source], tokenizer: Tokenizer, folder: Path, progress: Progress) -> None:
    """Write the missing token streams."""
    from backpack_lm.training import data

    for source in corpus:
        if not data.is_encoded(source, folder):
            task = progress.add_task(f"tokenise {source.name}", total=100, note="")
            for done in data.encode(source, tokenizer, folder):
                progress.update(task, completed=100 * done)


def _train_with_progress(trainer: Trainer, progress: Progress) -> None:
    """Run the remaining steps, with a progress bar."""
    task = progress.add_task("train", total=trainer.recipe.steps, completed=trainer.step, note="")
    for step in trainer.run():
        speed = step.tokens / step.seconds
        progress.update(task, completed=step.step, note=f"loss {step.loss:.3f}, {speed:.0f} tokens/s")
