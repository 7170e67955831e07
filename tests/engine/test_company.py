"""A request gets the same bits in any company, in float32 and in bfloat16; bfloat16 stays close to the oracle."""

from __future__ import annotations

from random import Random

import pytest
import torch
from backpack_lm.model import Backpack
from backpack_lm.overlay import Overlay, SenseTable
from backpack_serving.engine.engine import Engine
from backpack_serving.engine.runner import Runner
from backpack_serving.engine.scheduler import Scheduler
from backpack_serving.engine.sequence import GenerationRequest
from backpack_serving.engine.slots import OverlayRows, Slots
from backpack_serving.sampling import SamplingParams

from tests.engine.conftest import K, V
from tests.engine.test_oracle import GREEDY, prompt, run

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


def engine_in(
    dtype: torch.dtype, model: Backpack, table: SenseTable, slots: int = 4, step_tokens: int = 16, **kernels: type
) -> Engine:
    room = 4 * V * K
    return Engine(
        Runner(model, table.with_room(room, dtype), slots, **kernels),
        Slots(slots),
        OverlayRows(room),
        Scheduler(step_tokens, 64),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(8))
def test_log_probabilities_are_the_same_bits_in_any_company(
    dtype: str, seed: int, model: Backpack, table: SenseTable, overlays: dict[str, Overlay]
) -> None:
    """Alone in one slot, its prompt cut into chunks of 3; and among others, in chunks of what is left of 16."""
    draw = Random(seed)
    sampling = SamplingParams(max_tokens=12, temperature=1.0, seed=seed, log_probabilities=3, ignore_end_of_text=True)
    asked = GenerationRequest("asked", "t", prompt(seed, 20), sampling, overlays[draw.choice(list(overlays))])
    others = [
        GenerationRequest(f"o{n}", "u", prompt(n, draw.randint(1, 28)), GREEDY, overlays[draw.choice(list(overlays))])
        for n in range(6)
    ]
    results = []
    for company in ([], others):
        engine = engine_in(DTYPES[dtype], model, table, 4 if company else 1, 16 if company else 3)
        requests = [*company, asked]
        draw.shuffle(requests)
        for request in requests:
            engine.add(request)
        made = []
        while engine.busy:
            made += [(o.token, o.log_probability) for o in engine.step() if o.request_id == "asked"]
        results.append(made)
    assert results[0] == results[1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_warm_prefix_gives_the_same_bits_as_a_cold_one(
    dtype: str, model: Backpack, table: SenseTable, overlays: dict[str, Overlay]
) -> None:
    """The prefix was made by another release, as a prompt or word by word."""
    sampling = SamplingParams(max_tokens=10, temperature=0.0, log_probabilities=2, ignore_end_of_text=True)
    cold, warm = (engine_in(DTYPES[dtype], model, table) for _ in range(2))
    first = GenerationRequest(
        "first", "t", prompt(1, 9), SamplingParams(max_tokens=16, temperature=0.0), overlays["swap"]
    )
    beginning = [*first.prompt, *run(warm, [first])["first"]]

    def ask(engine: Engine) -> list[object]:
        engine.add(GenerationRequest("x", "t", (*beginning, 5, 6), sampling, overlays["topic"]))
        made: list[object] = []
        while engine.busy:
            made += [(o.token, o.log_probability) for o in engine.step()]
        return made

    assert ask(cold) == ask(warm)
    assert warm.reused_tokens >= len(beginning) - 1


def off_the_oracle(
    dtype: torch.dtype,
    model: Backpack,
    table: SenseTable,
    overlays: dict[str, Overlay],
    of_oracle: dict[str, Overlay],
) -> list[float]:
    """By how much log-probabilities of likely tokens differ from those of the oracle, which has overlays of its own."""
    off: list[float] = []
    sampling = SamplingParams(max_tokens=1, temperature=0.0, log_probabilities=20)
    for name, overlay in overlays.items():
        for length in (1, 7, 30):
            ids = prompt(2, length)
            engine = engine_in(dtype, model, table)
            engine.add(GenerationRequest(name, "t", ids, sampling, overlay))
            outputs = []
            while not outputs:
                outputs = engine.step()
            logits = model(torch.tensor([ids]), of_oracle[name])[0, -1, : model.config.tokens].detach()
            expected, found = logits.log_softmax(-1), outputs[0].log_probability
            assert found is not None
            off += [abs(value - float(expected[token])) for token, value in found.alternatives]
    return off


def test_bfloat16_stays_close_to_the_oracle(model: Backpack, table: SenseTable, overlays: dict[str, Overlay]) -> None:
    """Of the same text, under every release: log-probabilities within 0.15 of float32's, 0.02 on average."""
    off = off_the_oracle(torch.bfloat16, model, table, overlays, overlays)
    assert max(off) < 0.15
    assert sum(off) / len(off) < 0.02
