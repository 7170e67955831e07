"""A start can be stopped, whatever it waits for; and it waits, and says so, for what may come yet."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from backpack_lm.installed import folder_of
from backpack_serving.auth.keys import ApiKeySecret, write_key_file

from tests.e2e.starts import AGES, silent, started
from tests.waiting import wait_until

INT, TERM = signal.SIGINT, signal.SIGTERM


@pytest.mark.parametrize(
    ("words", "number"),
    [(("serve", "interventions"), TERM), (("run",), INT)],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else value.name,
)
def test_a_start_with_a_database_that_hangs_is_stopped(
    tmp_path: Path, words: tuple[str, ...], number: signal.Signals
) -> None:
    with silent() as database, started(tmp_path, *words, DATABASE=f"postgresql://me@{database}/name") as start:
        start.until("waiting for the database")
        assert start.ends(number) == 128 + number, start.said
        assert f"stopped by {number.name} before it served" in start.said


def test_migrations_with_a_database_that_hangs_are_stopped(tmp_path: Path) -> None:
    url = "postgresql://me@{}/name"
    with silent() as database, started(tmp_path, "database", "migrate", DATABASE=url.format(database)) as start:
        start.until("waiting for the database")
        assert start.ends(INT) != 0, "nothing was migrated"


@pytest.fixture
def hanging(tmp_path: Path) -> Path:
    """A model folder on a disk that answers when asked for names, and never for the bytes of two files."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("manifest.json", "config.json"):
        shutil.copy(folder_of("micro") / name, folder)
    for name in ("tokenizer.json", "model.safetensors"):
        os.mkfifo(folder / name)
    return folder


def _opened(pipe: Path) -> int:
    """Wait until somebody reads from a pipe; who has it open for writing, so that the reader waits on."""

    def opened() -> int | None:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody reads
            return None

    found = wait_until(opened, f"a reader of {pipe}", AGES)
    assert found is not None
    return found


def test_a_replica_whose_model_never_loads_is_stopped(tmp_path: Path, hanging: Path) -> None:
    with (
        silent() as other,
        started(
            tmp_path / "state",
            *("serve", "inference"),
            MODEL=str(hanging),
            SERVICE_KEY="k",
            INTERVENTIONS_ADDRESS=other,
            DIRECTORY_ADDRESS=other,
        ) as start,
    ):
        read = _opened(hanging / "tokenizer.json")  # of which the fingerprint is made first
        assert start.ends(TERM) == 128 + TERM, start.said
        os.close(read)


def test_a_gateway_whose_tokenizer_never_loads_is_stopped(tmp_path: Path, hanging: Path) -> None:
    with started(tmp_path / "state", "serve", "gateway", MODEL=str(hanging), SERVICE_KEY="k") as start:
        read = _opened(hanging / "tokenizer.json")
        assert start.ends(TERM) == 128 + TERM, start.said
        os.close(read)


HOLDS = """
import asyncio, sys, time
from backpack_serving.cli import serve, stopping

stopping.UNDOING = float(sys.argv[1])

async def start(settings, metrics):
    try:
        print("starting", flush=True)
        await asyncio.sleep(1000)
    finally:
        print("undoing", flush=True)
        time.sleep(1000)

serve._serve("directory", start)
"""


@pytest.mark.parametrize(("undoing", "second"), [("0.1", None), ("1000", INT)])
def test_a_start_that_can_not_be_undone_ends_too(undoing: str, second: signal.Signals | None) -> None:
    """After a while by itself; at a second signal at once, though the loop stands still."""
    command = [sys.executable, "-c", HOLDS, undoing]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "starting\n"
            process.send_signal(TERM)
            assert process.stdout.readline() == "undoing\n"
            if second:
                process.send_signal(second)
            assert process.wait(AGES) == 128 + (second or TERM)
        finally:
            process.kill()


def test_a_gateway_waits_for_its_model_and_its_key_and_not_for_others(tmp_path: Path) -> None:
    """The volume of the model is filled, and the intervention service makes the key, while it starts."""
    model, state = tmp_path / "model", tmp_path / "state"
    model.mkdir()
    with (
        silent() as other,
        started(
            state,
            *("serve", "gateway"),
            MODEL=str(model),
            INTERVENTIONS_ADDRESS=other,
            DIRECTORY_ADDRESS=other,
        ) as start,
    ):
        start.until(f"{model} (BACKPACK_MODEL) is empty")
        shutil.copy(folder_of("micro") / "manifest.json", model)
        start.until("has a manifest.json and no tokenizer.json")
        shutil.copy(folder_of("micro") / "tokenizer.json", model)
        start.until("no replica key: ")
        write_key_file(str(ApiKeySecret.mint()), state / "replica.key")
        start.until("gateway serves on")
        assert start.ends(TERM) == 0, "it served: this was no start any more"


def test_who_waits_gives_up_in_time(tmp_path: Path) -> None:
    with silent() as database:
        url = f"postgresql://me@{database}/name"
        with started(tmp_path, "serve", "interventions", DATABASE=url, START_WAIT="1.5") as start:
            assert start.ends() == 1
            assert start.said.splitlines()[-1].startswith(
                "error: NOT_READY: the database: no answer yet after 1.5 s; BACKPACK_START_WAIT sets how long"
            )


def test_a_server_without_stderr_serves_and_gives_its_number_to_nothing_else(tmp_path: Path) -> None:
    said = tmp_path / "said"
    settings = {"BACKPACK_STATE": str(tmp_path), "BACKPACK_INTERVENTIONS_ADDRESS": "127.0.0.1:0"}
    command = ["sh", "-c", f'exec "$@" >{said} 2>&-', "sh", sys.executable, "-u", "-m"]
    process = subprocess.Popen(
        [*command, "backpack_serving.cli.main", "serve", "interventions"],
        env={**os.environ, **settings, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:

        def serves() -> bool:
            assert process.poll() is None, f"it ended with {process.returncode}"
            return said.exists() and "serves on" in said.read_text()

        wait_until(serves, "a server", AGES)
        assert Path(f"/proc/{process.pid}/fd/2").readlink() == Path(os.devnull)
        process.send_signal(TERM)
        assert process.wait(AGES) == 0
    finally:
        process.kill()
        process.wait()
