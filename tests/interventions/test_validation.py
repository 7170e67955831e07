"""P14 at write: what no model could be steered by safely is refused, whole, and nothing of it is stored."""

from __future__ import annotations

import json
import math
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from backpack_lm import patch
from backpack_lm.installed import folder_of
from backpack_lm.patch import (
    AddEdit,
    BiasEdit,
    Cell,
    CopyEdit,
    ModelShape,
    PatchLimits,
    ProjectOutEdit,
    ScaleEdit,
    SetEdit,
    SwapEdit,
    TopicEdit,
    Vector,
)
from backpack_proto.v1 import interventions_pb2 as pb
from backpack_proto.v1.inference_pb2 import Word
from backpack_serving.errors import InvalidRequest, PreconditionFailed, ServiceError
from backpack_serving.interventions import bootstrap
from backpack_serving.interventions.ledger import IdempotencyKey
from backpack_serving.interventions.service import Interventions
from backpack_serving.interventions.store import Store
from backpack_serving.observability.metrics import Metrics
from backpack_serving.references import LIVE
from backpack_serving.settings import Settings
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.interventions.conftest import ADMIN, SHAPE, releaser
from tests.interventions.control import Control
from tests.interventions.memory import MemoryStore

LIMITS = PatchLimits(cells=16, blob_bytes=2000, revisions=2, topic_words=4, biased=6)
WIDTH = SHAPE.width

tokens = st.integers(0, SHAPE.vocab_size - 1)
cell = st.builds(Cell, tokens, st.integers(0, SHAPE.num_senses - 1))
cells = st.lists(cell, min_size=1, max_size=4).map(tuple)
small = st.floats(-1, 1, width=32).filter(lambda x: x != 0)
vector = st.lists(small, min_size=WIDTH, max_size=WIDTH).map(Vector.of)


def _raw(values: list[float]) -> Vector:
    return Vector(struct.pack(f"<{len(values)}f", *values))


good = st.one_of(
    st.builds(ScaleEdit, cells, st.floats(-8, 8).filter(lambda x: x != 1)),
    st.builds(AddEdit, cells, vector),
    st.builds(SetEdit, cells, vector),
    st.builds(ProjectOutEdit, cells, tokens),
    st.tuples(cells, st.permutations(range(9))).map(lambda t: SwapEdit(t[0], t[1][0], t[1][1])),
    st.tuples(cells, st.integers(40, 49)).map(
        lambda t: CopyEdit(tuple(Cell(c.token % 40, c.sense) for c in t[0]), t[1])
    ),
    st.builds(TopicEdit, st.lists(tokens, min_size=1, max_size=4).map(tuple), st.integers(1, 3), st.booleans()),
    st.builds(
        BiasEdit,
        st.lists(tokens, min_size=1, max_size=2).map(tuple),
        st.floats(-100, 100).filter(bool) | st.just(-math.inf),
    ),
)

not_finite = st.sampled_from([math.nan, math.inf, -math.inf])
beyond_float16 = st.floats(65_505, 2.0**127, width=32)


def _with(value: st.SearchStrategy[float]) -> st.SearchStrategy[Vector]:
    place = st.integers(0, WIDTH - 1)
    return st.tuples(place, value).map(lambda t: _raw([t[1] if n == t[0] else 0.25 for n in range(WIDTH)]))


