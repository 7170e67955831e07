"""What commands say may be done next works as it is printed; what they print for others goes nowhere else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from backpack_lm.counted import counted
from backpack_serving.cli import hints
from backpack_serving.cli.main import app
from typer.testing import CliRunner

from tests.conftest import free_port
from tests.e2e.starts import read_until_served

PATHS = {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": "/usr/bin:/bin", "NO_COLOR": "1"}


@pytest.fixture(scope="module")
def running(tmp_path_factory: Any) -> Iterator[dict[str, str]]:
    """`backpack run` on ports and in a folder of its own: its variables, and what it has shown."""
    folder = tmp_path_factory.mktemp("here")
    variables = {
        "BACKPACK_STATE": "state",
        "BACKPACK_GATEWAY_ADDRESS": f"127.0.0.1:{free_port()}",
        "BACKPACK_INTERVENTIONS_ADDRESS": f"127.0.0.1:{free_port()}",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "backpack_serving.cli.main", "run"],
        cwd=folder,
        env={**os.environ, **PATHS, **variables, "BACKPACK_DIRECTORY_ADDRESS": "127.0.0.1:0"},
        stdout=subprocess.PIPE,
        text=True,
    )
    yield {**variables, "SHOWN": read_until_served(process), "FOLDER": str(folder)}
    process.terminate()
    process.stdout.read()
    assert process.wait(40) == 0
    process.stdout.close()


def test_the_commands_that_run_prints_run_in_a_bare_shell(running: dict[str, str]) -> None:
    """In another terminal, which has none of the variables, and no `backpack` on its PATH."""
    told = running["SHOWN"].split("From the command line")[1].split("From Python")[0]
    commands = re.findall(r"^    (.+)$", told.replace("\\\n", ""), re.M)
    assert len(commands) == 4
    for command in commands:
        done = subprocess.run(
            ["/bin/sh", "-c", command],
            cwd=running["FOLDER"],
            env=PATHS,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, (command, done.stderr)


@pytest.fixture
def backpack(running: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(running["FOLDER"])
    for name in ("BACKPACK_STATE", "BACKPACK_GATEWAY_ADDRESS", "BACKPACK_INTERVENTIONS_ADDRESS"):
        monkeypatch.setenv(name, running[name])

    def call(*words: str, code: int = 0) -> Any:
        result = CliRunner().invoke(app, list(words))
        assert result.exit_code == code, result.output
        return result

    return call


def test_a_tenants_key_is_printed_alone_and_kept_nowhere(backpack: Any) -> None:
    before = sorted(Path("state").glob("*.key"))
    made = backpack("tenant", "create", "podded", "--print-key")
    assert re.fullmatch(r"bp_[0-9a-f]{12}_[0-9a-f]{64}_[0-9a-f]{8}\n", made.stdout)
    assert "tenants/podded" in made.stderr
    assert sorted(Path("state").glob("*.key")) == before
    assert "podded/live, release 0" in backpack("score", "The king", "--key", made.stdout.strip()).stderr


def test_a_count_has_its_noun(backpack: Any) -> None:
    assert (counted(1, "release"), counted(0, "release"), counted(2, "entry", "entries")) == (
        "1 release",
        "0 releases",
        "2 entries",
    )
    assert "1 release of harbour\n" in backpack("compare", "The king", "--release", "live").stderr
    assert "2 releases of harbour\n" in backpack("compare", "The king", "--as", "harbour").stderr
    assert " + 1 token; " in backpack("generate", "The king", "--max-tokens", "1").stderr
    assert " + 2 tokens; " in backpack("generate", "The king", "--max-tokens", "2", "--seed", "1").stderr


def test_a_missing_key_says_where_it_was_looked_for(
    backpack: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Outside of the checkout, the way isn't to make tenants anew."""
    here = Path.cwd()
    refused = backpack("generate", "x", "--as", "nobody", code=1).stderr
    assert f"{here}/state/nobody.key doesn't exist" in refused
    assert "--as (clinic, harbour, " in refused or "--as (clinic, harbour)" in refused
    assert "log in, which keeps a key for every folder: backpack login" in refused
    assert "tenant create" not in refused
    monkeypatch.chdir(tmp_path)
    refused = backpack("generate", "x", code=1).stderr
    assert f"{tmp_path}/state/harbour.key doesn't exist; BACKPACK_STATE is state, where no keys are" in refused
    assert "tenant create" not in refused
    monkeypatch.delenv("BACKPACK_STATE")
    refused = backpack("release", "list", code=1).stderr
    assert f"{tmp_path}/var/harbour.key doesn't exist; BACKPACK_STATE isn't set, so it is var of this" in refused
    assert (
        "set BACKPACK_STATE to the state folder that it named, give a key: BACKPACK_KEY or --key; or log in" in refused
    )
    assert "in its state folder (BACKPACK_STATE)" in backpack("fleet", code=1).stderr


