"""What is wrong with a start is told before torch is loaded, in one line of ours."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from backpack_lm.installed import folder_of
from backpack_serving.rpc.listening import check
from backpack_serving.settings import Settings

from tests.conftest import free_port


@pytest.fixture
def without_torch(tmp_path: Path) -> Path:
    """A folder of modules in which loading torch is the end."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "torch.py").write_text("import os\nos.write(2, b'torch was loaded')\nos._exit(3)\n")
    return folder


@pytest.fixture
def taken() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def _refused(modules: Path, words: str, **variables: str) -> str:
    """The only line of a start that fails."""
    where = {
        "BACKPACK_STATE": str(modules.parent / "state"),
        "BACKPACK_SERVICE_KEY": "k",
        **{f"BACKPACK_{part}_ADDRESS": "127.0.0.1:0" for part in ("GATEWAY", "INTERVENTIONS", "DIRECTORY")},
        **variables,
    }
    done = subprocess.run(
        [sys.executable, "-m", "backpack_serving.cli.main", *words.split()],
        env={**os.environ, **where, "PYTHONPATH": os.pathsep.join([str(modules), *sys.path])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize("words", ["run", "serve inference", "serve gateway"])
def test_a_model_that_is_not_there(without_torch: Path, words: str) -> None:
    line = _refused(without_torch, words, BACKPACK_MODEL="/nowhere")
    assert line.startswith("error: /nowhere has no manifest.json")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("run", "GATEWAY"),
        ("serve gateway", "GATEWAY"),
        ("serve inference", "INFERENCE"),
        ("serve interventions", "INTERVENTIONS"),
    ],
)
def test_a_port_that_is_taken(without_torch: Path, taken: str, words: str, part: str) -> None:
    line = _refused(without_torch, words, **{f"BACKPACK_{part}_ADDRESS": taken})
    assert line.startswith(f"error: can't listen on {taken}: ")
    assert "(Address already in use)" in line


def test_a_gateway_without_its_file_of_limits(without_torch: Path) -> None:
    line = _refused(without_torch, "serve gateway", BACKPACK_LIMITS_FILE="/nowhere")
    assert line == "error: BACKPACK_LIMITS_FILE=/nowhere: No such file or directory"


def test_several_processes_of_one_gateway(without_torch: Path) -> None:
    line = _refused(without_torch, "serve gateway", BACKPACK_GATEWAY_PROCESSES="2")
    assert line.startswith("error: BACKPACK_GATEWAY_PROCESSES=2: ")
    assert "start more gateways (each has limits of its own) behind a TCP load balancer" in line


def test_a_database_that_another_has(without_torch: Path, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    with (tmp_path / "state" / "interventions.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        line = _refused(without_torch, "run")
    assert line.startswith("error: LOCKED: another service is using ")


@pytest.mark.parametrize(("name", "value"), [("OMP_NUM_THREADS", "0"), ("MKL_NUM_THREADS", "many")])
def test_threads_that_are_no_number(without_torch: Path, name: str, value: str) -> None:
    words = "run" if name == "OMP_NUM_THREADS" else "serve inference"
    line = _refused(without_torch, words, **{name: value})
    assert line == f"error: {name}={value}: write a number of threads from 1 to 1024, or unset it"


@pytest.mark.parametrize("value", ["-1", "1025", "1e3", "1.5", "\u00b2", "4,", "4;2", "9" * 5000, " "])
def test_threads_that_are_none(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    with pytest.raises(ValueError, match="OMP_NUM_THREADS"):
        Settings.check_threads()
    for good in ("", "1", "1024", "4,2"):
        monkeypatch.setenv("OMP_NUM_THREADS", good)
        Settings.check_threads()


def test_what_an_address_lacks_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for host in ("127.0.0.1", "0.0.0.0", "localhost"):
            with pytest.raises(OSError, match=f"{host}:{port}: .*Address already in use"):
                check(f"{host}:{port}")
    with pytest.raises(OSError, match="Cannot assign requested address"):
        check("203.0.113.5:9100")
    with pytest.raises(OSError, match=r"no\.such\.invalid"):
        check("no.such.invalid:9100")
    for address in (f"127.0.0.1:{free_port()}", "127.0.0.1:0", "0.0.0.0:0", "[::]:0", "localhost:0"):
        check(address)


def test_a_socket_on_which_another_listens_is_not_taken_from_it(tmp_path: Path) -> None:
    """gRPC removes the file and makes its own."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        for address in (f"unix:{path}", f"unix://{path}"):
            with pytest.raises(OSError, match="Address already in use"):
                check(address)
    check(f"unix:{path}")  # nobody does any more


def test_the_folder_of_a_model_that_is_there_has_all_it_needs() -> None:
    from backpack_serving import starting

    assert starting.complete(folder_of("micro"), weights=True).fingerprint


def test_a_model_that_is_being_copied_is_no_mistake(tmp_path: Path) -> None:
    from backpack_serving import starting

    (tmp_path / "lost+found").mkdir()
    for name, lacks in (
        ("manifest.json", "is empty"),
        ("tokenizer.json", "no tokenizer.json"),
        ("topics.safetensors", "no config.json"),
        ("config.json", "no config.json"),
        ("model.safetensors", "no weights"),
    ):
        with pytest.raises(starting.ModelNotThere, match=lacks):
            starting.complete(tmp_path, weights=True)
        shutil.copy(folder_of("micro") / name, tmp_path)
    assert starting.complete(tmp_path, weights=True).fingerprint
