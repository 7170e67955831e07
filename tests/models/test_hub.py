"""Checkpoints of the hub, by its own client, from a server here that speaks as the hub does."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from backpack_lm.checkpoint import verify
from backpack_lm.config import BackpackConfig
from backpack_lm.installed import folder_of
from backpack_lm.model import Backpack
from safetensors.torch import save

from tests.commands import run_command

TOKENIZER = folder_of("micro") / "tokenizer.json"
COMMIT = "ab" * 20


class Hub:
    """Repositories by name: files by theirs. `damaged` files come with other bytes than are told, those of `gated`
    repositories not at all."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.damaged: set[str] = set()
        self.gated: set[str] = set()
        self.url = ""

    @contextmanager
    def serving(self) -> Iterator[None]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *what: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                status, headers, body = hub.answer(self.path.partition("?")[0])
                self.send_response(status)
                for name, text in {**headers, "content-length": str(len(body))}.items():
                    self.send_header(name, text)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            self.url = f"http://127.0.0.1:{server.server_port}"
            Thread(target=server.serve_forever, daemon=True).start()
            yield
            server.shutdown()

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        parts = path.strip("/").split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if (files := self.repositories.get(name)) is None:
            return 404, {"x-error-code": "RepoNotFound"}, b"{}"
        if parts[0] == "api" and "revision" in parts and parts[-1] not in ("main", COMMIT):
            return 404, {"x-error-code": "RevisionNotFound"}, b"{}"
        if parts[0] == "api":
            told = [_told(file, data) for file, data in files.items()]
            if "tree" in parts:
                tree = [{"type": "file", "path": each["rfilename"], "oid": each["blobId"], **each} for each in told]
                return 200, {"content-type": "application/json"}, json.dumps(tree).encode()
            answer = {"_id": "1", "id": name, "modelId": name, "sha": COMMIT, "siblings": told}
            return 200, {"content-type": "application/json"}, json.dumps(answer).encode()
        if name in self.gated:
            return 403, {"x-error-code": "GatedRepo"}, b"{}"
        data = files[parts[-1]]
        etag = hashlib.sha256(data).hexdigest()
        if parts[-1] in self.damaged:
            data = b"?" + data[1:]
        return 200, {"etag": f'"{etag}"', "x-repo-commit": COMMIT}, data


def _told(file: str, data: bytes) -> dict[str, object]:
    told: dict[str, object] = {"rfilename": file, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
    if file.endswith((".bin", ".safetensors")):
        digest = hashlib.sha256(data).hexdigest()
        told["lfs"] = {"sha256": digest, "oid": digest, "size": len(data), "pointerSize": 100}
    return told


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """As Stanford's lies there: a pickle, and no tokenizer."""
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    model = Backpack(BackpackConfig.gpt2(50264, 16, 8, n_layer=1, n_head=1, num_senses=2))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    config = json.dumps(model.config.to_json()).encode()
    return {"config.json": config, "pytorch_model.bin": (folder / "pytorch_model.bin").read_bytes(), "README.md": b"-"}


@pytest.fixture
def hub(checkpoint: dict[str, bytes]) -> Hub:
    hub = Hub()
    hub.repositories["o/backpack"] = checkpoint
    hub.repositories["openai-community/gpt2"] = {"tokenizer.json": TOKENIZER.read_bytes()}
    return hub


async def _backpack(hub: Hub, home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    where = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf"), "XDG_CACHE_HOME": str(home / "cache")}
    command = [sys.executable, "-m", "backpack_serving.cli.main", *words]
    return await run_command(*command, **where, HF_HUB_DISABLE_XET="1", NO_COLOR="1", no_proxy="127.0.0.1")


async def test_a_published_backpack_in_one_command(hub: Hub, tmp_path: Path) -> None:
    with hub.serving():
        done = await _backpack(hub, tmp_path, "model", "pull", "o/backpack")
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "cache" / "backpack" / "models").glob("[!.]*")
    assert folder.name == f"o--backpack-{COMMIT[:12]}"
    assert f"{folder}: fingerprint {verify(folder).fingerprint}" in done.stdout
    assert f"BACKPACK_MODEL={folder}" in done.stdout
    # What was fetched is there without the hub; nothing else is.
    again = await _backpack(hub, tmp_path, "model", "pull", "o/backpack", str(tmp_path / "again"))
    assert again.returncode == 0, again.stderr
    assert verify(tmp_path / "again") == verify(folder)
    other = await _backpack(hub, tmp_path, "model", "pull", "o/other")
    assert other.returncode == 1
    assert "the hub can't be reached (ConnectError), and o/other wasn't fetched before" in other.stderr


async def test_what_cant_be_fetched_is_told_with_the_fix(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["o/odd"] = {"config.json": b"{}", "pytorch_model.bin": b"0123456789"}
    hub.repositories["o/other-words"] = {"config.json": b'{"vocab_size": 300}', "model.safetensors": b"0123456789"}
    hub.repositories["o/gated"] = hub.repositories["o/backpack"]
    hub.gated.add("o/gated")
    hub.damaged.add("pytorch_model.bin")
    with hub.serving():
        for words, why in (
            (["no/such"], "the hub has no no/such, or it is private: check the name, or `hf auth login`"),
            (["no such!"], "'no such!' is no name on the hub; write it as in stanfordnlp/backpack-gpt2"),
            (["o/backpack", "--revision", "v9"], "o/backpack has no revision v9"),
            (["o/gated"], "access to o/gated is restricted: request it on the hub, then `hf auth login`"),
            (["o/other-words"], "has no tokenizer.json, and 300 tokens: not GPT-2's; give --tokenizer"),
            (["o/odd"], "pytorch_model.bin isn't what the hub says it is, and was removed; try again"),
        ):
            done = await _backpack(hub, tmp_path, "model", "pull", *words)
            assert done.returncode == 1
            assert why in done.stderr
            assert "Traceback" not in done.stderr


async def test_safetensors_are_taken_where_there_are_several_formats(hub: Hub, tmp_path: Path) -> None:
    """And of files only those beside the config."""
    files = dict(hub.repositories["o/backpack"])
    state = torch.load(io.BytesIO(files["pytorch_model.bin"]), weights_only=True)
    files |= {"model.safetensors": save(state), "optimizer.bin": b"x", "onnx": b"x"}
    hub.repositories["o/both"] = {**files, "pytorch_model.bin": b"nobody asks for it"}
    with hub.serving():
        done = await _backpack(hub, tmp_path, "model", "pull", "o/both", str(tmp_path / "model"))
    assert done.returncode == 0, done.stderr
    verify(tmp_path / "model")
    fetched = {file.name for file in (tmp_path / "hf" / "hub" / "models--o--both" / "snapshots" / COMMIT).iterdir()}
    assert fetched == {"config.json", "model.safetensors"}
