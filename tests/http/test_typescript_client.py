"""The TypeScript client: generated from these protos, and called from Node as another program would."""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from backpack_proto.v1 import directory_pb2, edits_pb2, inference_pb2, interventions_pb2, sync_pb2
from google.protobuf.descriptor_pb2 import FileDescriptorProto

from tests.http.conftest import Web

CLIENT = Path(__file__).parents[2] / "protos/typescript"
GENERATED = ("backpack_proto", "google")

PROGRAM = """
import { Code, connect, refusal } from "backpack-serving-client";

const backpack = connect({ url: process.env.URL, key: process.env.KEY });
const prompt = { form: { case: "text", value: "The story of the king and the" } };
const sampling = { maxTokens: 8, seed: 1n, temperature: 0 };
let text = "";
for await (const part of backpack.inference.generateStream({ prompt, sampling })) text += part.text;
const { text: whole, served } = await backpack.inference.generate({ prompt, sampling });
const refused = [];
for (const call of [
  () => backpack.inference.explain({ prompt, target: { text: "no word" } }),
  () => backpack.tenants.listTenants({}),
  () => connect({ url: process.env.URL, key: "bp_nobody" }).inference.getModel({}),
  () => connect({ url: "http://127.0.0.1:9", key: "bp_nobody" }).inference.getModel({}),
]) {
  try {
    await call();
  } catch (error) {
    const { code, reason, fields } = refusal(error);
    refused.push(`${Code[code]} ${reason} ${fields}`.trim());
  }
}
console.log(JSON.stringify({ same: text === whole, release: String(served.release), refused }));
"""


@pytest.mark.parametrize("module", [directory_pb2, edits_pb2, inference_pb2, interventions_pb2, sync_pb2])
def test_it_is_what_the_protos_generate(module: ModuleType) -> None:
    """Each generated file has the descriptor that Python's code has, too: `make typescript` writes it anew."""
    expected = FileDescriptorProto()
    module.DESCRIPTOR.CopyToProto(expected)
    file = CLIENT / expected.name.replace(".proto", "_pb.js")
    kept = re.search(r'fileDesc\("([\w+/]+)"', file.read_text())
    assert kept
    found = FileDescriptorProto.FromString(base64.b64decode(kept[1] + "=" * (-len(kept[1]) % 4)))
    for descriptor in (found, expected):
        del descriptor.dependency[:]  # imports in JavaScript
    assert found == expected, "run `make typescript` and `make studio`"


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("npm"), reason="needs npm")
def test_a_program_of_node_calls_it(web: Web, tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text('{"type": "module", "private": true}')
    (tmp_path / "program.mjs").write_text(PROGRAM)
    install = ["npm", "install", "--no-audit", "--no-fund", "--install-links", str(CLIENT)]
    subprocess.run(install, cwd=tmp_path, check=True, capture_output=True, timeout=300)
    environment = {**os.environ, "URL": web.url, "KEY": web.key}
    done = subprocess.run(
        ["node", "program.mjs"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (
        '{"same":true,"release":"1","refused":["InvalidArgument NOT_ONE_TOKEN target","PermissionDenied MISSING_ROLE",'
        '"Unauthenticated MALFORMED_KEY","Unknown"]}'
    )


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("npm"), reason="needs npm")
def test_building_it_again_gives_the_same_files(tmp_path: Path) -> None:
    room = tmp_path / "protos/typescript"
    shutil.copytree(CLIENT, room, ignore=shutil.ignore_patterns("node_modules"))
    (tmp_path / "protos/backpack_proto").symlink_to(CLIENT.parent / "backpack_proto")
    environment = {**os.environ, "PYTHON": sys.executable}
    for command in ("npm ci --no-audit --no-fund", "npm run build"):
        subprocess.run(command.split(), cwd=room, env=environment, check=True, capture_output=True, timeout=300)
    for name in ("index.js", "index.d.ts", *(f"{folder}/" for folder in GENERATED)):
        files = [CLIENT / name] if not name.endswith("/") else sorted((CLIENT / name).rglob("*_pb.*"))
        for file in files:
            assert (room / file.relative_to(CLIENT)).read_text() == file.read_text(), "run `make typescript`"
