"""A gateway as operators see it."""

from __future__ import annotations

import socket

import pytest
from backpack_serving.gateway import bootstrap


@pytest.mark.parametrize("address", ["0.0.0.0:8470", "[::]:8470"])
def test_gateways_that_listen_everywhere_are_told_apart_by_their_hosts(address: str) -> None:
    assert bootstrap._display_name(address) == f"{socket.gethostname()}:8470"
    assert bootstrap._display_name("127.0.0.1:8470") == "127.0.0.1:8470"
