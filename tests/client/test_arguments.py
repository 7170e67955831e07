"""Every public method of every client: what no request can hold, and nobody can wait for, in every place."""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from backpack_serving.client import (
    Add,
    Bias,
    Cells,
    Client,
    Copy,
    InvalidRequest,
    NotFound,
    Operator,
    Position,
    ProjectOut,
    Sampling,
    Scale,
    Set,
    Steering,
    Swap,
    Token,
    Topic,
    Vector,
)

from tests.e2e.conftest import copy, running

HALF = "king\ud800"
VECTOR = Vector.of([0.0])

TEXTS: dict[str, list[Any]] = {
    "prompt": [HALF],
    "text": [HALF],
    "word": [HALF, Token(1, HALF)],
    "words": [HALF, ["king", HALF], [Token(1, HALF)]],
    "against": [HALF, ["king", HALF]],
    "toward": [HALF, ["king", HALF]],
    "prompts": [HALF, ["a", HALF]],
    "target": [HALF, Token(1, HALF)],
    "targets": [["king", HALF]],
    "releases": [[0, HALF]],
    "sampling": [Sampling(stop=HALF), Sampling(stop=["a", HALF])],
    "edits": [
        [Scale(HALF, 0)],
        [Scale([Cells("king"), Cells(HALF)], 0)],
        [Scale(Cells("king", tokens=HALF), 0)],  # type: ignore[arg-type]
        [Add(HALF, VECTOR)],
        [Set(HALF, VECTOR)],
        [Copy("king", HALF)],
        [ProjectOut("king", HALF)],
        [Swap("king", HALF, "a")],
        [Swap("king", "a", HALF)],
        [Topic(["king", HALF])],
        [Bias(["king", HALF], 1.0)],
        [Bias(["king"], 1.0, HALF)],  # type: ignore[arg-type]
    ],
    "revisions": [[f"{HALF}:1"]],
    "tenants": [["acme", HALF]],
    "roles": [[HALF]],
}
"""Where a text may be, if not as the argument itself."""

NUMBERS = [math.nan, math.inf, -math.inf, 1e300, 9e9, -1, -(2**40), 2**70, 10**5000]


def _sampling(number: Any) -> Iterator[Sampling]:
    for field in ("max_tokens", "temperature", "top_k", "top_p", "seed", "log_probabilities", "samples"):
        yield Sampling(**{field: number})


PLACES: dict[str, Callable[[Any], list[Any]]] = {
    "prompt": lambda n: [[5, n]],
    "text": lambda n: [[5, n]],
    "word": lambda n: [n, Token(n, "king")],
    "words": lambda n: [n, ["king", n], [Token(n, "king")]],
    "against": lambda n: [n, ["king", n]],
    "toward": lambda n: [n, ["king", n]],
    "prompts": lambda n: [["a", [5, n]]],
    "target": lambda n: [n, Token(n, "king")],
    "targets": lambda n: [["king", n]],
    "releases": lambda n: [[0, n]],
    "sampling": lambda n: list(_sampling(n)),
    "since": lambda n: [Position(n, 1), Position(1, n)],
    "edits": lambda n: [
        [Scale(Cells("king", (n,)), 0.0)],
        [Copy("king", "ship", n)],
        [Topic(["king"], n)],
        [Bias([n], 1.0)],
        [Bias(["king"], abs(n) * 1000)],  # −∞ and −1 are amounts
        [Scale(n, 0.0)],
    ],
}
"""Where a number may be, if not as the argument itself."""

ALLOWED = [("priority", -1), *(("sampling", Sampling(temperature=high)) for high in (9e9, 1e300))]
"""What a server says yes to."""

GIVEN: dict[str, Any] = {
    "prompt": "The king",
    "text": "The king and the",
    "word": "king",
    "words": ["king", "ship", "crew"],
    "sense": 0,
    "patch": "p",
    "description": "x",
    "edits": [Scale("king", 0.5)],
    "revisions": ["p:1"],
    "release": 0,
    "number": 1,
    "permille": 5,
    "tenant": "acme",
    "tenants": ["acme"],
    "roles": ["caller"],
    "key": "x",
    "safetensors": b"",
}
"""What is given for arguments that have no default."""


def _methods() -> Iterator[tuple[type[Any], str, inspect.Signature]]:
    for kind in (Client, Steering, Operator):
        for name, method in inspect.getmembers(kind, inspect.isfunction):
            if not name.startswith("_") and name != "close":
                yield kind, name, inspect.signature(method)


def _is(parameter: inspect.Parameter, *words: str) -> bool:
    return any(word in str(parameter.annotation).replace("tuple", "") for word in words)


