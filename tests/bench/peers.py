"""Peers that need an environment of their own, each in a process beside ours that rests while ours works."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from backpack_lm.config import BackpackConfig

from tests.bench.report import console

ENVIRONMENT = Path(__file__).parents[2] / ".venv-vllm"
SCRIPT = Path(__file__).with_name("vllm_peer.py")


class VLLM:
    """vLLM serving GPT-2 of a model's trunk, random weights. Close it, or use it in a `with`.

    >>> with VLLM.start(SMALL, "bfloat16", batch=32) as peer:
    ...     peer.measure(batch=32, prompt=64, new=64)["tokens_per_second"]
    """

    def __init__(self, python: Path, config: BackpackConfig, dtype: str, batch: int, threads: int) -> None:
        """Raises RuntimeError, with the last of what it wrote, if vLLM doesn't start."""
        sizes = {
            "layers": config.trunk.depth,
            "heads": config.trunk.layer.heads,
            "width": config.n_embd,
            "vocabulary": config.vocab_size,
            "positions": config.n_positions,
            "batch": batch,
            "threads": threads,
        }
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the peer
        self._process = subprocess.Popen(
            [python, SCRIPT, "--dtype", dtype, *(part for k, v in sizes.items() for part in (f"--{k}", str(v)))],
            env={k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.described: dict[str, Any] = self._answer()
        """What runs: versions, sizes, threads, what is preloaded."""

    @classmethod
    def start(cls, config: BackpackConfig, dtype: str, batch: int, threads: int | None = None) -> Self | None:
        """A peer for up to `batch` sequences, ready to measure; None, saying so, where vLLM isn't installed.

        Its python is $BACKPACK_VLLM_PYTHON, by default that of `make vllm`. `threads`: by default one per core.
        Raises FileNotFoundError if the variable names no file.
        """
        given = os.environ.get("BACKPACK_VLLM_PYTHON")
        python = Path(given) if given else ENVIRONMENT / "bin" / "python"
        if not python.exists():
            if given:
                raise FileNotFoundError(
                    f"BACKPACK_VLLM_PYTHON: {given} doesn't exist; name the python of an environment that has vLLM"
                )
            console.print("vLLM isn't installed and is left out; `make vllm` installs it into .venv-vllm (2.2 GB)")
            return None
        with console.status("starting vLLM (the first time it compiles for a minute)"):
            return cls(python, config, dtype, batch, threads or len(os.sched_getaffinity(0)))

    def measure(self, batch: int, prompt: int, new: int) -> dict[str, float]:
        """One round; see `vllm_peer`. Raises ValueError for a round that it can't run, RuntimeError if it died."""
        assert self._process.stdin
        with suppress(BrokenPipeError):  # then there is no answer, and that says why
            print(json.dumps({"batch": batch, "prompt": prompt, "new": new}), file=self._process.stdin, flush=True)
        answer = self._answer()
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._log.seek(0)
            last = "".join(self._log.readlines()[-20:])
            self.close()
            raise RuntimeError(f"vLLM ended with {code}:\n{last}")
        return dict(json.loads(line))

    def close(self) -> None:
        """End the process: at the end of its input, it goes."""
        self._process.communicate()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
