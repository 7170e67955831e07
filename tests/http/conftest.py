"""A server as a process of its own: everything in one, with a model that has a chat template."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from backpack_lm.installed import folder_of
from backpack_serving.client import Client, Copy, Operator, Steering
from backpack_serving.errors import Unauthenticated

from tests.conftest import free_port

PROMPT = "The story of the king and the"
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@dataclass(frozen=True)
class Web:
    """Addresses, and the keys of a tenant whose “king” has the senses of “ship”."""

    url: str
    gateway: str
    interventions: str
    metrics: str
    state: Path
    key: str
    caller_key: str
    process: subprocess.Popen[str]

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        sent = {
            "authorization": f"Bearer {self.key}",
            **{name.replace("_", "-"): text for name, text in headers.items()},
        }
        return httpx.post(self.url + path, json=body, headers=sent, timeout=60)

    def complete(self, **fields: Any) -> Any:
        """The answer to a completion."""
        answer = self.post("/v1/completions", {"model": "live", "prompt": PROMPT, "max_tokens": 8, "seed": 1, **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def refused(self, path: str = "/v1/completions", **fields: Any) -> tuple[int, str, str | None]:
        """Status, reason and field of a refusal."""
        answer = self.post(path, fields)
        error = answer.json()["error"]
        return answer.status_code, error["code"], error["param"]


def chat_model(folder: Path) -> Path:
    """The default model with a chat template."""
    folder.mkdir()
    for file in folder_of("micro").iterdir():
        if file.is_file() and file.name != "tokenizer_config.json":
            (folder / file.name).symlink_to(file)
    config = {"chat_template": TEMPLATE, "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@contextmanager
def serving(state: Path, **settings: str) -> Iterator[Web]:
    """`backpack run`, and a tenant."""
    parts = ("http", "gateway", "interventions", "metrics")
    ports = {part: f"127.0.0.1:{free_port()}" for part in parts}
    variables = {f"{part}_address": address for part, address in ports.items()}
    variables |= {"directory_address": "127.0.0.1:0", "state": str(state), "threads": "1", **settings}
    environment = {f"BACKPACK_{name.upper()}": value for name, value in variables.items()}
    with (state / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "backpack_serving.cli.main", "run", "--no-examples"],
            env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(sys.path), "NO_COLOR": "1"},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        assert process.stdout is not None
        while "Serving until" not in (line := process.stdout.readline()):
            assert line, (state / "log").read_text()
        admin = (state / "admin.key").read_text().strip()
        with Operator(ports["interventions"], admin) as operator:
            operator.create_tenant("harbour")
            key = operator.create_key("harbour", ["releaser", "caller"]).secret
            caller_key = operator.create_key("harbour", ["caller"]).secret
        with Steering(ports["interventions"], key) as steering:
            steering.create_patch("royal")
            release = steering.create_release([steering.create_revision("royal", [Copy("king", source="ship")])])
            move = steering.activate(release.number, wait="all")
        with Client(ports["gateway"], key) as client:
            while True:  # until the gateway knows of the keys
                try:
                    client.score(PROMPT, since=move.at)
                    break
                except Unauthenticated:
                    time.sleep(0.02)
        *_, metrics = ports.values()
        keys = key, caller_key
        yield Web(
            f"http://{ports['http']}", *list(ports.values())[1:3], f"http://{metrics}/metrics", state, *keys, process
        )
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    folder = tmp_path_factory.mktemp("http")
    with serving(folder, model=str(chat_model(folder / "model"))) as web:
        yield web
