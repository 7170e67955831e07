"""The peer beside us: absent, it says so; named wrongly, it is an error; there, it measures what was asked."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import psutil
import pytest
from backpack_lm.config import BackpackConfig

from tests.bench import peers
from tests.bench.peers import VLLM

TINY = BackpackConfig.gpt2(vocab_size=512, n_positions=128, n_embd=64, n_layer=2, n_head=2)


def test_without_vllm_it_is_left_out_aloud(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("BACKPACK_VLLM_PYTHON", raising=False)
    monkeypatch.setattr(peers, "ENVIRONMENT", tmp_path)
    assert VLLM.start(TINY, "float32", batch=2) is None
    assert "make vllm" in capsys.readouterr().err


def test_a_python_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BACKPACK_VLLM_PYTHON", str(tmp_path / "python"))
    with pytest.raises(FileNotFoundError, match="BACKPACK_VLLM_PYTHON"):
        VLLM.start(TINY, "float32", batch=2)


def test_a_python_without_vllm_says_what_went_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKPACK_VLLM_PYTHON", sys.executable)
    with pytest.raises(RuntimeError, match="No module named 'vllm'"):
        VLLM.start(TINY, "float32", batch=2)


@pytest.mark.slow  # vLLM compiles for a minute
@pytest.mark.skipif(
    not ("BACKPACK_VLLM_PYTHON" in os.environ or (peers.ENVIRONMENT / "bin/python").exists()), reason="make vllm"
)
def test_it_measures_refuses_and_rests() -> None:
    peer = VLLM.start(TINY, "float32", batch=2, threads=1)
    assert peer
    with peer:
        assert (peer.described["dtype"], peer.described["threads"]) == ("float32", 1)
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
