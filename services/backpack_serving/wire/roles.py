"""Roles ↔ messages."""

from __future__ import annotations

from backpack_proto.v1 import interventions_pb2 as pb

from backpack_serving.auth.keys import Role

ROLES = {
    pb.ROLE_ADMIN: Role.ADMIN,
    pb.ROLE_AUTHOR: Role.AUTHOR,
    pb.ROLE_RELEASER: Role.RELEASER,
    pb.ROLE_CALLER: Role.CALLER,
    pb.ROLE_REPLICA: Role.REPLICA,
}
ROLE_NUMBERS = {role: number for number, role in ROLES.items()}
