"""`backpack tenant …`: tenants and their API keys."""

from __future__ import annotations

from typing import Annotated

import typer
from backpack_proto.v1 import interventions_pb2 as pb

from backpack_serving.cli.client import as_admin, new_id, out, table, tenant_key_file, when
from backpack_serving.keys import keep
from backpack_serving.settings import Settings

app = typer.Typer(no_args_is_help=True, help="Tenants and their API keys; needs the admin key.")

Name = Annotated[str, typer.Argument(help="Name of the tenant.")]
Names = Annotated[list[str], typer.Argument(help="Names of tenants.")]
KeyId = Annotated[str, typer.Argument(help="The key's id, as `backpack tenant keys` shows it.")]


@app.command("create")
def create_tenant(name: Annotated[str, typer.Argument(help="a-z, 0-9 and -")]) -> None:
    """Make a tenant, with a key that may release and call, kept in the state folder for --as."""
    with as_admin() as client:
        file = tenant_key_file(Settings(), name)
        file.parent.mkdir(parents=True, exist_ok=True)  # before there is a secret that would be lost
        client.tenants.CreateTenant(
            pb.CreateTenantRequest(tenant_id=name, request_id=new_id()), metadata=client.metadata
        )
        request = pb.CreateApiKeyRequest(
            parent=f"tenants/{name}", roles=[pb.ROLE_RELEASER, pb.ROLE_CALLER], request_id=new_id()
        )
        secret = client.tenants.CreateApiKey(request, metadata=client.metadata).secret
        keep(secret, file)
    out.print(f"tenants/{name}; its key is in {file}")


@app.command("list")
def list_tenants() -> None:
    """All tenants."""
    with as_admin() as client:
        answer = client.tenants.ListTenants(pb.ListTenantsRequest(page_size=1000), metadata=client.metadata)
    for tenant in answer.tenants:
        out.print(f"{tenant.name}  [dim]{when(tenant.create_time)}[/]" + "  suspended" * tenant.suspended)


@app.command("key")
def create_key(
    name: Annotated[str, typer.Argument(help="Tenant that the key is for.")],
    role: Annotated[list[str], typer.Option(help="author, releaser or caller; repeatable.")],
) -> None:
    """Make a further API key. The secret is printed once and kept nowhere."""
    with as_admin() as client:
        try:
            roles = [pb.Role.Value(f"ROLE_{r.upper()}") for r in role]
        except ValueError:
            known = "author, releaser or caller; of the tenant system, admin or replica"
            raise typer.BadParameter(f"{' '.join(role)!r}: {known}", param_hint="--role") from None
        request = pb.CreateApiKeyRequest(parent=f"tenants/{name}", roles=roles, request_id=new_id())
        answer = client.tenants.CreateApiKey(request, metadata=client.metadata)
    out.print(answer.secret)


@app.command("keys")
def list_keys(name: Name) -> None:
    """A tenant's keys, without their secrets."""
    with as_admin() as client:
        request = pb.ListApiKeysRequest(parent=f"tenants/{name}", page_size=1000)
        answer = client.tenants.ListApiKeys(request, metadata=client.metadata)
    shown = table("key", "roles", "made", "")
    for key in answer.keys:
        roles = " ".join(pb.Role.Name(role).removeprefix("ROLE_").lower() for role in key.roles)
        shown.add_row(key.name.rpartition("/")[2], roles, when(key.create_time), "revoked" * key.revoked)
    out.print(shown)


@app.command("rotate")
def rotate_key(name: Name, key: KeyId) -> None:
    """Make a key with the roles of another one, which is revoked in the same moment; the secret is printed."""
    with as_admin() as client:
        request = pb.RotateApiKeyRequest(name=f"tenants/{name}/keys/{key}", request_id=new_id())
        answer = client.tenants.RotateApiKey(request, metadata=client.metadata)
    out.print(answer.secret)


@app.command("revoke")
def revoke_key(name: Name, key: KeyId) -> None:
    """Revoke a key, for ever. Gateways hear of it within a second."""
    with as_admin() as client:
        request = pb.RevokeApiKeyRequest(name=f"tenants/{name}/keys/{key}", request_id=new_id())
        client.tenants.RevokeApiKey(request, metadata=client.metadata)
    out.print(f"{request.name} is revoked")


@app.command("suspend")
def suspend(
    names: Names,
    force: Annotated[bool, typer.Option(help="Even if these are more than 10, and a tenth of all.")] = False,
) -> None:
    """Refuse all keys of tenants, until they are resumed."""
    with as_admin() as client:
        request = pb.SuspendTenantsRequest(names=_full(names), force=force, request_id=new_id())
        client.tenants.SuspendTenants(request, metadata=client.metadata)
    out.print(f"{', '.join(names)}: suspended")


@app.command("resume")
def resume(names: Names) -> None:
    """Let the keys of suspended tenants be good again."""
    with as_admin() as client:
        request = pb.ResumeTenantsRequest(names=_full(names), request_id=new_id())
        client.tenants.ResumeTenants(request, metadata=client.metadata)
    out.print(f"{', '.join(names)}: resumed")


def _full(names: list[str]) -> list[str]:
    return [f"tenants/{name}" for name in names]
