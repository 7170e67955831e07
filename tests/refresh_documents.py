"""`python -m tests.refresh_documents README.md docs/quickstart.md`: run a page's commands as its test does, and write
what they print into the page. For outputs that are shown whole; read them before you commit them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.e2e.test_documents_run import MARK, ROOT, serving, session

TABLE = "One prompt, one batch"
"""How the table begins that `backpack run` prints."""

REPLICA = "127.0.0.1:8490"
"""The replica's address in pages: otherwise each start has another port, and so would each page."""


def refresh(page: str) -> None:
    """Rewrite one page. Ports of its addresses must be free."""
    text = (ROOT / page).read_text("utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BACKPACK_")}
    environment |= {"COLUMNS": "100", "NO_COLOR": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment["BACKPACK_INFERENCE_ADDRESS"] = REPLICA
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / ".venv").symlink_to(sys.prefix)
        steps = session(page, {})
        script = "".join(f"echo '{MARK}'\n{step.command}\n" for step in steps)
        with serving(folder, environment) as printed:
            done = subprocess.run(
                ["bash", "-e", "-c", script],
                cwd=folder,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
    assert done.returncode == 0, done.stdout
    outputs = done.stdout.split(f"{MARK}\n")[1:]
    at = 0
    for step, output in zip(steps, outputs, strict=True):
        if step.language == "python":  # its output isn't in the page
            print(f"{step.command}\n{output}")
            continue
        start = text.index(f"$ {step.command}\n", at) + len(step.command) + 3
        assert text.startswith(step.shown, start), step.command
        shown = "".join(line.rstrip() + "\n" for line in output.splitlines())
        text, at = text[:start] + shown + text[start + len(step.shown) :], start + len(shown)
    table = printed[printed.index(TABLE) : printed.index("From the command line")].rstrip()
    table = "".join(line.rstrip() + "\n" for line in table.splitlines())
    text = re.sub(rf"```text\n{TABLE}.*?```", lambda _: f"```text\n{table}```", text, flags=re.S)
    (ROOT / page).write_text(text, "utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        refresh(name)
