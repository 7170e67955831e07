"""What tenants write is shown on a terminal by every command, and obeyed by none; a pipe gets it to the byte."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import structlog
from backpack_proto.v1 import inference_pb2 as pb
from backpack_proto.v1 import sync_pb2
from backpack_serving.cli import client as screens
from backpack_serving.cli.main import app
from typer.testing import CliRunner

from tests import commands
from tests.e2e.conftest import System, copy, ipb

pytestmark = pytest.mark.asyncio(loop_scope="module")

EVIL = "king \u202eb\x1b[31mc\u2066d\u200be\u2028f\u00adg\ufeffh\u200di"
SHOWN = "king \\u202eb\\u001b[31mc\\u2066d\\u200be\\u2028f\\u00adg\\ufeffh\\u200di"
NEVER = re.compile("[\u202a-\u202e\u2066-\u2069\u200b\u2028\u00ad\ufeff\u200d]|\x1b\\[31m")
"""What none of the commands may write to a terminal; colours of ours are off."""


@pytest.fixture(autouse=True)
def _quiet() -> None:
    """The servers are in this process, and log to the same stdout as a command writes to."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("CRITICAL"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def evil(system: System) -> str:
    """The key of a tenant that has written it wherever it may."""
    key = await system.tenant()
    update = ipb.UpdatePatchRequest(patch=ipb.Patch(name="patches/p", description=EVIL))
    await system.patches.UpdatePatch(update, metadata=key)
    revision = ipb.CreateRevisionRequest(parent="patches/p", edits=[copy("king", "ship")])
    made = (await system.patches.CreateRevision(revision, metadata=key)).revision
    for _ in range(2):
        release = ipb.CreateReleaseRequest(revisions=[made.name], notes=EVIL)
        await system.releases.CreateRelease(release, metadata=key)
    hello = sync_pb2.Hello(
        kind=sync_pb2.READER_KIND_GATEWAY, incarnation="evil", name=EVIL, model_fingerprint=EVIL,
        refusals=[sync_pb2.Refusal(tenant="t", channel="c", release_digest=EVIL, reason=EVIL, message=EVIL)],
    )  # fmt: skip

    async def requests() -> Any:
        yield sync_pb2.SyncRequest(hello=hello)
        await asyncio.sleep(60)

    call = system.sync.Sync(requests(), metadata=system.replica)
    assert "WRONG_MODEL" not in str(await call.code()), "its message is told"
    return key[0][1].removeprefix("Bearer ")


async def _cli(system: System, *words: str, terminal: bool, code: int = 0) -> str:
    environment = {
        "BACKPACK_GATEWAY_ADDRESS": system.gateway,
        "BACKPACK_INTERVENTIONS_ADDRESS": system.interventions,
        "BACKPACK_STATE": str(system.settings.state),
        "NO_COLOR": "1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for screen in (screens.out, screens.err):
            patch.setattr(screen, "_force_terminal", terminal)
            patch.setattr(screen, "_color_system", None)
            patch.setattr(screen, "_width", 400)
        result = await asyncio.to_thread(CliRunner(env=environment).invoke, app, list(words))
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("patch list", 0),
        ("patch describe p", 0),
        ("release list", 0),
        ("release status", 0),
        (f"canary start 1 --salt|{EVIL}", 1),
        ("fleet", 0),
        (f"generate|{EVIL}|--max-tokens|2|--seed|1", 0),
        (f"generate|{EVIL}|--max-tokens|2|--seed|1|--samples|2", 0),
        (f"explain|{EVIL}|--html|PAGE|--max-tokens|2", 0),
        (f"release activate 1 --channel|{EVIL}", 2),
        (f"patch describe|{EVIL}", 1),
        (f"tenant create|{EVIL}", 1),
        (f"patch scale p --factor 0|{EVIL}", 1),
    ],
    ids=lambda value: value.partition("|")[0] if isinstance(value, str) else "",
)
async def test_a_command_shows_what_is_hidden(
    system: System, evil: str, tmp_path: Path, command: str, code: int
) -> None:
    first, *rest = command.split("|")
    page = tmp_path / "page.html"
    words = [*first.split(), *(str(page) if word == "PAGE" else word for word in rest)]
    if words[0] not in ("fleet", "tenant"):
        words += ["--key", evil]
    shown = await _cli(system, *words, terminal=True, code=code)
    assert not NEVER.search(shown), ascii(shown)
    assert SHOWN[:18] in shown or "\\x1b" in shown, ascii(shown)
    if page.exists():
        assert not NEVER.search(page.read_text("utf-8"))


@pytest.mark.parametrize(
    "command",
    [
        "score|TEXT",
        "compare|TEXT|--release|live|--score",
        "explain|TEXT",
        "generate|TEXT|--max-tokens|1|--explain|2",
        "senses|king",
        "audit",
        "patch show p",
    ],
    ids=lambda command: command.partition("|")[0],
)
async def test_a_command_that_shows_tokens_of_it_hides_none(system: System, evil: str, command: str) -> None:
    first, *rest = command.split("|")
    words = [*first.split(), *(EVIL if word == "TEXT" else word for word in rest)]
    assert not NEVER.search(await _cli(system, *words, "--key", evil, terminal=True))


async def test_a_pipe_gets_it_to_the_byte(system: System, evil: str) -> None:
    text = "king \r\x07\x0b\t\u202e\u200d the\tend"
    words = ("generate", text, "--max-tokens", "4", "--seed", "1", "--key", evil)
    request = pb.GenerateRequest(prompt=pb.Prompt(text=text), sampling=pb.Sampling(max_tokens=4, seed=1))
    answer = await system.inference.Generate(request, metadata=(("authorization", f"Bearer {evil}"),))
    assert (await _cli(system, *words, terminal=False)).startswith(f"{text}{answer.text}\n")
    await _cli(system, "patch", "describe", "p", text, "--key", evil, terminal=False)
    assert await _cli(system, "patch", "describe", "p", "--key", evil, terminal=False) == f"{text}\n"
    await _cli(system, "patch", "describe", "p", EVIL, "--key", evil, terminal=False)


@pytest.mark.parametrize("form", ["console", "json"])
async def test_a_log_shows_it_too(form: str) -> None:
    program = (
        "import logging, structlog, sys\n"
        "from backpack_serving.settings import Settings\n"
        "from backpack_serving.observability.telemetry import configure\n"
        f"configure(Settings(log_format={form!r}), 'test')\n"
        "evil = sys.argv[1]\n"
        "structlog.get_logger().warning(evil, name=evil)\n"
        "logging.getLogger('library').warning('%s', evil)\n"
        "try:\n    raise ValueError(evil)\n"
        "except ValueError:\n    structlog.get_logger().exception('raised')\n"
    )
    told = (await commands.run_command(sys.executable, "-c", program, EVIL)).stderr
    assert not NEVER.search(told), ascii(told)
    assert told.count("\\u202e") >= 4
