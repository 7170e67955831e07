"""`backpack health`: the probe that containers and operators ask with."""

from __future__ import annotations

from typing import Annotated

import typer

from backpack_serving.cli.client import exits, out
from backpack_serving.errors import NotFound, ServiceError
from backpack_serving.rpc import probe
from backpack_serving.settings import Settings


@exits()
def health(
    address: Annotated[
        str,
        typer.Argument(help="host:port of a gateway, replica, directory or intervention service, or http://host:port."),
    ],
    service: Annotated[str, typer.Option(help="A single service, such as backpack.v1.InferenceService.")] = "",
    replicas: Annotated[
        int, typer.Option(min=0, help="The server is a directory: at least so many replicas must take requests.")
    ] = 0,
    timeout: Annotated[float, typer.Option(min=0.1, max=3600.0, help="Seconds to wait for the answer.")] = 5.0,
) -> None:
    """Check the health of a server (grpc.health.v1; /readyz of http://…). Exit with status 0 if it serves, else 1."""
    settings = Settings()
    try:
        if address.startswith(("http://", "https://")):
            from backpack_serving.http.probe import ready

            healthy, said = ready(address, timeout, settings.tls)
        elif replicas:
            count = probe.replicas(address, settings.directory_metadata, timeout, settings.directory_tls)
            healthy, said = count >= replicas, f"replicas that take requests: {count}"
        else:
            said, why = probe.health(address, service, timeout, settings.tls)
            healthy, said = said == "SERVING", f"{said}: {why}" if why else said
    except ServiceError as error:
        unknown = service and isinstance(error, NotFound)  # of which grpc's own server says no more
        healthy, said = False, f"{error.code} {f'it has no {service}' if unknown else error.message}"
    out.print(f"{address} {said}", markup=False)
    if not healthy:
        raise typer.Exit(1)
