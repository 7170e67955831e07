"""Which tenants have a label of their own."""

from __future__ import annotations

from backpack_serving.observability.tenant_labels import TenantLabels


def test_there_are_never_more_labels_than_the_limit() -> None:
    dropped: list[str] = []
    labels = TenantLabels(2, dropped.append)
    seen = {labels.count(f"t{n % 10}") for n in range(1000)}
    assert labels.label("t0") == "t0"
    assert len(seen - {"other"}) == 2 + len(dropped)
    assert len({labels.label(f"t{n}") for n in range(10)} - {"other"}) == 2


def test_a_busy_newcomer_takes_the_place_of_an_idle_one() -> None:
    dropped: list[str] = []
    labels = TenantLabels(2, dropped.append, forget_after=100)
    for tenant in ("idle", "busy", "busy", "busy"):
        labels.count(tenant)
    assert [labels.count("new") for _ in range(3)] == ["other", "other", "new"]
    assert dropped == ["idle"]
    assert (labels.label("idle"), labels.label("busy")) == ("other", "busy")


def test_the_past_is_forgotten() -> None:
    labels = TenantLabels(1, lambda _: None, forget_after=64)
    for _ in range(60):
        labels.count("yesterday")
    assert [labels.count("today") for _ in range(200)][-1] == "today"


def test_without_labels_all_are_others() -> None:
    labels = TenantLabels(0, lambda _: None)
    assert labels.count("t") == "other"
