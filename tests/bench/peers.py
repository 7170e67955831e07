"""Peers that need an environment of their own, each in a process beside ours that rests while ours works."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

from backpack_lm import trunks
from backpack_lm.config import BackpackConfig

from tests.bench.report import console

_ARCHITECTURES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}


def transformer(config: BackpackConfig) -> dict[str, Any]:
    """The config.json of the Transformer that a model's trunk is."""
    values = trunks.write(config.trunk)
    values.pop("scale_attn_by_inverse_layer_idx", None)  # which costs nothing, and peers refuse
    return {**values, "architectures": [_ARCHITECTURES[values["model_type"]]]}


class Peer:
    """Another's server of a Transformer with random weights. Close it, or use it in a `with`.

    >>> with VLLM.start(transformer(SMALL), "bfloat16", batch=32) as peer:
    ...     peer.measure(batch=32, prompt=64, new=64)["tokens_per_second"]
    """

    name: ClassVar[str]
    script: ClassVar[Path]
    target: ClassVar[str]
    """Of `make`, which installs it."""
    environment: ClassVar[Path]
    variable: ClassVar[str]
    """The environment variable that names the python of another environment."""
    size: ClassVar[str]

    def __init__(self, python: Path, config: dict[str, Any], dtype: str, batch: int, threads: int) -> None:
        """Raises RuntimeError, with the last of what it wrote, if it doesn't start."""
        options = {"config": json.dumps(config), "dtype": dtype, "batch": batch, "threads": threads}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the peer
        self._process = subprocess.Popen(
            [python, self.script, *(part for k, v in options.items() for part in (f"--{k}", str(v)))],
            env={k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.described: dict[str, Any] = self._answer()
        """What runs: versions, sizes, threads."""

    @classmethod
    def python(cls) -> Path | None:
        """That of its environment, or None if there is none. Raises FileNotFoundError if its variable names no file."""
        given = os.environ.get(cls.variable)
        python = Path(given) if given else cls.environment / "bin" / "python"
        if python.exists():
            return python
        if given:
            raise FileNotFoundError(
                f"{cls.variable}: {given} doesn't exist; name the python of an environment that has {cls.name}"
            )
        return None

    @classmethod
    def start(cls, config: dict[str, Any], dtype: str, batch: int, threads: int | None = None) -> Self | None:
        """A peer for up to `batch` sequences, ready to measure; None, saying so, where it isn't installed.

        `config` is the Transformer's config.json, `threads` by default one per core. Raises FileNotFoundError as
        `python` does.
        """
        python = cls.python()
        if python is None:
            console.print(
                f"{cls.name} isn't installed and is left out; `make {cls.target}` installs it into "
                f"{cls.environment.name} ({cls.size})"
            )
            return None
        with console.status(f"starting {cls.name} (the first time it takes a minute)"):
            return cls(python, config, dtype, batch, threads or len(os.sched_getaffinity(0)))

    def measure(self, batch: int, prompt: int, new: int) -> dict[str, float]:
        """One round, as the peer's script describes it. Raises ValueError for a round that it can't run, RuntimeError
        if it died."""
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
            raise RuntimeError(f"{self.name} ended with {code}:\n{last}")
        return dict(json.loads(line))

    def close(self) -> None:
        """End the process: at the end of its input, it goes."""
        self._process.communicate()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class VLLM(Peer):
    """vLLM, compiled, in float32 or bfloat16."""

    name = "vLLM"
    script = Path(__file__).with_name("vllm_peer.py")
    target = "vllm"
    environment = Path(__file__).parents[2] / ".venv-vllm"
    variable = "BACKPACK_VLLM_PYTHON"
    size = "2.2 GB"


class LlamaCpp(Peer):
    """llama.cpp, its weights in Q8_0, bfloat16 or float16."""

    name = "llama.cpp"
    script = Path(__file__).with_name("llama_peer.py")
    target = "llama"
    environment = Path(__file__).parents[2] / ".venv-llama"
    variable = "BACKPACK_LLAMA_PYTHON"
    size = "200 MB, compiled here for some minutes"
