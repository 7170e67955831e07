"""What a newer service says to an older reader."""

from __future__ import annotations

from backpack_proto.v1 import interventions_pb2, sync_pb2
from backpack_serving.auth.keys import Role
from backpack_serving.sync.messages import Delta
from backpack_serving.sync.state import KeyState
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
