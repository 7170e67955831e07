"""The six gRPC services of the intervention service, ready to be served."""

from __future__ import annotations

from collections.abc import Callable

from backpack_lm.tokenizer import Tokenizer
from backpack_proto.v1 import interventions_pb2_grpc as grpc_v1
from backpack_proto.v1 import sync_pb2_grpc as sync_v1

from backpack_serving import rpc
from backpack_serving.auth.identity import Identities
from backpack_serving.interventions.audit_servicer import AuditServicer
from backpack_serving.interventions.patch_servicer import PatchServicer
from backpack_serving.interventions.release_servicer import ReleaseServicer
from backpack_serving.interventions.rollouts import Rollouts
from backpack_serving.interventions.service import Interventions
from backpack_serving.interventions.sync_servicer import FleetServicer, SyncServicer
from backpack_serving.interventions.tenant_servicer import TenantServicer


def services(
    service: Interventions, tokenizer: Tokenizer, identities: Identities, sync: SyncServicer, rollouts: Rollouts
) -> list[rpc.Service]:
    """All six, ready to be served."""
    common = service, identities
    patches = PatchServicer(service, tokenizer, identities)
    add: dict[str, tuple[Callable[..., None], object]] = {
        "TenantService": (grpc_v1.add_TenantServiceServicer_to_server, TenantServicer(*common)),
        "PatchService": (grpc_v1.add_PatchServiceServicer_to_server, patches),
        "ReleaseService": (grpc_v1.add_ReleaseServiceServicer_to_server, ReleaseServicer(*common, rollouts)),
        "AuditService": (grpc_v1.add_AuditServiceServicer_to_server, AuditServicer(*common)),
        "SyncService": (sync_v1.add_SyncServiceServicer_to_server, sync),
        "FleetService": (sync_v1.add_FleetServiceServicer_to_server, FleetServicer(*common, rollouts)),
    }
    endless, large = frozenset({"Sync"}), {"CreateRevision": patches.check_author}
    return [
        rpc.Service(f"backpack.v1.{name}", adder, servicer, endless, large=large)
        for name, (adder, servicer) in add.items()
    ]
