"""The peers beside us: absent, they say so; named wrongly, it is an error; there, they measure what was asked."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psutil
import pytest
from backpack_lm.config import SMALL, BackpackConfig

from tests.bench.peers import VLLM, LlamaCpp, Peer, transformer

TINY = BackpackConfig.gpt2(vocab_size=512, n_positions=128, n_embd=64, n_layer=2, n_head=2)
TINY_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "max_position_embeddings": 128,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
}
PEERS = pytest.mark.parametrize("kind", [VLLM, LlamaCpp], ids=lambda kind: kind.name)
DTYPES = {VLLM: "float32", LlamaCpp: "q8_0"}


def test_a_peer_gets_the_trunk_of_a_model_and_nothing_of_its_senses() -> None:
    given = transformer(SMALL)
    assert given["architectures"] == ["GPT2LMHeadModel"]
    assert (given["n_layer"], given["n_head"], given["n_embd"], given["vocab_size"]) == (12, 12, 768, 50264)
    assert not {"num_senses", "scale_attn_by_inverse_layer_idx"} & given.keys()


@PEERS
def test_a_peer_that_is_not_installed_is_left_out_aloud(
    kind: type[Peer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(kind.variable, raising=False)
    monkeypatch.setattr(kind, "environment", tmp_path)
    assert kind.start(TINY, DTYPES[kind], batch=2) is None
    assert f"make {kind.target}" in capsys.readouterr().err


@PEERS
def test_a_python_that_is_not_there_is_an_error(
    kind: type[Peer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(kind.variable, str(tmp_path / "python"))
    with pytest.raises(FileNotFoundError, match=kind.variable):
        kind.start(TINY, DTYPES[kind], batch=2)


@PEERS
def test_a_python_without_the_peer_says_what_went_wrong(kind: type[Peer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kind.variable, sys.executable)
    with pytest.raises(RuntimeError, match="No module named"):
        kind.start(TINY, DTYPES[kind], batch=2)


@pytest.mark.slow  # vLLM compiles for a minute
@pytest.mark.parametrize("config", [TINY, TINY_LLAMA], ids=["gpt2", "llama"])
@PEERS
def test_it_measures_refuses_and_rests(kind: type[Peer], config: dict[str, object]) -> None:
    if kind.python() is None:
        pytest.skip(f"make {kind.target}")
    peer = kind.start(config, DTYPES[kind], batch=2, threads=1)
    assert peer
    with peer:
        assert (peer.described["dtype"], peer.described["threads"]) == (DTYPES[kind], 1)
        one = peer.measure(batch=1, prompt=8, new=4)
        assert 0 < one["first_token_s"] < 4 / one["tokens_per_second"]
        with pytest.raises(ValueError, match="batch 3"):
            peer.measure(batch=3, prompt=8, new=4)
        with pytest.raises(ValueError, match="more than 128"):
            peer.measure(batch=2, prompt=120, new=9)
        assert peer.measure(batch=2, prompt=64, new=64)["tokens_per_second"] > 0
        process = psutil.Process(peer._process.pid)
        before = sum(process.cpu_times()[:2])
        time.sleep(3)
        assert sum(process.cpu_times()[:2]) - before < 0.1, "while it waits, it must leave the cores to us"
    assert not process.is_running()
