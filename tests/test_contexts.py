"""The file of contexts: who may read it, what it may hold, and when commands go by it."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from backpack_serving.cli.contexts import ContextFile, SavedContext, context_file, named_context
from backpack_serving.cli.main import app
from backpack_serving.cli.target import CallTarget
from backpack_serving.settings import Settings
from pydantic import SecretStr
from typer.testing import CliRunner

from tests.auth.test_tls import Authority

NORTH = SavedContext(gateway="a:1", interventions="a:2", tenant="north", key=SecretStr("bp_secret"))
OPS = SavedContext(gateway="b:1", interventions="b:2", tenant="system", key_file="/keys/admin.key", tls_ca="/ca.pem")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for name in ("STATE", "GATEWAY_ADDRESS", "INTERVENTIONS_ADDRESS", "KEY", "ADMIN_KEY", "CONTEXT_NAME"):
        monkeypatch.delenv(f"BACKPACK_{name}", raising=False)
    monkeypatch.chdir(tmp_path)  # without a .env
    return tmp_path


def test_what_is_kept_is_read_again_and_by_nobody_else(folder: Path) -> None:
    kept = ContextFile(current="ops", contexts={"north": NORTH, "ops": OPS})
    old = os.umask(0)
    try:
        kept.write()
    finally:
        os.umask(old)
    file = folder / "backpack" / "contexts.json"
    assert context_file() == file
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert list(file.parent.iterdir()) == [file]
    assert ContextFile.read() == kept
    assert ContextFile.read().contexts["north"].secret() == "bp_secret"
    assert "bp_secret" not in repr(kept)
    assert kept.contexts["ops"].tls.authorities == Path("/ca.pem")


def test_where_the_user_says_nothing_contexts_are_in_the_home_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "")
    monkeypatch.setenv("HOME", str(folder))
    assert context_file() == folder / ".config/backpack/contexts.json"
    assert ContextFile.read() == ContextFile()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ("{", "Invalid JSON"),
        ("[]", "Input should be an object"),
        ({"current": "north"}, "'north' is the current context, and there is none of that name"),
        ({"contexts": {"Bad!": {}}}, "a context's name is 1 to 63"),
        ({"contexts": {"x": {"key": "bp_secret", "gateway": "a", "interventions": "a:1", "tenant": "t"}}}, "host:port"),
        ({"contexts": {"x": {"key": ["bp_secret"], "gateway": "a:1"}}}, "contexts.x"),
        ({"contexts": {"x": {"keys": "bp_secret", "gateway": "a:1", "interventions": "a:1", "tenant": "t"}}}, "x.keys"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_without_its_keys(values: Any, says: str) -> None:
    context_file().parent.mkdir()
    context_file().write_text(values if isinstance(values, str) else json.dumps(values))
    with pytest.raises(ValueError, match="isn't a file of contexts") as refused:
        ContextFile.read()
    assert says in str(refused.value)
    assert "or remove it and `backpack login` again" in str(refused.value)
    assert "bp_secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("current", "named", "environment", "operator", "key_given", "chosen"),
    [
        ("north", "", {}, False, False, "north"),
        ("north", "", {}, True, False, None),
        ("ops", "", {}, True, False, "ops"),
        ("ops", "", {}, False, False, None),
        ("", "", {}, False, False, None),
        ("north", "", {"BACKPACK_STATE": "x"}, False, False, None),
        ("north", "", {"BACKPACK_GATEWAY_ADDRESS": "x:1"}, False, False, None),
        ("north", "", {"BACKPACK_SLOTS": "3"}, False, False, "north"),
        ("ops", "north", {"BACKPACK_STATE": "x"}, False, False, "north"),
        ("north", "", {}, False, True, None),
        ("ops", "", {}, True, True, None),
        ("ops", "north", {}, False, True, "north"),
    ],
)
def test_a_name_goes_before_the_environment_and_that_before_the_current_context(
    monkeypatch: pytest.MonkeyPatch,
    current: str,
    named: str,
    environment: dict[str, str],
    operator: bool,
    key_given: bool,
    chosen: str | None,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    contexts = ContextFile(current=current, contexts={"north": NORTH, "ops": OPS})
    found = contexts.chosen(named, Settings(), operator, key_given)
    assert (found[0] if found else None) == chosen


def test_a_name_that_isnt_there_is_told_with_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"no context 'x' in .*; there are north, ops; `backpack login x` makes it"):
        ContextFile(contexts={"north": NORTH, "ops": OPS}).named("x")


def test_a_key_whose_file_is_gone_says_which_file_that_was() -> None:
    with pytest.raises(ValueError, match=r"/keys/admin\.key has the context's key, and can't be read: No such file"):
        OPS.secret()


def test_a_key_that_is_given_does_not_go_to_the_current_contexts_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings()
    contexts = {"north": NORTH, "ops": OPS.model_copy(update={"key": SecretStr("bp_ops"), "key_file": ""})}
    ContextFile(current="north", contexts=contexts).write()
    target = CallTarget.of("", "")
    assert (target.gateway, target.key, target.context) == ("a:1", "bp_secret", "north")
    target = CallTarget.of("", "bp_given")
    assert (target.gateway, target.interventions) == (settings.gateway_address, settings.interventions_address)
    assert (target.key, target.context) == ("bp_given", "")

    ContextFile(current="ops", contexts=contexts).write()
    assert (CallTarget.of_operator().interventions, CallTarget.of_operator().key) == ("b:2", "bp_ops")
    given = "bp_" + "a" * 12 + "_" + "b" * 43
    monkeypatch.setenv("BACKPACK_ADMIN_KEY", given)
    target = CallTarget.of_operator()
    assert (target.interventions, target.key, target.source) == (
        settings.interventions_address,
        given,
        "BACKPACK_ADMIN_KEY",
    )
    assert target.tls == settings.tls
    token = named_context.set("ops")
    try:
        assert (CallTarget.of_operator().interventions, CallTarget.of_operator().key) == ("b:2", "bp_ops")
    finally:
        named_context.reset(token)


@pytest.mark.parametrize("words", [("generate", "x"), ("patch", "list"), ("patch", "delete", "p")])
def test_a_command_with_a_key_calls_no_server_of_the_current_context(
    monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.setenv("BACKPACK_RETRY_WINDOW", "0")
    with _listening() as (address, got):
        context = NORTH.model_copy(update={"gateway": address, "interventions": address})
        ContextFile(current="north", contexts={"north": context}).write()
        refused = CliRunner().invoke(app, [*words, "--key", "bp_given"])
        assert refused.exit_code == 1
        assert "north" not in refused.stderr
        assert not got
        CliRunner().invoke(app, [*words, "--key", "bp_given", "--context", "north"])
        assert got


@pytest.mark.parametrize("kept", ["--gateway", "--interventions", ""])
def test_another_login_keeps_tls_with_the_address(monkeypatch: pytest.MonkeyPatch, folder: Path, kept: str) -> None:
    """A context's address is called with the context's TLS: no byte of the new key goes in clear."""
    monkeypatch.setenv("BACKPACK_RETRY_WINDOW", "0")
    authority = Authority(folder, "servers")
    certificate, key = map(str, authority.issue())
    with _listening() as (address, got), _listening() as (other, _):
        ca = str(authority.file)
        before = SavedContext(
            gateway=address,
            interventions=address,
            tenant="north",
            tls_ca=ca,
            tls_name="backpack.internal",
            tls_certificate=certificate,
            tls_key=key,
        )
        ContextFile(contexts={"north": before}).write()
        moved = {"--gateway": ("--interventions", other), "--interventions": ("--gateway", other), "": ()}[kept]
        refused = CliRunner().invoke(app, ["login", "north", *moved], input="bp_new\n")
        assert "no server has said whose the key is; nothing is kept" in refused.stderr
    assert got
    assert all(data[:1] == b"\x16" for data in got), "a TLS handshake"  # the first byte of its records
    assert ContextFile.read().contexts["north"] == before


@contextmanager
def _listening() -> Iterator[tuple[str, list[bytes]]]:
    """A listener's address, and what each connection has sent it first; it answers nothing and hangs up."""
    got: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    if data := connection.recv(4096):
                        got.append(data)

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}", got
        server.shutdown(socket.SHUT_RDWR)  # wakes accept
        thread.join(10)
