"""What an operator may choose: what can't be is told in one line, by the variable that people set."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from backpack_serving.cli.main import app
from backpack_serving.settings import Settings
from typer.testing import CliRunner


@pytest.fixture
def backpack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("BACKPACK_STATE", str(tmp_path))

    def call(*words: str, code: int = 0) -> str:
        result = CliRunner().invoke(app, list(words))
        assert result.exit_code == code, result.output
        return result.output

    return call


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        (
            "certificates",
            '{"a":',
            '={"a":: no JSON (Expecting value: line 1 column 6 (char 5)); write it as in {"',
        ),
        (
            "serve_expired",
            "acme",
            '=acme: no JSON (Expecting value: line 1 column 1 (char 0)); write it as in ["acme"]',
        ),
        ("drain", "inf", "=inf: Input should be a finite number (Seconds that calls in progress may go on"),
        ("connection_age", "1e12", "=1e12: Input should be less than or equal to 2000000"),
        ("catch_up", "1e300", "=1e300: Input should be less than or equal to 86400"),
        ("expired_after", "1e300", "=1e300: Input should be less than or equal to 10000000000"),
        ("stale_after", "nan", "=nan: Input should be a finite number"),
        ("start_wait", "-1", "=-1: Input should be greater than or equal to 0"),
        ("slots", "9" * 20, f"={'9' * 20}: Input should be less than or equal to 2147483648"),
        ("step_tokens", "1000000000", "=1000000000: Input should be less than or equal to 1000000"),
        ("gateway_address", "h:\u0665\u0660", "=h:\u0665\u0660: write host:port"),
        ("database", "postgresql://me@host:65536/n", "=postgresql://me@host:65536/n: write sqlite:///"),
        ("metrics_address", "9100", "=9100: write host:port, as in 127.0.0.1:8470"),
        ("gateway_address", "localhost:99999", "=localhost:99999: write host:port"),
        ("interventions_address", "::1:8471", "=::1:8471: write host:port, as in 127.0.0.1:8470 or [::]:8470"),
        ("log_level", "loud", "=loud: String should match"),
        ("otel_endpoint", "collector:4317", "=collector:4317: String should match"),
        ("force_model", "newest", "=newest: String should match"),
        ("database", "mysql://me:secret@host/name", "=mysql://me:***@host/name: write sqlite:///PATH or"),
        ("database", "postgresql://me:a@secret@host/name", "=postgresql://me:***@host/name: write sqlite:///"),
        ("database", "postgresql://me@host:port/n?password=secret", "=postgresql://me@host:port/n?password=***: "),
        ("database", "host=h password=a&secret dbname=n", "=host=h password=***"),
        ("database", "host=h password = 'a secret' dbname=n", "=host=h password = *** dbname=n: "),
    ],
)
def test_a_setting_that_no_process_could_use_is_one_line(
    backpack: Any, monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str
) -> None:
    monkeypatch.setenv(f"BACKPACK_{name.upper()}", value)
    for words in (("settings",), ("serve", "interventions")):
        output = backpack(*words, code=1)
        assert output.startswith(f"error: BACKPACK_{name.upper()}{says}")
        assert output.count("\n") == 1
        assert "secret" not in output


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:////srv/x.db",
        "postgresql://me@host/name",
        "postgresql:///name?host=/run/postgresql",
        "postgresql+psycopg://me:a%40b/c@[::1]:5432/name?sslmode=require",
    ],
)
def test_a_database_that_can_be_used_is_no_mistake(url: str) -> None:
    assert Settings(database=url).database == url
    assert Settings(database=f"{url}\n").database == url, "of a Secret made from a file that was edited"


@pytest.mark.parametrize(
    ("name", "file", "says"),
    [
        ("limits_file", "none", "BACKPACK_LIMITS_FILE=none: No such file"),
        ("tls_ca", "none", "none has no authorities: [Errno 2] No such file"),
        ("tls_client_ca", "none", "BACKPACK_TLS_CLIENT_CA needs BACKPACK_TLS_CERTIFICATE"),
        ("jwt_issuer", "https://issuer.example", "BACKPACK_JWT_AUDIENCE isn't set"),
        ("model", "/", "/ has no manifest.json"),
    ],
)
def test_settings_looks_at_files_that_are_named(
    backpack: Any, monkeypatch: pytest.MonkeyPatch, name: str, file: str, says: str
) -> None:
    monkeypatch.setenv(f"BACKPACK_{name.upper()}", file)
    output = backpack("settings", code=1)
    assert "BACKPACK_GATEWAY_ADDRESS" in output
    assert says in output.splitlines()[-1]


def test_settings_names_variables_that_nothing_reads(
    backpack: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("SLOT", "KEY", "LIMITS_TOKENS"):
        monkeypatch.setenv(f"BACKPACK_{name}", "8")
    monkeypatch.chdir(tmp_path)
    Path(".env").write_text("BACKPACK_QUEUE=8\nbackpack_queues=8\nANOTHER=8\n")
    *_, said = backpack("settings").splitlines()
    wrong = "BACKPACK_LIMITS_TOKENS, BACKPACK_QUEUES, BACKPACK_SLOT"
    assert said == f"nothing reads {wrong}: there is no such setting"


def test_lines_that_are_no_text_are_told_with_their_file(
    backpack: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(".env").write_bytes("# caf\u00e9\n".encode("latin-1"))
    (said,) = backpack("settings", code=1).splitlines()
    assert said.startswith(f"error: {tmp_path}/.env ")


def test_a_file_that_is_named_by_nothing_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKPACK_TLS_CERTIFICATE", "")
    monkeypatch.setenv("BACKPACK_LIMITS_FILE", "")
    assert (Settings().tls_certificate, Settings().limits_file) == (None, None)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        (
            "METRICS_ADDRESS",
            "203.0.113.5:9100",
            "can't serve metrics on 203.0.113.5:9100 (BACKPACK_METRICS_ADDRESS)",
        ),
        ("ADMIN_KEY", "bp_secret", "BACKPACK_ADMIN_KEY: not an API key of ours"),
    ],
)
def test_what_is_wrong_only_here_is_one_line_and_nothing_after_it(
    tmp_path: Path, name: str, value: str, says: str
) -> None:
    """A server that was up already left two tracebacks of its own behind the error."""
    done = _serve("interventions", tmp_path, **{name: value})
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {says}")
    assert "bp_secret" not in line


def test_a_gateway_whose_port_is_taken_says_no_more_than_that(tmp_path: Path) -> None:
    """It warned of coroutines that nobody had awaited."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = _serve("gateway", tmp_path, SERVICE_KEY="k", GATEWAY_ADDRESS=address)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: can't listen on {address}: is another server there")
    assert "(Address already in use)" in line