def _calls(bad: Callable[[inspect.Parameter], list[Any]]) -> Iterator[tuple[type[Any], str, str, dict[str, Any]]]:
    for kind, method, signature in _methods():
        for name, parameter in signature.parameters.items():
            for value in bad(parameter):
                given = {n: GIVEN[n] for n, p in signature.parameters.items() if n in GIVEN and p.default is p.empty}
                yield kind, method, name, {**given, name: value}


def _texts(parameter: inspect.Parameter) -> list[Any]:
    if parameter.name in TEXTS:
        return TEXTS[parameter.name]
    return [HALF] if _is(parameter, "str", "Wait") else []


def _numbers(parameter: inspect.Parameter) -> list[Any]:
    if parameter.name in PLACES:
        return [value for number in NUMBERS for value in PLACES[parameter.name](number)]
    return NUMBERS if _is(parameter, "int", "float") and not _is(parameter, "Callable") else []


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[type[Any], Any]]:
    """Of a tenant that has a patch and a release, of a system that serves."""
    ready: list[Any] = []

    async def serve(started: asyncio.Event, ended: asyncio.Event) -> None:
        async with running(Path(tmp_path_factory.mktemp("state")), slots=2) as system:
            key = (await system.tenant(copy("king", "ship")))[0][1].removeprefix("Bearer ")
            ready.extend((system.gateway, system.interventions, key, system.settings.key_for("admin")))
            started.set()
            await ended.wait()

    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        started, ended = asyncio.Event(), asyncio.Event()
        serving = loop.create_task(serve(started, ended))
        loop.run_until_complete(
            asyncio.wait({serving, loop.create_task(started.wait())}, return_when="FIRST_COMPLETED")
        )
        thread = threading.Thread(target=loop.run_until_complete, args=(serving,))
        thread.start()
        gateway, interventions, key, admin = ready
        made = {
            Client: Client(gateway, key),
            Steering: Steering(interventions, key),
            Operator: Operator(interventions, admin),
        }
        yield made
        for client in made.values():
            client.close()
        loop.call_soon_threadsafe(ended.set)
        thread.join()


def _told(client: Any, method: str, given: dict[str, Any]) -> BaseException | None:
    try:
        answer = getattr(client, method)(**given)
        if inspect.isgenerator(answer):
            list(answer)
    except BaseException as error:
        return error
    return None


def _shown(value: Any) -> str:
    return f"{value!r:.60}" if not isinstance(value, int) or abs(value) < 2**70 else f"{value:#x}"


def test_half_a_character_is_refused_in_every_text_of_every_method(clients: dict[type[Any], Any]) -> None:
    wrong, tried = [], 0
    for kind, method, name, given in _calls(_texts):
        error, tried = _told(clients[kind], method, given), tried + 1
        if not isinstance(error, InvalidRequest) or name not in str(error) or "\\ud800" not in str(error):
            wrong.append(f"{kind.__name__}.{method}({name}={given[name]!r}): {error!r}")
    assert not wrong, "\n".join(wrong)
    assert tried > 80


def test_a_blocking_stream_refuses_its_arguments_when_it_is_called() -> None:
    """Not at its first part, which may be read elsewhere, or never."""
    with Client("127.0.0.1:1") as client, pytest.raises(InvalidRequest, match="timeout"):
        client.stream("king", timeout=-1.0)


def test_numbers_beyond_all_bounds_are_refused_in_every_place_of_every_method(
    clients: dict[type[Any], Any],
) -> None:
    wrong, tried = [], 0
    for kind, method, name, given in _calls(_numbers):
        if (name, given[name]) in ALLOWED:
            continue
        error, tried = _told(clients[kind], method, given), tried + 1
        named = name in str(error) or _shown(given[name]) in str(error)
        if not isinstance(error, (InvalidRequest, NotFound)) or not named:
            wrong.append(f"{kind.__name__}.{method}({name}={_shown(given[name])}): {error!r}")
    assert not wrong, "\n".join(wrong)
    assert tried > 300


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"address": "host\ud800:1"}, "address='host.*half a character"),
        *(({name: bad}, f"{name}: ") for name in ("timeout", "retry_window", "unreached_window")
          for bad in (math.nan, math.inf, 9e9, -1)),
        *(({"attempts": bad}, "attempts=") for bad in (math.nan, math.inf, -1, 0)),
    ],
)  # fmt: skip
def test_a_client_that_could_never_call_is_not_made(how: dict[str, Any], says: str) -> None:
    for kind in (Client, Steering, Operator):
        with pytest.raises(ValueError, match=says):
            kind(**{"address": "127.0.0.1:1", **how})
