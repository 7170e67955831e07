"""vLLM running a Transformer with random weights on this machine's processor: one measurement for every line asked.

Runs under the environment that `make vllm` builds, and imports nothing of this project but its neighbour:

    echo '{"batch": 32, "prompt": 64, "new": 64}' | .venv-vllm/bin/python tests/bench/vllm_peer.py

The first line that comes back says what runs; each one after that answers a line of input:
{"tokens_per_second": prompts' time included, "first_token_s": median over the batch, from the round's start,
"peak_memory_bytes": of this process}, or {"error": …}. Ends with its input. Between lines no thread runs.
"""

from __future__ import annotations

import argparse
import ctypes.util
import hashlib
import json
import os
import random
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from answering import serve

BLOCK = 128
"""Tokens in a block of vLLM's cache; what it takes by itself on a CPU."""
CACHE = Path(sys.prefix) / "cache"
"""What is compiled at the first start, which takes a minute; it goes when the environment goes."""
BUDGET = 2048
"""Most tokens in a step (max_num_batched_tokens). 512 gave the first token sooner and 5% fewer tokens/s."""
GPT2_SMALL = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 50264,
    "n_positions": 512,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--config", type=json.loads, default=GPT2_SMALL, metavar="JSON", help="its config.json (GPT-2 small)"
    )
    for name, value, text in (
        ("batch", 32, "most sequences at once"),
        ("threads", len(os.sched_getaffinity(0)), "of arithmetic; by default one per core"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, metavar="N", help=f"{text} ({value})")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    return parser.parse_args()


def settle(threads: int) -> None:
    """Start again under the settings that hold only if they are there before anything is loaded.

    They are those of vLLM's guide for CPUs (Intel's OpenMP and tcmalloc preloaded, threads bound to cores) and
    what its launcher sets for Intel's OpenMP. The launcher is left out: it parts scheduler and worker into two
    processes that poll for each other's messages, on two cores a little slower (tests/bench/README.md).
    """
    if os.environ.pop("VLLM_PEER_SETTLED", ""):
        return
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0))[:threads])
    preloaded = [str(Path(sys.prefix) / "lib" / "libiomp5.so")]
    if tcmalloc := ctypes.util.find_library("tcmalloc_minimal"):  # Debian: libtcmalloc-minimal4
        preloaded.append(tcmalloc)
    settings = {
        "VLLM_PEER_SETTLED": "yes",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "LD_PRELOAD": ":".join(preloaded),
        "OMP_NUM_THREADS": str(threads),
        "KMP_AFFINITY": f"granularity=fine,explicit,proclist=[{cores}]",
        "KMP_BLOCKTIME": "5",  # ms that a thread spins for more work, then it sleeps
        "KMP_TPAUSE": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(CACHE / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(CACHE / "inductor"),
    }
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | settings)


class Peer:
    def __init__(self, sizes: argparse.Namespace) -> None:
        from vllm import LLM

        self.sizes, self.asked = sizes, 0
        self.positions = sizes.config.get("n_positions") or sizes.config["max_position_embeddings"]
        values = 2 if sizes.dtype == "bfloat16" else 4
        blocks = sizes.batch * -(-self.positions // BLOCK) + 1  # one is never used
        config = json.dumps(sizes.config)
        # The same folder each time: its name is part of what vLLM knows its compiled models by.
        folder = CACHE / f"model-{hashlib.sha256(config.encode()).hexdigest()[:12]}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(config)
        self.engine = LLM(
            model=str(folder),
            skip_tokenizer_init=True,
            load_format="dummy",
            dtype=sizes.dtype,
            max_model_len=self.positions,
            max_num_seqs=sizes.batch,
            max_num_batched_tokens=max(BUDGET, self.positions),
            block_size=BLOCK,
            kv_cache_memory_bytes=blocks * BLOCK * self._cached() * values,
            enable_prefix_caching=False,
            disable_log_stats=False,  # they say when a request's first token came
        ).llm_engine

    def _cached(self) -> int:
        """Numbers in the cache for each token: keys and values of all layers."""
        config = self.sizes.config
        if config["model_type"] == "gpt2":
            return 2 * int(config["n_layer"] * config["n_embd"])
        return 2 * int(config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"])

    def describe(self) -> dict[str, Any]:
        import torch
        import vllm

        return {
            **vars(self.sizes),
            "version": vllm.__version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "preloaded": os.environ["LD_PRELOAD"],
        }

    def measure(self, batch: int, prompt: int, new: int) -> dict[str, float]:
        """`batch` random prompts of `prompt` tokens, asked at once, each continued greedily by `new` tokens."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if not (1 <= batch <= self.sizes.batch and prompt >= 1 and new >= 1):
            raise ValueError(f"batch {batch}, prompt {prompt}, new {new}: 1 to {self.sizes.batch}, 1 and 1 at least")
        if prompt + new > self.positions:
            raise ValueError(f"prompt {prompt} + new {new} is more than {self.positions}, the model's positions")
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=new,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompts = [random.choices(range(1, self.sizes.config["vocab_size"]), k=prompt) for _ in range(batch)]
        firsts, tokens = [], 0
        started = time.monotonic()
        for ids in prompts:
            self.asked += 1
            self.engine.add_request(str(self.asked), {"prompt_token_ids": ids}, sampling)
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                firsts.append(output.metrics.first_token_ts - started)
                tokens += len(output.outputs[0].token_ids)
        elapsed = time.monotonic() - started
        assert tokens == batch * new, f"{tokens} tokens came instead of {batch * new}"
        return {
            "tokens_per_second": tokens / elapsed,
            "first_token_s": statistics.median(firsts),
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }


if __name__ == "__main__":
    sizes = arguments()
    settle(sizes.threads)
    serve(lambda: Peer(sizes))
