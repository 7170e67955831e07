"""Releases by number: told or asked for once, all from one page, never another one in their place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from backpack_serving.errors import NotFound, Unavailable
from backpack_serving.gateway.releases import ReleaseResolver
from backpack_serving.references import Position, ReleaseRef
from backpack_serving.sync.state import RecentRelease, TenantState

from tests.gateway.test_registry import KNOWN, LIVE, OTHER, STABLE, Told

EARLIER, FRESH = ReleaseRef(2, "12" * 32), ReleaseRef(9, "90" * 32)
CHANNEL = replace(LIVE, earlier=(EARLIER,))


class Service:
    """The intervention service's answers: what it has, where it stands, and what it was asked."""

    def __init__(self) -> None:
        self.has = {7: "77" * 32, 8: "88" * 32}
        self.position = Position(1, 7)
        self.asked: list[tuple[str, tuple[int, ...]]] = []
        self.meanwhile: Callable[[], None] = lambda: None

    async def resolve(self, tenant: str, numbers: Sequence[int]) -> tuple[Position, list[ReleaseRef]]:
        self.asked.append((tenant, tuple(numbers)))
        self.meanwhile()
        if missing := [n for n in numbers if n not in self.has]:
            raise NotFound("NO_SUCH_RELEASE", f"releases/{missing[0]} doesn't exist")
        return self.position, [ReleaseRef(n, self.has[n]) for n in numbers]

    async def reached(self, since: Position) -> None:
        self.meanwhile()
        if since > self.position:
            raise Unavailable("BEHIND", f"asked for {since}")


@pytest.fixture
def told() -> Told:
    told = Told()
    told.hear((1, 7), TenantState("acme"), KNOWN, CHANNEL, RecentRelease("acme", FRESH), whole=True)
    return told


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def releases(told: Told, service: Service) -> ReleaseResolver:
    return ReleaseResolver(told.registry, service.resolve, service.reached)


async def test_what_the_book_has_anyway_is_not_asked_for(releases: ReleaseResolver, service: Service) -> None:
    pins = await releases.pin("acme", (9, "live", 2, 3))
    assert [(p.release, p.digest, p.channel) for p in pins] == [
        (9, FRESH.digest, ""),
        (3, STABLE.digest, "live"),
        (2, EARLIER.digest, ""),
        (3, STABLE.digest, ""),
    ]
    assert {(p.tenant, p.epoch, p.revision) for p in pins} == {("acme", 1, 7)}
    assert service.asked == []


async def test_the_rest_is_asked_for_once(releases: ReleaseResolver, service: Service) -> None:
    for _ in range(2):
        assert [p.digest for p in await releases.pin("acme", (8, 3, 7))] == ["88" * 32, STABLE.digest, "77" * 32]
    assert service.asked == [("acme", (8, 7))]


async def test_a_tenant_is_not_answered_with_anothers(releases: ReleaseResolver, service: Service) -> None:
    await releases.pin("acme", (7,))
    service.has[7] = "70" * 32
    assert (await releases.pin("other", (7,)))[0].digest == "70" * 32
    service.has.clear()
    with pytest.raises(NotFound, match="releases/3"):
        await releases.pin("other", (3,))


async def test_after_a_restore_numbers_are_asked_for_again(
    told: Told, releases: ReleaseResolver, service: Service
) -> None:
    await releases.pin("acme", (7,))
    service.has[7] = "70" * 32
    service.position = Position(2, 1)
    told.hear((2, 1), TenantState("acme"), CHANNEL, whole=True)
    assert (await releases.pin("acme", (7,)))[0].digest == "70" * 32


async def test_an_answer_of_another_epoch_than_the_books_is_not_used(
    releases: ReleaseResolver, service: Service
) -> None:
    service.position = Position(2, 1)
    with pytest.raises(Unavailable, match=r"the store is at 2\.1"):
        await releases.pin("acme", (7,))
    assert len(service.asked) == 1
    with pytest.raises(Unavailable):
        await releases.pin("acme", (7,))
    assert len(service.asked) == 2, "nothing of it was kept"


async def test_all_are_pinned_from_one_page(told: Told, releases: ReleaseResolver, service: Service) -> None:
    """The channel moves while a number is asked for: what was pinned is what held at first."""
    service.meanwhile = lambda: told.hear((1, 8), replace(CHANNEL, stable=OTHER))
    pins = await releases.pin("acme", (7, "live"))
    assert (pins[1].digest, {p.revision for p in pins}) == (STABLE.digest, {7})
    assert (await releases.pin("acme", ("live",)))[0].digest == OTHER.digest


async def test_a_write_that_is_asked_for_is_waited_for(told: Told, releases: ReleaseResolver, service: Service) -> None:
    service.meanwhile = lambda: told.hear((1, 8), replace(CHANNEL, stable=OTHER))
    assert (await releases.channel("acme", "live")).digest == STABLE.digest
    assert (await releases.channel("acme", "live", since=Position(1, 7))).digest == OTHER.digest
    assert [p.digest for p in await releases.pin("acme", ("live",), since=Position(1, 7))] == [OTHER.digest]
    for refused in (
        releases.channel("acme", "live", since=Position(1, 9)),
        releases.pin("acme", (3,), "", Position(1, 9)),
    ):
        with pytest.raises(Unavailable, match=r"1\.9"):
            await refused


async def test_what_is_not_there_is_refused(releases: ReleaseResolver) -> None:
    with pytest.raises(NotFound, match="releases/99"):
        await releases.pin("acme", (3, 99))
    with pytest.raises(NotFound, match="channels/nowhere"):
        await releases.pin("acme", (3, "nowhere"))


async def test_only_so_many_are_remembered(told: Told, service: Service) -> None:
    releases = ReleaseResolver(told.registry, service.resolve, service.reached, cached=1)
    for number in (7, 8, 7):
        await releases.pin("acme", (number,))
    assert len(service.asked) == 3
