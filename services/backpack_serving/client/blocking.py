"""The clients for code without an event loop: method by method what those for asyncio do."""

from __future__ import annotations

from backpack_serving.client.connection import Blocking, blocking, blocking_stream
from backpack_serving.client.operating import AsyncOperator
from backpack_serving.client.steering import AsyncSteering
from backpack_serving.client.text import AsyncClient


class Client(Blocking[AsyncClient]):
    """Text from a gateway. Safe to use from many threads."""

    ASYNC = AsyncClient

    stream = blocking_stream(AsyncClient.stream)
    generate = blocking(AsyncClient.generate)
    score = blocking(AsyncClient.score)
    explain = blocking(AsyncClient.explain)
    compare = blocking(AsyncClient.compare)
    compare_scores = blocking(AsyncClient.compare_scores)
    judge = blocking(AsyncClient.judge)
    senses = blocking(AsyncClient.senses)
    find_senses = blocking(AsyncClient.find_senses)
    map_sense = blocking(AsyncClient.map_sense)
    uses = blocking(AsyncClient.uses)
    tokenize = blocking(AsyncClient.tokenize)
    model = blocking(AsyncClient.model)
    replicas = blocking(AsyncClient.replicas)


class Steering(Blocking[AsyncSteering]):
    """Patches, releases and channels of the key's tenant, from the intervention service.

    Safe to use from many threads.
    """

    ASYNC = AsyncSteering

    create_patch = blocking(AsyncSteering.create_patch)
    patch = blocking(AsyncSteering.patch)
    patches = blocking(AsyncSteering.patches)
    describe_patch = blocking(AsyncSteering.describe_patch)
    delete_patch = blocking(AsyncSteering.delete_patch)
    create_revision = blocking(AsyncSteering.create_revision)
    upload_revision = blocking(AsyncSteering.upload_revision)
    revision = blocking(AsyncSteering.revision)
    revisions = blocking(AsyncSteering.revisions)
    create_release = blocking(AsyncSteering.create_release)
    release = blocking(AsyncSteering.release)
    releases = blocking(AsyncSteering.releases)
    delete_release = blocking(AsyncSteering.delete_release)
    channel = blocking(AsyncSteering.channel)
    channels = blocking(AsyncSteering.channels)
    activate = blocking(AsyncSteering.activate)
    rollback = blocking(AsyncSteering.rollback)
    start_canary = blocking(AsyncSteering.start_canary)
    promote_canary = blocking(AsyncSteering.promote_canary)
    abort_canary = blocking(AsyncSteering.abort_canary)
    status = blocking(AsyncSteering.status)
    until_held = blocking(AsyncSteering.until_held)
    audit = blocking(AsyncSteering.audit)
    verify_audit = blocking(AsyncSteering.verify_audit)


class Operator(Blocking[AsyncOperator]):
    """Tenants, keys and readers, from the intervention service. Needs the admin's key.

    Safe to use from many threads.
    """

    ASYNC = AsyncOperator

    create_tenant = blocking(AsyncOperator.create_tenant)
    tenants = blocking(AsyncOperator.tenants)
    create_key = blocking(AsyncOperator.create_key)
    keys = blocking(AsyncOperator.keys)
    rotate_key = blocking(AsyncOperator.rotate_key)
    revoke_key = blocking(AsyncOperator.revoke_key)
    suspend = blocking(AsyncOperator.suspend)
    resume = blocking(AsyncOperator.resume)
    fleet = blocking(AsyncOperator.fleet)
