"""A tiny random Backpack, releases that bend it, and an engine around it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from backpack_lm.config import BackpackConfig
from backpack_lm.model import Backpack
from backpack_lm.overlay import Overlay, SenseTable
from backpack_lm.patch import (
    AddEdit,
    BiasEdit,
    Cell,
    CopyEdit,
    Edit,
    ProjectOutEdit,
    ReleaseContent,
    RevisionContent,
    ScaleEdit,
    SetEdit,
    SwapEdit,
    TopicEdit,
    Vector,
)
from backpack_serving.engine.engine import Engine
from backpack_serving.engine.runner import Runner
from backpack_serving.engine.scheduler import Scheduler
from backpack_serving.engine.sequence import GenerationRequest, Output
from backpack_serving.engine.slots import OverlayRows, Slots

V, T, D, K = 97, 48, 32, 4


def outputs_of(engine: Engine, requests: Sequence[GenerationRequest]) -> dict[str, list[Output]]:
    """Add all requests, step until nothing is left, and gather their outputs."""
    for request in requests:
        engine.add(request)
    made: dict[str, list[Output]] = {request.id: [] for request in requests}
    while engine.busy:
        for output in engine.step():
            made[output.request_id].append(output)
        engine.check_integrity()
    return made


@pytest.fixture(scope="session")
def model() -> Backpack:
    """Random weights, large enough that senses, positions and patches all matter to the argmax."""
    torch.manual_seed(0)
    config = BackpackConfig.gpt2(V, T, D, n_layer=3, n_head=4, num_senses=K, eos_token_id=0, num_tokens=V - 4)
    model = Backpack(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.25) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
        # Small dots E·C, so that annealing is halfway rather than over at once.
        model.sense_network.final_mlp.c_proj.weight *= 0.1
        model.sense_network.final_mlp.c_proj.bias *= 0.1
    return model


@pytest.fixture(scope="session")
def table(model: Backpack) -> SenseTable:
    return model.sense_table()


def _vector(seed: int) -> Vector:
    return Vector.of((torch.randn(D, generator=torch.Generator().manual_seed(seed)) * 0.5).tolist())


EDITS: dict[str, tuple[Edit, ...]] = {
    "none": (),
    "scale": tuple(ScaleEdit((Cell(t, 1), Cell(t, 2)), -2.0) for t in range(5, 60)),
    "add": tuple(AddEdit((Cell(t, t % K),), _vector(t)) for t in range(1, 80)),
    "set": tuple(SetEdit((Cell(t, 0),), _vector(7)) for t in range(30, 93)),
    "copy": tuple(CopyEdit((Cell(t, 3),), 9, 0) for t in range(10, 90)),
    "project out": (ProjectOutEdit(tuple(Cell(t, s) for t in range(93) for s in range(K)), 17),),
    "swap": (SwapEdit(tuple(Cell(t, s) for t in range(93) for s in range(K)), 17, 18),),
    "topic": (TopicEdit((11, 12, 13), 3),),
    "bias": (BiasEdit(tuple(range(1, 40)), -math.inf), BiasEdit((50, 60, 70), 0.5), BiasEdit((60, 5), -0.25)),
    "two topics, one constant, on edited rows": (
        *(AddEdit((Cell(t, t % K),), _vector(t)) for t in range(1, 80)),
        TopicEdit((21, 22), 2),
        TopicEdit((40, 41, 42), 3, annealed=False),
    ),
    "a topic and biases, on edited rows": (
        *(AddEdit((Cell(t, t % K),), _vector(t)) for t in range(1, 80)),
        TopicEdit((21, 22), 2),
        BiasEdit(tuple(range(0, 93, 2)), -1.5),
    ),
}


def compiled(edits: tuple[Edit, ...], table: SenseTable) -> Overlay:
    """A release of these edits alone, for a table."""
    return Overlay.compile(ReleaseContent((RevisionContent("00" * 32, edits),) if edits else ()), table)


@pytest.fixture(scope="session")
def overlays(table: SenseTable) -> dict[str, Overlay]:
    return {name: compiled(edits, table) for name, edits in EDITS.items()}


MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="session")
def make_engine(model: Backpack, table: SenseTable) -> MakeEngine:
    def make(
        slots: int = 4,
        step_tokens: int = 16,
        queue: int = 64,
        overlay_rows: int = 4 * V * K,
        share_prefixes: bool = False,
        **caches: int,
    ) -> Engine:
        return Engine(
            Runner(model, table.with_room(overlay_rows), slots, **caches),
            Slots(slots),
            OverlayRows(overlay_rows),
            Scheduler(step_tokens, queue),
            share_prefixes,
        )

    return make
