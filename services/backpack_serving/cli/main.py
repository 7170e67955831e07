"""The `backpack` command."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import metadata
from inspect import signature
from typing import Annotated, Any

import typer

from backpack_serving.cli.client import out
from backpack_serving.cli.health import health
from backpack_serving.cli.stopping import end_as_first_process

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="markdown",
    help="""Serve Backpack language models to many tenants, each steered by its own patches to the sense vectors.

    Start with `backpack run`; then, in another terminal, `backpack generate "How to take care of a horse:"`.

    Try an edit: `backpack try "How to take care of a horse:" --edit 'copy horse car'`; and steer by it:
    `backpack steer riding 'copy horse car' --activate`.
    """,
)


def _print_version(asked: bool) -> None:
    if asked:
        out.print(f"backpack-serving {metadata.version('backpack-serving')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    end_as_first_process()


def _add_commands() -> None:
    from backpack_serving.cli import control, database, experiment, lab, model, releases, serve, tenants, text, words
    from backpack_serving.cli.adapt import adapt
    from backpack_serving.cli.compare import compare
    from backpack_serving.cli.find import find, tokenize
    from backpack_serving.cli.generate import generate
    from backpack_serving.cli.login import app as contexts
    from backpack_serving.cli.login import login
    from backpack_serving.cli.run import run
    from backpack_serving.cli.secrets import write
    from backpack_serving.cli.steer import steer, try_edits
    from backpack_serving.cli.target import with_context
    from backpack_serving.cli.train import train

    app.command(rich_help_panel="Serving")(run)
    app.add_typer(serve.app, name="serve", rich_help_panel="Serving")
    app.command(rich_help_panel="Serving")(model.settings)
    app.command(rich_help_panel="Serving")(health)
    app.command("secrets", rich_help_panel="Serving")(write)
    app.add_typer(database.app, name="database", rich_help_panel="Serving")
    for command in (generate, text.score, text.explain, compare, text.senses, find):
        app.command(rich_help_panel="Calling")(command)
    app.command("map", rich_help_panel="Calling")(words.map_sense)
    app.command(rich_help_panel="Calling")(words.uses)
    app.command(rich_help_panel="Calling")(tokenize)
    app.command(rich_help_panel="Calling")(login)
    app.add_typer(contexts, name="context", rich_help_panel="Calling")
    app.command("try", rich_help_panel="Steering")(try_edits)
    app.command(rich_help_panel="Steering")(steer)
    app.add_typer(tenants.app, name="tenant", rich_help_panel="Steering")
    app.add_typer(control.patch_app, name="patch", rich_help_panel="Steering")
    app.add_typer(lab.app, name="lab", rich_help_panel="Steering")
    app.add_typer(releases.app, name="release", rich_help_panel="Steering")
    app.add_typer(releases.canary_app, name="canary", rich_help_panel="Steering")
    app.command(rich_help_panel="Steering")(releases.fleet)
    app.command(rich_help_panel="Steering")(releases.replicas)
    app.command(rich_help_panel="Steering")(control.audit)
    app.command(rich_help_panel="Models")(train)
    app.command(rich_help_panel="Models")(adapt)
    app.add_typer(model.app, name="model", rich_help_panel="Models")
    app.add_typer(experiment.app, name="experiment", rich_help_panel="Models")

    operating = {each.callback for each in tenants.app.registered_commands} | {releases.fleet, releases.replicas}
    for group in (app, tenants.app, control.patch_app, releases.app, releases.canary_app):
        for each in group.registered_commands:
            calling: Callable[..., Any] | None = each.callback
            if calling and ("key" in signature(calling).parameters or calling in operating):
                each.callback = with_context(calling)


if sys.argv[1:2] == ["health"]:  # containers ask every few seconds, and need nothing that only others load
    app.command()(health)
else:
    _add_commands()

if __name__ == "__main__":
    app()
