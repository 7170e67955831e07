"""What callers get from the type checker: the examples pass it, and mistakes in calls don't."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

CALLS = """
from backpack_serving.client import AsyncClient, AsyncSteering, Client, Operator, Steering


def blocking(client: Client, steering: Steering, operator: Operator) -> None:
    reveal_type(client.generate("x").text)
    reveal_type([part.text for part in client.stream("x")])
    reveal_type(steering.patches())  # of the class that AsyncSteering extends
    reveal_type(steering.activate(1, wait="all").channel.etag)
    reveal_type(operator.fleet().at.epoch)
    client.score("x", chanel="beta")
    steering.activate(1, wait="everybody")
    steering.create_release([1])


async def on_a_loop(client: AsyncClient, steering: AsyncSteering) -> None:
    reveal_type((await client.generate("x")).text)
    reveal_type([part.text async for part in client.stream("x")])
    reveal_type((await steering.status()).holds)
"""

SAYS = """\
6: note: Revealed type is "str"
7: note: Revealed type is "list[str]"
8: note: Revealed type is "tuple[backpack_serving.client.records.Patch, ...]"
9: note: Revealed type is "str"
10: note: Revealed type is "int"
11: error: Unexpected keyword argument "chanel"; did you mean "channel"?  [call-arg]
12: error: Argument "wait" has incompatible type "Literal['everybody']"; expected "Literal['none', 'quorum', 'all']"  [arg-type]
13: error: List item 0 has incompatible type "int"; expected "Revision | str"  [list-item]
17: note: Revealed type is "str"
18: note: Revealed type is "list[str]"
19: note: Revealed type is "tuple[backpack_serving.client.channels.Hold, ...]"
"""  # noqa: E501


def _checked(*files: str) -> str:
    mypy = Path(sys.executable).parent / "mypy"
    return subprocess.run([mypy, *files], cwd=ROOT, capture_output=True, text=True, check=False).stdout


def test_the_blocking_clients_have_the_types_of_the_others(tmp_path: Path) -> None:
    file = tmp_path / "calls.py"
    file.write_text(CALLS)
    # mypy's cache may have the path of an earlier run
    said = [line.partition("calls.py:")[2] for line in _checked(str(file)).splitlines() if "calls.py:" in line]
    assert "\n".join(said) + "\n" == SAYS


def test_the_examples_pass_the_type_checker() -> None:
    examples = sorted(str(file) for file in (ROOT / "examples").glob("*.py"))
    assert "no issues found" in _checked(*examples)
