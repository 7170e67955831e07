"""The studio as people use it: services/studio/e2e in headless Chromium, before a server of its own."""

from __future__ import annotations

import ast
import base64
import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from backpack_lm.edits import Vector
from backpack_proto.v1 import edits_pb2
from backpack_serving.cli.edit_text import parse_edit
from backpack_serving.cli.main import app
from backpack_serving.wire.edit_json import parse_edit_json
from typer.testing import CliRunner

from tests.http.conftest import Web, serving

STUDIO = Path(__file__).parents[2] / "services/studio"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

WRITES = ("steer", "release activate", "release rollback", "canary", "tenant create", "tenant suspend")
"""Commands among the recipes that change what others of them show."""

LINES = (
    "scale nurse,doctor:3,8-10 -0.5",
    "copy king:2 ship:5",
    """scale 'don'"'"'t' 0""",
    """scale "don't" 0""",
    r"scale don\'t 0",
    """swap 'Bias(' "Import(" 'a b'""",
    r"""scale "a \"b\" \c" 1""",
    "scale , 0",
    "scale ,:3 0",
    "scale ':' 0",
    "scale king,#11:3 0",
    "copy king #11:2",
    "swap nurse #11 he",
    "project-out nurse 'she'",
    "topic sea,ship 2",
    "bias money,cash -5",
    "forbid '#11,#'",
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="needs Chromium"),
    pytest.mark.skipif(not (STUDIO / "node_modules").exists(), reason="needs what `make studio` installs"),
]


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    state = tmp_path_factory.mktemp("studio")
    with serving(state, model="micro", degradation="0.05") as web:
        (state / "harbour.key").write_text(web.key)
        yield web


def story(web: Web, name: str, **more: str) -> None:
    """Run the tests of one file of e2e."""
    environment = {
        "CHROMIUM": str(CHROMIUM),
        "STUDIO_URL": web.url,
        "STUDIO_KEY": web.key,
        "STUDIO_CALLER_KEY": web.caller_key,
        "STUDIO_ADMIN_KEY": (web.state / "admin.key").read_text().strip(),
        **more,
    }
    command = ["node", "--test", "--test-timeout=600000", f"e2e/{name}.test.mjs"]
    done = subprocess.run(
        command, cwd=STUDIO, env={**os.environ, **environment}, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_sense_is_found_edited_released_and_rolled_back_by_keyboard(studio: Web) -> None:
    story(studio, "keyboard")


def test_a_release_that_makes_text_worse_moves_no_channel_unasked(studio: Web) -> None:
    story(studio, "degraded")


def test_an_edit_is_read_as_commands_read_it(studio: Web, tmp_path: Path) -> None:
    """Each line, by the studio and by `backpack try`: what the studio's Python makes is the same message."""
    vector = Vector.of([0.25, -1.5, 1e-7]), struct.pack("<3e", 0.5, -2.0, 6e-8)
    cells = [{"word": {"text": "king", "form": "WORD_FORM_INITIAL", "anyCase": True}, "senses": [3]}]
    inner = {"text": "king", "form": "WORD_FORM_INNER"}
    in_json: list[Any] = [
        {"add": {"cells": cells, "delta": _packed(vector[0], "FLOAT32")}},
        {"set": {"cells": cells, "vector": _packed(vector[1], "FLOAT16")}},
        {"topic": {"words": [{"text": "sea"}], "strength": 2, "constant": True}},
        {"scale": {"cells": [{"word": {**inner, "policy": "WORD_POLICY_LAST_TOKEN"}}], "factor": 0.5}},
    ]
    recipes = tmp_path / "recipes.json"
    story(studio, "lines", STUDIO_LINES=json.dumps([*LINES, *map(json.dumps, in_json)]), STUDIO_RECIPES=str(recipes))
    made: dict[str, str] = json.loads(recipes.read_text())
    for line, text in made.items():
        program = ast.parse(text)
        (draft,) = (node.value for node in program.body if isinstance(node, ast.Assign))
        imports = compile(ast.Module(program.body[:1], []), "recipe", "exec")
        exec(imports, names := {})
        (edit,) = eval(compile(ast.Expression(draft), "recipe", "eval"), names)
        if line in LINES:
            assert edit.message() == parse_edit(line).message(), line
            continue
        expected = parse_edit_json(json.loads(line))
        for given in (expected.add.delta, expected.set.vector):
            if given.dtype == edits_pb2.DATA_TYPE_FLOAT16:  # the client sends float32
                given.data, given.dtype = Vector.of(struct.unpack("<3e", given.data)), edits_pb2.DATA_TYPE_FLOAT32
        assert edit.message() == expected, line


def _packed(data: bytes, kind: str) -> dict[str, Any]:
    return {"data": base64.b64encode(data).decode(), "dtype": f"DATA_TYPE_{kind}", "shape": [3]}


def test_what_tenants_and_addresses_say_is_text(studio: Web, tmp_path: Path) -> None:
    """No address gets a command of its own into a recipe: bash runs `backpack` alone, and Python reads no `ran`."""
    recipes = tmp_path / "recipes.json"
    story(studio, "safety", STUDIO_RECIPES=str(recipes))
    shown: Any = json.loads(recipes.read_text())
    for text in shown["shell"]:
        assert not re.search(r"[^\n\t -~]", text), f"a terminal obeys control characters: {text!r}"
        program = 'set -e; backpack() { :; }; ran() { echo "$FUNCNAME"; }\n' + re.sub(
            r"^\$ (?=backpack )", "", text, flags=re.M
        )
        done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), text
    for text in shown["python"]:
        names = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
        assert "ran" not in names, text


def test_each_room_is_accessible_and_its_recipes_run(
    studio: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """axe finds nothing in any room, in both themes; and what a room says to do elsewhere can be done there."""
    recipes = tmp_path / "recipes.json"
    story(studio, "rooms", STUDIO_RECIPES=str(recipes))
    for name, value in {
        "BACKPACK_STATE": str(studio.state),
        "BACKPACK_GATEWAY_ADDRESS": studio.gateway,
        "BACKPACK_INTERVENTIONS_ADDRESS": studio.interventions,
        "NO_COLOR": "1",
    }.items():
        monkeypatch.setenv(name, value)
    shown: Any = json.loads(recipes.read_text())
    commands = [line.removeprefix("$ backpack ") for text in shown["shell"] for line in text.splitlines()]
    reads = sorted({line for line in commands if not line.startswith(WRITES)})
    assert len(reads) >= 10
    for line in reads:
        done = CliRunner().invoke(app, shlex.split(line.replace(" NAME", " harbour")))
        assert done.exit_code == 0, f"{line}\n{done.output}"
    for text in sorted({text for text in shown["python"] if not any(word in text for word in ("activate", "create_"))}):
        here = text.replace("127.0.0.1:8470", studio.gateway).replace("127.0.0.1:8471", studio.interventions)
        program = [sys.executable, "-c", here.replace('"var/', f'"{studio.state}/')]
        ran = subprocess.run(program, capture_output=True, text=True, timeout=60, check=False)
        assert ran.returncode == 0, f"{text}\n{ran.stderr}"