bad_vector = st.one_of(
    _with(not_finite),
    _with(beyond_float16),
    _with(st.floats(9, 60_000, width=32)),  # more than 8 times a typical vector of this sense
    st.integers(0, 2 * WIDTH).filter(lambda n: n != WIDTH).map(lambda n: _raw([0.5] * n)),
    st.binary(min_size=1, max_size=40).filter(lambda b: len(b) != 4 * WIDTH).map(Vector),
)
bad = st.one_of(
    st.builds(ScaleEdit, cells, st.one_of(not_finite, st.just(1.0), st.floats(8.01, 1e300), st.floats(-1e300, -8.01))),
    st.builds(AddEdit, cells, st.one_of(bad_vector, st.just(_raw([0.0] * WIDTH)))),
    st.builds(SetEdit, cells, bad_vector),
    st.builds(ScaleEdit, st.just(()), st.just(0.5)),
    st.builds(ScaleEdit, st.builds(Cell, st.integers(50, 2**32 - 1), st.just(0)).map(lambda c: (c,)), st.just(0.5)),
    st.builds(ScaleEdit, st.builds(Cell, tokens, st.integers(4, 2**32 - 1)).map(lambda c: (c,)), st.just(0.5)),
    st.builds(ScaleEdit, st.lists(cell, min_size=17, max_size=20).map(tuple), st.just(0.5)),
    cell.map(lambda c: CopyEdit((c,), c.token)),
    st.builds(ProjectOutEdit, cells, st.integers(50, 2**31)),
    st.tuples(cells, tokens).map(lambda t: SwapEdit(t[0], t[1], t[1])),
    st.builds(TopicEdit, st.just(()), st.just(1)),
    st.builds(TopicEdit, st.lists(tokens, min_size=5, max_size=9).map(tuple), st.just(1)),
    st.builds(TopicEdit, st.just((1,)), st.sampled_from([0, 4, 255])),
    st.builds(BiasEdit, st.just((1,)), st.sampled_from([0.0, math.nan, math.inf]) | st.floats(100.01, 1e300)),
    st.builds(BiasEdit, st.just((1,)), st.floats(-1e300, -100.01)),
    st.builds(BiasEdit, st.just(()), st.just(1.0)),
    st.builds(BiasEdit, st.integers(50, 2**32 - 1).map(lambda token: (token,)), st.just(-math.inf)),
    st.builds(BiasEdit, st.lists(tokens, min_size=7, max_size=9).map(tuple), st.just(1.0)),
    st.just(BiasEdit(tuple(range(50)), -math.inf)),
)


def _service(store: Store) -> Interventions:
    service = Interventions(store, SHAPE, LIMITS)
    service.tenants.create_tenant(ADMIN, "acme", IdempotencyKey())
    service.patches.create_patch(releaser("acme"), "p", "", IdempotencyKey())
    return service


def check_bad_edits(store: Store, examples: int) -> None:
    """One bad edit among good ones refuses the revision, and the store stays as it was."""
    service, acme = _service(store), releaser("acme")
    before = service.events.snapshot()[0]

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(st.lists(good, max_size=2), bad, st.lists(good, max_size=1))
    def refused(first: list[Any], wrong: Any, last: list[Any]) -> None:
        for use in (
            lambda: service.patches.create_revision(acme, "p", [*first, wrong, *last], IdempotencyKey()),
            lambda: service.patches.draft_revision(acme, "p", [*first, wrong, *last]),
        ):
            try:
                use()
            except ServiceError as error:
                assert error.code == "INVALID_ARGUMENT", error
                assert error.violations, "it says where"
            else:
                raise AssertionError(f"accepted {wrong}")
        assert service.events.snapshot()[0] == before

    refused()


