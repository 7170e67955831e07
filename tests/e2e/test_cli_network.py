"""What commands say of a network in which nobody answers."""

from __future__ import annotations

import re

import pytest
from backpack_serving.cli.main import app
from typer.testing import CliRunner

from tests.conftest import PROXY_VARIABLES


@pytest.fixture(autouse=True)
def _a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKPACK_KEY", "bp_x")


def _backpack(*words: str, code: int) -> str:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == code, result.output
    return result.output


def test_a_proxy_that_is_in_the_way_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, proxy in PROXY_VARIABLES.items():
        monkeypatch.setenv(name, proxy)
    monkeypatch.setenv("BACKPACK_GATEWAY_ADDRESS", "192.0.2.5:8470")
    output = _backpack("generate", "x", code=1)
    assert "through the proxy http://127.0.0.1:1 (grpc_proxy)" in output
    assert "add its host to no_proxy" in output
    assert "is the gateway" not in output


def test_a_window_that_was_chosen_is_told_and_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKPACK_GATEWAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("BACKPACK_RETRY_WINDOW", "2.5")
    first, last = _backpack("generate", "x", code=1).splitlines()
    assert re.fullmatch(r"no answer yet \(.*refused\); trying again for [12] s, Ctrl-C stops", first)
    assert "is the gateway at 127.0.0.1:1 running" in last


@pytest.mark.parametrize("seconds", ["nan", "inf", "1e12", "-1"])
def test_a_probe_waits_for_no_time_that_never_comes(seconds: str) -> None:
    assert "Invalid value for '--timeout'" in _backpack("health", "127.0.0.1:1", "--timeout", seconds, code=2)
