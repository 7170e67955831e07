"""`backpack tenant …`: tenants and their API keys."""

from __future__ import annotations

from typing import Annotated

import typer

from backpack_serving.auth.keys import write_key_file
from backpack_serving.cli.client import as_admin, err, out, table, when
from backpack_serving.client import Role
from backpack_serving.settings import Settings

app = typer.Typer(no_args_is_help=True, help="Tenants and their API keys; needs the admin key.")

Name = Annotated[str, typer.Argument(help="Name of the tenant.")]
Names = Annotated[list[str], typer.Argument(help="Names of the tenants.")]
KeyId = Annotated[str, typer.Argument(help="The key's id, as `backpack tenant keys` shows it.")]


@app.command("create")
def create_tenant(
    name: Annotated[str, typer.Argument(help="a-z, 0-9 and -")],
    print_key: Annotated[
        bool,
        typer.Option("--print-key", help="Print the key instead of writing it to the state folder (in containers)."),
    ] = False,
) -> None:
    """Create a tenant, with a key that may release and call, stored in the state folder for --as.

    From a pod or a container, whose files go with it: `backpack tenant create NAME --print-key`
    """
    with as_admin() as operator:
        if print_key:
            made = operator.create_tenant(name)
            err.print(f"{made.name}; its key is printed once, and kept nowhere")
            out.print(operator.create_key(name, [Role.RELEASER, Role.CALLER]).secret)
            return
        file = Settings().key_file(name)
        if file.exists():  # a tenant's that was called so before, or the admin's and the replicas' own
            raise FileExistsError(f"{file} exists, and its key would be lost; move it away, or take another name")
        file.parent.mkdir(parents=True, exist_ok=True)  # before there is a secret that would be lost
        made = operator.create_tenant(name)
        write_key_file(operator.create_key(name, [Role.RELEASER, Role.CALLER]).secret, file)
    out.print(f"{made.name}; its key is in {file}")


@app.command("list")
def list_tenants() -> None:
    """List all tenants."""
    with as_admin() as operator:
        tenants = operator.tenants()
    for tenant in tenants:
        out.print(f"{tenant.name}  [dim]{when(tenant.made)}[/]" + "  suspended" * tenant.suspended)


@app.command("key")
def create_key(
    name: Annotated[str, typer.Argument(help="Tenant of the key.")],
    role: Annotated[
        list[Role],
        typer.Option(help="author, releaser or caller; of the tenant system, admin or replica. Repeatable."),
    ],
) -> None:
    """Create an API key. The secret is printed once and stored nowhere."""
    with as_admin() as operator:
        out.print(operator.create_key(name, role).secret)


@app.command("keys")
def list_keys(name: Name) -> None:
    """List a tenant's keys, without their secrets."""
    with as_admin() as operator:
        keys = operator.keys(name)
    shown = table("key", "roles", "made", "")
    for key in keys:
        shown.add_row(key.id, " ".join(key.roles), when(key.made), "revoked" * key.revoked)
    out.print(shown)


@app.command("rotate")
def rotate_key(name: Name, key: KeyId) -> None:
    """Replace a key by a new one with the same roles, revoke the old one, and print the new secret."""
    with as_admin() as operator:
        out.print(operator.rotate_key(name, key).secret)


@app.command("revoke")
def revoke_key(name: Name, key: KeyId) -> None:
    """Revoke a key for ever. Gateways apply it within a second; running streams of the key go on."""
    with as_admin() as operator:
        operator.revoke_key(name, key)
    out.print(f"tenants/{name}/keys/{key} is revoked")


@app.command("suspend")
def suspend(
    names: Names,
    force: Annotated[
        bool, typer.Option(help="Suspend even more than 10 tenants that are more than a tenth of all.")
    ] = False,
) -> None:
    """Suspend tenants: refuse all their keys until `tenant resume`."""
    with as_admin() as operator:
        operator.suspend(names, force=force)
    out.print(f"{', '.join(names)}: suspended")


@app.command("resume")
def resume(names: Names) -> None:
    """Resume suspended tenants: accept their keys again."""
    with as_admin() as operator:
        operator.resume(names)
    out.print(f"{', '.join(names)}: resumed")
