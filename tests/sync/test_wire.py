"""What a newer service says to an older reader."""

from __future__ import annotations

import pytest
from backpack_proto.v1 import interventions_pb2, sync_pb2
from backpack_serving.auth.keys import Role
from backpack_serving.references import Position, ReleaseRef
from backpack_serving.sync import wire
from backpack_serving.sync.messages import Delta
from backpack_serving.sync.state import ChannelState, KeyState, StateEntry, StateView, TenantState
from backpack_serving.sync.wire import SnapshotAssembler


def test_a_role_that_a_gateway_does_not_know_leaves_a_key_its_others() -> None:
    """The key is told with all that changes: what the gateway can't read, it would never get past."""
    change = sync_pb2.KeyChange(tenant="acme", key="k", roles=[interventions_pb2.ROLE_CALLER, 99])
    delta = sync_pb2.Delta(nonce=1, changes=[sync_pb2.Change(key=change)])
    told = SnapshotAssembler().read(sync_pb2.SyncResponse(delta=delta))
    assert isinstance(told, Delta)
    (known,) = told.changes
    assert isinstance(known, KeyState)
    assert known.principal.roles == {Role.CALLER}


def test_a_view_is_written_as_it_is_read_and_only_what_changed_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """With twenty thousand channels that is what takes long when one of them moves."""
    encoded: list[StateEntry] = []
    write = wire._write_entry

    def counted(entry: StateEntry) -> sync_pb2.Change:
        encoded.append(entry)
        return write(entry)

    monkeypatch.setattr(wire, "_write_entry", counted)
    encoder, channels = wire.ViewEncoder(), [ChannelState("acme", f"c{n}", ReleaseRef(1, "ab" * 32)) for n in range(9)]
    view = StateView().changed(Position(1, 1), [TenantState("acme"), TenantState("other", True), *channels])
    assert wire.read_view(encoder.encode(view)) == view
    assert len(encoded) == 11
    moved = ChannelState("acme", "c3", ReleaseRef(2, "cd" * 32))
    later = view.changed(Position(1, 2), [moved])
    assert wire.read_view(encoder.encode(later)) == later
    assert encoded[11:] == [moved]
    assert wire.ViewEncoder().encode(later) == encoder.encode(later)