@pytest.fixture
def elsewhere(backpack: Any, running: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`backpack`, in another folder and with nothing in the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("backpack_serving.cli.client.out._width", 400)  # paths of tests are long
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("BACKPACK_RETRY_WINDOW", "0")
    for name in ("BACKPACK_STATE", "BACKPACK_GATEWAY_ADDRESS", "BACKPACK_INTERVENTIONS_ADDRESS"):
        monkeypatch.delenv(name)

    def call(*words: str, code: int = 0, said: str = "") -> Any:
        result = CliRunner().invoke(app, list(words), input=said)
        assert result.exit_code == code, result.output
        assert "bp_" not in result.output
        return result

    return call


def test_commands_in_any_folder_go_by_the_context_that_a_login_made(elsewhere: Any, running: dict[str, str]) -> None:
    state = Path(running["FOLDER"]) / "state"
    servers = ("--gateway", running["BACKPACK_GATEWAY_ADDRESS"], "--interventions")
    servers = (*servers, running["BACKPACK_INTERVENTIONS_ADDRESS"])
    harbour = (state / "harbour.key").read_text()
    assert "context harbour of the tenant harbour" in elsewhere("login", *servers, said=harbour).stdout
    assert "harbour/live, release" in elsewhere("score", "The king").stderr
    made = elsewhere("patch", "scale", "p", "king", "--factor", "0.5")
    assert made.stderr.startswith("as harbour, by the context harbour\n")
    assert elsewhere("login", "other", *servers, "--key-file", str(state / "clinic.key")).exit_code == 0
    assert "clinic/live, release" in elsewhere("score", "The king").stderr
    named = elsewhere("patch", "scale", "p", "queen", "--factor", "0.5", "--context", "harbour")
    assert "as harbour, by the context harbour" in named.stderr
    assert "release create p:2 --context harbour" in named.stdout, "run as it stands, it goes to the same"
    refused = elsewhere("score", "The king", "--context", "harbour", "--as", "clinic", code=1)
    assert "context harbour is of the tenant harbour, and --as (or BACKPACK_TENANT) names clinic" in refused.stderr
    assert "nobody.key doesn't exist" in elsewhere("score", "The king", "--as", "nobody", code=1).stderr

    assert "this needs the admin key" in elsewhere("fleet", "--context", "other", code=1).stderr
    assert elsewhere("login", "ops", *servers, "--key-file", str(state / "admin.key")).exit_code == 0
    assert "tenants/harbour" in elsewhere("tenant", "list").stdout
    assert "harbour.key doesn't exist" in elsewhere("score", "The king", code=1).stderr, (
        "an operator's key calls nobody"
    )
    rows = [line.split() for line in elsewhere("context", "list").stdout.splitlines()[1:]]
    assert [row[:2] for row in rows] == [["harbour", "harbour"], ["other", "clinic"], ["*", "ops"]]
    assert "key: kept here, not shown" in elsewhere("context", "show", "harbour").stdout
    assert "harbour at" in elsewhere("context", "use", "harbour").stdout
    assert "no context is the current one now" in elsewhere("context", "remove", "harbour").stdout
    assert "harbour.key doesn't exist" in elsewhere("score", "The king", code=1).stderr


def test_a_login_that_nothing_comes_of_keeps_nothing(
    elsewhere: Any, running: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gateway, store = running["BACKPACK_GATEWAY_ADDRESS"], running["BACKPACK_INTERVENTIONS_ADDRESS"]
    key = (Path(running["FOLDER"]) / "state" / "harbour.key").read_text()
    for words, said, says in (
        (("x", "--gateway", gateway), "bp_no", f"the gateway at {gateway} doesn't take this key"),
        (("x", "--gateway", gateway), "", "no key: give --key-file FILE, or the key on a line"),
        (("x", "--gateway", "nonsense"), key, "--gateway nonsense: write host:port"),
        (("Bad!", "--gateway", gateway), key, "a context's name is 1 to 63 of a-z"),
        (("x", "--gateway", "127.0.0.1:9", "--interventions", "127.0.0.1:9"), key, "nothing is kept"),
    ):
        assert says in " ".join(elsewhere("login", *words, code=1, said=said).stderr.split())
    assert not (tmp_path / "config").exists()
    half = elsewhere("login", "half", "--gateway", gateway, "--interventions", "127.0.0.1:9", said=key)
    assert "the intervention service at 127.0.0.1:9 can't be asked" in half.stderr
    refused = elsewhere("release", "list", code=1).stderr
    assert "contexts.json says so of the context half" in refused
    assert "`backpack context list` has others, `backpack login half` changes it" in refused
    monkeypatch.setenv("BACKPACK_INTERVENTIONS_ADDRESS", store)
    assert "context half" in elsewhere("login", "half", said=key).stdout, "the gateway is the one that it was"
    monkeypatch.delenv("BACKPACK_INTERVENTIONS_ADDRESS")
    assert "release" in elsewhere("release", "list").stdout


def test_a_hint_names_the_program_as_the_shell_finds_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "my env" / "bin" / "backpack"
    script.parent.mkdir(parents=True)
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.chdir(tmp_path)
    assert hints.backpack("run") == "'my env/bin/backpack' run"
    monkeypatch.chdir(script.parent)
    assert hints.backpack("run") == "./backpack run"
    monkeypatch.chdir("/usr")
    assert hints.backpack("run") == f"'{script}' run"
    monkeypatch.setenv("PATH", f"{script.parent}:/usr/bin")
    assert hints.backpack("run") == "backpack run"
    monkeypatch.setattr(sys, "argv", ["/x/main.py"])
    assert hints.backpack("run") == f"{sys.executable} -m backpack_serving.cli.main run"
