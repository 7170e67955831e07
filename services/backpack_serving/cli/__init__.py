"""The command line: `backpack`."""

import os

from backpack_serving.cli.environment import forget_sizes, open_standard_streams

open_standard_streams()
forget_sizes(os.environ)  # before typer is imported: it reads one of them then
