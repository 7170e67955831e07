"""llama.cpp running a Transformer with random weights on this processor: one measurement for every line asked.

Runs under the environment that `make llama` builds, and imports nothing of this project but its neighbour:

    echo '{"batch": 32, "prompt": 64, "new": 64}' | .venv-llama/bin/python tests/bench/llama_peer.py

Its lines are those of `vllm_peer.py`. The model is written as a GGUF file, as a conversion from Hugging Face would
be, but for the tokenizer, which nothing here uses. Sequences lie in streams of their own (`kv_unified` off), prompts
are read `--step` tokens at a time, and all sequences get a token in each step after, the greatest logit.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import resource
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from answering import serve

CACHE = Path(sys.prefix) / "cache"
"""Models that were written; they go when the environment goes."""
GPT2_SMALL = {"model_type": "gpt2", "vocab_size": 50264, "n_positions": 512, "n_embd": 768, "n_layer": 12, "n_head": 12}
TYPES = {
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "bfloat16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "float16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
}
"""Of matrices; all else is float32."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--config", type=json.loads, default=GPT2_SMALL, metavar="JSON", help="its config.json (GPT-2 small)"
    )
    for name, value, text in (
        ("batch", 32, "most sequences at once"),
        ("step", 512, "most tokens of a step (n_ubatch)"),
        ("threads", len(os.sched_getaffinity(0)), "of arithmetic; by default one per core"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, metavar="N", help=f"{text} ({value})")
    parser.add_argument("--dtype", choices=TYPES, default="q8_0", help="of its matrices (q8_0)")
    parser.add_argument("--flash", choices=("on", "off"), default="on", help="attention in one pass (on)")
    return parser.parse_args()


def gpt2(writer: gguf.GGUFWriter, config: dict[str, Any]) -> Iterable[tuple[str, Sequence[int]]]:
    """Write what describes the model; the names and shapes of its tensors."""
    d = config["n_embd"]
    writer.add_context_length(config["n_positions"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config.get("layer_norm_epsilon", 1e-5))
    writer.add_embedding_length(d)
    writer.add_feed_forward_length(4 * d)
    writer.add_block_count(config["n_layer"])
    yield "position_embd.weight", (config["n_positions"], d)
    yield from (("output_norm.weight", (d,)), ("output_norm.bias", (d,)))
    for n in range(config["n_layer"]):
        for name, shape in (
            ("attn_norm", (d,)),
            ("attn_qkv", (3 * d, d)),
            ("attn_output", (d, d)),
            ("ffn_norm", (d,)),
            ("ffn_up", (4 * d, d)),
            ("ffn_down", (d, 4 * d)),
        ):
            yield f"blk.{n}.{name}.weight", shape
            yield f"blk.{n}.{name}.bias", shape[:1]


def llama(writer: gguf.GGUFWriter, config: dict[str, Any]) -> Iterable[tuple[str, Sequence[int]]]:
    """As `gpt2`."""
    d, inner, w = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(w)
    writer.add_embedding_length(d)
    writer.add_feed_forward_length(inner)
    writer.add_block_count(config["num_hidden_layers"])
    yield "output_norm.weight", (d,)
    for n in range(config["num_hidden_layers"]):
        for name, shape in (
            ("attn_norm", (d,)),
            ("attn_q", (heads * w, d)),
            ("attn_k", (groups * w, d)),
            ("attn_v", (groups * w, d)),
            ("attn_output", (d, heads * w)),
            ("ffn_norm", (d,)),
            ("ffn_gate", (inner, d)),
            ("ffn_up", (inner, d)),
            ("ffn_down", (d, inner)),
        ):
            yield f"blk.{n}.{name}.weight", shape


FAMILIES = {"gpt2": gpt2, "llama": llama}


def written(config: dict[str, Any], dtype: str) -> Path:
    """The model as a GGUF file, written if it isn't there yet."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]
    path = CACHE / f"{config['model_type']}-{digest}-{dtype}.gguf"
    if path.exists():
        return path
    CACHE.mkdir(parents=True, exist_ok=True)
    kind, file_type = TYPES[dtype]
    writer = gguf.GGUFWriter(unfinished := path.with_suffix(".unfinished"), config["model_type"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(file_type)
    draw = np.random.default_rng(0)
    width = config.get("hidden_size") or config["n_embd"]
    embedding = ("token_embd.weight", (config["vocab_size"], width))  # tied: it is the output's, too
    for name, shape in (embedding, *FAMILIES[config["model_type"]](writer, config)):
        values = draw.standard_normal(shape, dtype=np.float32) * 0.02
        if "norm.weight" in name:
            values += 1
        if len(shape) == 1 or name == "position_embd.weight":
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.rename(path)
    return path


class Peer:
    def __init__(self, sizes: argparse.Namespace) -> None:
        self.sizes, self.vocabulary = sizes, sizes.config["vocab_size"]
        self.positions = sizes.config.get("n_positions") or sizes.config["max_position_embeddings"]
        self.draw = np.random.default_rng(1)
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(
            bytes(written(sizes.config, sizes.dtype)), llama_cpp.llama_model_default_params()
        )
        given = llama_cpp.llama_context_default_params()
        given.n_ctx = sizes.batch * self.positions
        given.n_batch = given.n_ubatch = max(sizes.step, sizes.batch)
        given.n_seq_max = sizes.batch
        given.n_threads = given.n_threads_batch = sizes.threads
        given.flash_attn_type = int(sizes.flash == "on")
        given.kv_unified = False
        self.context = model and llama_cpp.llama_init_from_model(model, given)
        if not self.context:
            raise RuntimeError("llama.cpp refuses the model; what it wrote above says why")
        self.batch = llama_cpp.llama_batch_init(given.n_batch, 0, 1)

    def describe(self) -> dict[str, Any]:
        system = llama_cpp.llama_print_system_info().decode()
        return {**vars(self.sizes), "version": llama_cpp.__version__, "system": system}

    def measure(self, batch: int, prompt: int, new: int) -> dict[str, float]:
        """`batch` random prompts of `prompt` tokens, asked at once, each continued greedily by `new` tokens."""
        if not (1 <= batch <= self.sizes.batch and prompt >= 1 and new >= 1):
            raise ValueError(f"batch {batch}, prompt {prompt}, new {new}: 1 to {self.sizes.batch}, 1 and 1 at least")
        if prompt + new > self.positions:
            raise ValueError(f"prompt {prompt} + new {new} is more than {self.positions}, the model's positions")
        prompts = self.draw.integers(1, self.vocabulary, (batch, prompt))
        started = time.monotonic()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), False)
        newest = self._read(prompts)
        first = time.monotonic() - started
        for position in range(prompt, prompt + new - 1):
            newest = self._step(newest, range(batch), [position] * batch, [True] * batch)
        elapsed = time.monotonic() - started
        return {
            "tokens_per_second": batch * new / elapsed,
            "first_token_s": first,
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }

    def _read(self, prompts: np.ndarray) -> np.ndarray:
        """Read prompts, as many whole ones in a step as go into it; each one's next token."""
        count, length = prompts.shape
        together = max(1, self.sizes.step // length)
        newest = []
        for some in range(0, count, together):
            rows = range(some, min(count, some + together))
            for start in range(0, length, self.sizes.step):
                end = min(length, start + self.sizes.step)
                positions = [*range(start, end)] * len(rows)
                last = [t == length - 1 for t in positions]
                owners = [row for row in rows for _ in range(start, end)]
                found = self._step(prompts[rows.start : rows.stop, start:end].reshape(-1), owners, positions, last)
            newest.append(found)
        return np.concatenate(newest)

    def _step(
        self, tokens: np.ndarray, sequences: Sequence[int], positions: Sequence[int], wanted: Sequence[bool]
    ) -> np.ndarray:
        """Compute tokens; the likeliest next one of those that are wanted."""
        batch, count = self.batch, len(tokens)
        batch.n_tokens = count
        for n in range(count):
            batch.token[n], batch.pos[n], batch.n_seq_id[n] = int(tokens[n]), positions[n], 1
            batch.seq_id[n][0], batch.logits[n] = sequences[n], wanted[n]
        if code := llama_cpp.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode returned {code}")
        rows = sum(wanted)
        if not rows:
            return np.empty(0, np.int64)
        logits = ctypes.cast(llama_cpp.llama_get_logits(self.context), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(logits, (rows, self.vocabulary)).argmax(1)


if __name__ == "__main__":
    sizes = arguments()
    serve(lambda: Peer(sizes))
