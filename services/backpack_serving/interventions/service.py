"""Composes the rules of the intervention service. No SQL, gRPC or protobuf."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime

from backpack_lm.patch import ModelShape, PatchLimits

from backpack_serving.interventions.channels import ChannelRules
from backpack_serving.interventions.events import EventRules
from backpack_serving.interventions.judgements import JudgementRules
from backpack_serving.interventions.patches import PatchRules
from backpack_serving.interventions.releases import ReleaseRules
from backpack_serving.interventions.rules import RuleContext
from backpack_serving.interventions.store import Store
from backpack_serving.interventions.tenants import TenantRules


class Interventions:
    """All rules over one store, for one model. `on_write` is called after each commit; `degradation` is the share by
    which a release may raise the perplexity of ordinary text before channels refuse it.
    """

    def __init__(
        self,
        store: Store,
        shape: ModelShape,
        limits: PatchLimits = PatchLimits(),
        on_write: Callable[[], None] = lambda: None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        degradation: float = math.inf,
    ) -> None:
        context = RuleContext(store, shape, limits, on_write, now)
        self.shape, self.limits = shape, limits
        self.tenants = TenantRules(context)
        self.patches = PatchRules(context)
        self.releases = ReleaseRules(context)
        self.judgements = JudgementRules(context, degradation)
        self.channels = ChannelRules(context, self.judgements)
        self.events = EventRules(context)
