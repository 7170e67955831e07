"""How many replicas the load wants: arithmetic for Ray Serve's autoscaler, without Ray.

Ray Serve's own measure, requests in progress, counts a word like an essay, and sees none of ours: they go past it.
Replicas report their tokens in flight instead: prompt tokens to be read and tokens to be made, of all requests
that run or wait.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, model_validator

METRIC = "tokens_in_flight"
"""The name under which replicas report their load to Ray Serve."""


class Autoscaling(BaseModel):
    """Bounds and speed of autoscaling: growing is quick; shrinking waits until the load has long been low."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_replicas: int = Field(1, ge=1, description="Never fewer replicas.")
    max_replicas: int = Field(ge=1, description="Never more replicas.")
    tokens_in_flight: int = Field(
        4096,
        ge=1,
        description="What a replica should have: tokens to be read and made. 32 slots × 128 by default.",
    )
    up_after_seconds: float = Field(
        10, ge=0, description="The load must stay high for so long before replicas are added."
    )
    down_after_seconds: float = Field(
        600, ge=0, description="The load must stay low for so long before replicas are taken away."
    )
    average_seconds: float = Field(15, gt=0, description="The load is averaged over so long.")

    @model_validator(mode="after")
    def _bounds(self) -> Autoscaling:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas ({self.max_replicas}) is less than min_replicas ({self.min_replicas})")
        return self


class Observed(Protocol):
    """What of Ray Serve's `AutoscalingContext` a decision needs."""

    @property
    def aggregated_metrics(self) -> Mapping[str, Mapping[Any, float]] | None: ...
    @property
    def target_num_replicas(self) -> int: ...


class TokensInFlight:
    """Ray Serve's autoscaling policy: so many replicas that each has `per_replica` tokens in flight.

    Ray Serve keeps the result within the bounds and applies the delays.
    """

    def __init__(self, per_replica: float) -> None:
        self._per_replica = per_replica

    def __call__(self, observed: Observed) -> tuple[float, dict[str, Any]]:
        """(Replicas wanted, state kept between decisions: none).

        Replicas that haven't reported yet count as idle. If none has, nothing is known, and nothing changes.
        """
        reported = (observed.aggregated_metrics or {}).get(METRIC)
        if not reported:
            return observed.target_num_replicas, {}
        return max(1.0, sum(reported.values()) / self._per_replica), {}