@pytest.mark.parametrize(("name", "value"), [("SLOTS", 10**9), ("CACHE_TOKENS", 10**12), ("OVERLAY_ROWS", 10**13)])
def test_a_replica_for_which_there_is_no_memory_names_what_to_lower(tmp_path: Path, name: str, value: int) -> None:
    where = {"SERVICE_KEY": "k", "INFERENCE_ADDRESS": "127.0.0.1:0", "DIRECTORY_ADDRESS": "127.0.0.1:0"}
    done = _serve("inference", tmp_path, **where, **{name: str(value)})
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: no memory for BACKPACK_SLOTS=")
    assert f"BACKPACK_{name}={value}" in line


def _serve(part: str, state: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """A process that ends by itself, because its settings are no good here."""
    where = {"STATE": str(state), "INTERVENTIONS_ADDRESS": "127.0.0.1:0", **settings}
    variables = {f"BACKPACK_{name}": value for name, value in where.items()}
    return subprocess.run(
        [sys.executable, "-m", "backpack_serving.cli.main", "serve", part],
        env={**os.environ, **variables, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_pipe_gets_a_line_for_each_setting_in_whatever_encoding(tmp_path: Path, encoding: str) -> None:
    state, env = str(tmp_path / ("long" * 30)), {**os.environ}
    env.pop("COLUMNS", None)
    done = subprocess.run(
        [sys.executable, "-m", "backpack_serving.cli.main", "settings"],
        env=env | {"PYTHONIOENCODING": encoding, "BACKPACK_STATE": state, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        encoding=encoding,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 1 + len(Settings.model_fields)
    assert state in lines[1]


def test_a_disk_that_is_full_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "backpack_serving.cli.main", "settings"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "error: what this command says can't be written: No space left on device\n"
