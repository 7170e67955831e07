"""Replicas wanted for a load; and that Ray Serve takes the policy over and hands it what it needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from backpack_serving.inference.autoscaling import METRIC, Autoscaling, TokensInFlight
from pydantic import ValidationError


@dataclass
class Observed:
    target_num_replicas: int
    aggregated_metrics: dict[str, dict[Any, float]] | None = field(default_factory=dict)


@pytest.mark.parametrize(
    ("reported", "wanted"),
    [
        ({"a": 0.0}, 1.0),
        ({"a": 1000.0}, 1.0),
        ({"a": 1500.0, "b": 700.0}, 2.2),  # Ray rounds up
        ({"a": 9000.0, "b": 0.0}, 9.0),
    ],
)
def test_each_replica_should_have_so_many_tokens_in_flight(reported: dict[str, float], wanted: float) -> None:
    policy = TokensInFlight(per_replica=1000)
    assert policy(Observed(2, {METRIC: reported, "running_requests": {"a": 99.0}}))[0] == pytest.approx(wanted)


@pytest.mark.parametrize("nothing", [None, {}, {METRIC: {}}, {"running_requests": {"a": 5.0}}])
def test_nothing_changes_while_nothing_is_known(nothing: Any) -> None:
    assert TokensInFlight(per_replica=1000)(Observed(3, nothing)) == (3, {})


def test_bounds_must_make_sense() -> None:
    with pytest.raises(ValidationError, match=r"max_replicas \(2\) is less than min_replicas \(3\)"):
        Autoscaling(min_replicas=3, max_replicas=2)
    with pytest.raises(ValidationError, match="min_replicas"):
        Autoscaling(min_replicas=0, max_replicas=2)