@pytest.mark.parametrize("examples", [100, pytest.param(3000, marks=pytest.mark.slow)])
def test_p14_what_can_not_be_applied_is_not_stored(store: Store, examples: int) -> None:
    check_bad_edits(store, examples if isinstance(store, MemoryStore) else examples // 5)


def test_p14_what_can_is_stored_and_read_as_it_was(store: Store) -> None:
    service, acme = _service(store), releaser("acme")

    @settings(max_examples=30, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(good, min_size=1, max_size=3))
    def stored(edits: list[Any]) -> None:
        written = service.patches.create_revision(acme, "p", edits, IdempotencyKey()).record
        record, read = service.patches.get_revision(acme, "p", written.number)
        assert record == written
        assert list(read) == edits
        assert record.digest == patch.RevisionContent(SHAPE.fingerprint, tuple(edits)).digest

    stored()


def test_p14_another_models_revision_goes_into_no_release_and_no_channel(store: Store) -> None:
    service, acme = _service(store), releaser("acme")
    service.patches.create_revision(acme, "p", [ScaleEdit((Cell(1, 1),), 0.5)], IdempotencyKey())
    service.releases.create_release(acme, [("p", 1)], "", IdempotencyKey())
    other = Interventions(store, ModelShape("cd" * 32, 50, 4, 8, (1.0,) * 4), LIMITS)
    with pytest.raises(PreconditionFailed, match="create the revision again"):
        other.releases.create_release(acme, [("p", 1)], "", IdempotencyKey())
    with pytest.raises(PreconditionFailed, match="create the revision again"):
        other.channels.activate(acme, LIVE, 1, other.channels.get_channel(acme, LIVE).etag, IdempotencyKey())
    with pytest.raises(InvalidRequest, match="at most 2"):
        service.releases.create_release(acme, [("p", 1)] * 3, "", IdempotencyKey())


def test_p15_a_model_under_which_tenants_would_lose_their_releases_needs_force(store: Store) -> None:
    check_model(store)


def check_model(store: Store) -> None:
    """Refused while a channel is at another model's release, naming both models; forced by its name alone."""
    service, acme = _service(store), releaser("acme")
    other = Interventions(store, ModelShape("cd" * 32, 50, 4, 8, (1.0,) * 4), LIMITS)
    other.channels.check_model("")  # nobody has released a patch: the empty release is for every model
    service.patches.create_revision(acme, "p", [ScaleEdit((Cell(1, 1),), 0.5)], IdempotencyKey())
    service.releases.create_release(acme, [("p", 1)], "", IdempotencyKey())
    other.channels.check_model("")  # it is served to nobody
    service.channels.activate(acme, LIVE, 1, service.channels.get_channel(acme, LIVE).etag, IdempotencyKey())
    service.channels.check_model("")
    for forced in ("", "cd" * 5, "ab" * 6, "cd" * 33):
        with pytest.raises(PreconditionFailed) as refused:
            other.channels.check_model(forced)
        assert refused.value.reason == "WRONG_MODEL"
        for told in (
            "ab" * 6,
            "cd" * 6,
            "1 of the channels",
            "tenants/acme/channels/live",
            "BACKPACK_FORCE_MODEL",
        ):
            assert told in refused.value.message
    other.channels.check_model("cd" * 6)
    other.channels.check_model("cd" * 32)
    # Back to the empty release, which is for every model; but not forward again.
    etag = other.channels.activate(
        acme, LIVE, 0, other.channels.get_channel(acme, LIVE).etag, IdempotencyKey()
    ).record.etag
    other.channels.check_model("")
    with pytest.raises(PreconditionFailed, match="create the revision again"):
        other.channels.rollback(acme, LIVE, etag, IdempotencyKey())
    etag = service.channels.start_canary(acme, LIVE, 1, 10, "", etag, IdempotencyKey()).record.etag
    with pytest.raises(PreconditionFailed, match="BACKPACK_FORCE_MODEL"):
        other.channels.check_model("")


async def test_p15_the_service_does_not_start_for_another_model(tmp_path: Path) -> None:
    def chosen(**more: Any) -> Settings:
        return Settings(state=tmp_path / "state", interventions_address="127.0.0.1:0", **more)

    running = await bootstrap.start(chosen(), Metrics())
    control = Control(running.address, chosen().key_for("admin"))
    _, key, _ = await control.tenant()
    cells = [pb.Cells(word=Word(text="king"), senses=[1])]
    edit = pb.Edit(scale=pb.ScaleEdit(cells=cells, factor=0.5))
    made = await control.patches.CreateRevision(
        pb.CreateRevisionRequest(parent="patches/p", edits=[edit]), metadata=key
    )
    await control.releases.CreateRelease(pb.CreateReleaseRequest(revisions=[made.revision.name]), metadata=key)
    live = await control.releases.GetChannel(pb.GetChannelRequest(name="channels/live"), metadata=key)
    move = pb.ActivateRequest(channel="channels/live", release=1, etag=live.channel.etag)
    await control.releases.Activate(move, metadata=key)
    await control.channel.close()
    await running.stop()

    other = tmp_path / "model"
    other.mkdir()
    manifest = json.loads((folder_of("micro") / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**manifest, "fingerprint": "cd" * 32}))
    shutil.copy(folder_of("micro") / "tokenizer.json", other)
    for forced in ("", manifest["fingerprint"]):
        with pytest.raises(PreconditionFailed, match=f"BACKPACK_FORCE_MODEL={'cd' * 6}"):
            await bootstrap.start(chosen(model=other, force_model=forced), Metrics())
    for again in (chosen(model=other, force_model="cd" * 6), chosen()):
        running = await bootstrap.start(again, Metrics())
        await running.stop()
