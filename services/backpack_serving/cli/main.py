"""The `backpack` command."""

from __future__ import annotations

import typer

from backpack_serving.cli.train import train

app = typer.Typer(
    no_args_is_help=True,
    help="Serve Backpack language models, each tenant steered by its own patches to the sense vectors.",
    pretty_exceptions_show_locals=False,
)


@app.callback()
def _root() -> None:
    pass


app.command()(train)

if __name__ == "__main__":
    app()
