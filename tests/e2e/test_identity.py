"""One system and three kinds of credentials: API keys, tokens, client certificates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from backpack_proto.v1 import inference_pb2 as pb
from backpack_proto.v1 import interventions_pb2 as ipb
from backpack_serving import rpc
from backpack_serving.auth.keys import Holder, Role
from backpack_serving.auth.tls import Tls
from backpack_serving.errors import ServiceError

from tests.auth.test_oidc import AUDIENCE, Provider
from tests.auth.test_tls import NAME, Authority
from tests.e2e.conftest import Metadata, System, running

PROMPT = "The king"
CLIENT = "clinic.acme.example"


async def _refused(call: Any) -> tuple[str, str]:
    with pytest.raises(ServiceError) as refused, rpc.errors():
        await call
    return refused.value.code, refused.value.reason


async def test_tokens_beside_api_keys(tmp_path: Path) -> None:
    provider = Provider()
    try:
        issued = {"jwt_issuer": provider.url, "jwt_audience": AUDIENCE}
        async with running(tmp_path, slots=4, **issued) as system:
            await _tokens(system, provider)
    finally:
        provider.close()


async def _tokens(system: System, provider: Provider) -> None:
    def bearer(**claims: Any) -> Metadata:
        return rpc.with_key(provider.token(**claims))

    # The gateway and the intervention service take the same token, and both take the tenant from it.
    key = await system.tenant()
    tenant = (await system.stream(key, PROMPT, max_tokens=1))[0].served.tenant
    caller, author = bearer(tenant=tenant), bearer(tenant=tenant, roles=["releaser"], sub="auth0|7")
    assert (await system.stream(caller, PROMPT, max_tokens=1))[0].served.tenant == tenant
    await system.patches.CreatePatch(ipb.CreatePatchRequest(patch_id="by-token"), metadata=author)
    patches = (await system.patches.ListPatches(ipb.ListPatchesRequest(), metadata=key)).patches
    assert "by-token" in {p.name.rpartition("/")[2] for p in patches}
    entry = (await system.audit.ListAuditEntries(ipb.ListAuditEntriesRequest(), metadata=key)).entries[0]
    assert entry.principal == f"tenants/{tenant}/subjects/auth0%7C7"

    ask = pb.GenerateRequest(prompt=pb.Prompt(text=PROMPT), sampling=pb.Sampling(max_tokens=1))
    listing, making = ipb.ListPatchesRequest(), ipb.CreateTenantRequest(tenant_id="mine")
    forbidden, unknown = ("PERMISSION_DENIED", "MISSING_ROLE"), "UNAUTHENTICATED"
    for call, refusal in (
        (system.inference.Generate(ask, metadata=author), forbidden),
        (system.patches.ListPatches(listing, metadata=caller), forbidden),
        (system.tenants.CreateTenant(making, metadata=author), forbidden),
        (system.inference.Generate(ask, metadata=bearer(tenant=tenant, exp=1)), (unknown, "EXPIRED_TOKEN")),
        (system.patches.ListPatches(listing, metadata=bearer(aud="another")), (unknown, "BAD_TOKEN")),
        (system.inference.Generate(ask, metadata=bearer(tenant=tenant, roles=["admin"])), (unknown, "BAD_ROLES")),
        (system.patches.ListPatches(listing, metadata=bearer(tenant="ghost")), (unknown, "UNKNOWN_TENANT")),
        (system.inference.Generate(ask, metadata=bearer(tenant="ghost")), ("NOT_FOUND", "NO_SUCH_CHANNEL")),
        (system.inference.Generate(ask), (unknown, "NO_CREDENTIAL")),
        (system.inference.Generate(ask, metadata=[("authorization", "Basic eDp5")]), (unknown, "NO_CREDENTIAL")),
    ):
        assert await _refused(call) == refusal
    admin = bearer(tenant="system", roles=["admin"])
    made = await system.tenants.CreateTenant(making, metadata=admin)
    assert made.tenant.name == "tenants/mine"


async def test_client_certificates_are_credentials(tmp_path: Path) -> None:
    servers, clients = Authority(tmp_path, "servers"), Authority(tmp_path, "clients")
    certificate, key = servers.issue()
    both = tmp_path / "both.pem"
    both.write_bytes(servers.file.read_bytes() + clients.file.read_bytes())
    tls = {
        "tls_certificate": certificate,
        "tls_key": key,
        "tls_client_ca": both,
        "tls_ca": servers.file,
        "tls_name": NAME,
        "certificates": {
            CLIENT: Holder("clinic", (Role.RELEASER, Role.CALLER)),
            "ops.acme.example": Holder("system", (Role.ADMIN,)),
            "wrong.acme.example": Holder("clinic", (Role.ADMIN,)),
        },
    }
    async with running(tmp_path, slots=4, **tls) as system:
        await system.tenants.CreateTenant(ipb.CreateTenantRequest(tenant_id="clinic"), metadata=system.admin)
        key_of_another = await system.tenant()

        def client(name: str) -> System:
            identity = Authority.issue(clients, name)
            known = Tls(*identity, authorities=servers.file, name=NAME)
            return System(system.gateway, system.interventions, system.settings, tls=known)

        ops = client("ops.acme.example")
        listed = await ops.tenants.ListTenants(ipb.ListTenantsRequest())
        assert "tenants/clinic" in {t.name for t in listed.tenants}
        await ops.close()

        clinic = client(CLIENT)
        await clinic.patches.CreatePatch(ipb.CreatePatchRequest(patch_id="p"))
        await clinic.known(())
        assert (await clinic.stream((), PROMPT, max_tokens=1))[0].served.tenant == "clinic"
        # A key says who calls, whatever the connection is.
        assert (await clinic.stream(key_of_another, PROMPT, max_tokens=1))[0].served.tenant != "clinic"
        assert await _refused(clinic.tenants.ListTenants(ipb.ListTenantsRequest())) == (
            "PERMISSION_DENIED",
            "MISSING_ROLE",
        )
        await clinic.close()

        for name, reason in (("wrong.acme.example", "BAD_ROLES"), ("nobody.acme.example", "NO_CREDENTIAL")):
            other = client(name)
            assert await _refused(other.patches.ListPatches(ipb.ListPatchesRequest())) == (
                "UNAUTHENTICATED",
                reason,
            )
            await other.close()
