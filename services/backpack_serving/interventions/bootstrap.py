"""Composes the intervention service from its settings, and starts it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import structlog
from backpack_lm.manifest import TOKENIZER
from backpack_lm.tokenizer import Tokenizer
from google.protobuf.message import DecodeError
from pydantic import SecretStr

from backpack_serving import rpc, starting, tasks
from backpack_serving.auth.identity import Identities
from backpack_serving.auth.keys import ApiKeySecret, Principal, Role, read_key_file, write_key_file
from backpack_serving.errors import ServiceError, Unauthenticated
from backpack_serving.interventions.database import open_store
from backpack_serving.interventions.rollouts import ErrorGate, Rollouts
from backpack_serving.interventions.service import Interventions
from backpack_serving.interventions.servicer import services
from backpack_serving.interventions.store import MAX_MESSAGE_BYTES, Store
from backpack_serving.interventions.sync_servicer import SyncServicer
from backpack_serving.interventions.write_notifier import WriteNotifier
from backpack_serving.observability.metrics import Metrics
from backpack_serving.settings import Settings
from backpack_serving.shared_read import SharedRead
from backpack_serving.sync.messages import Hello, ReaderReport
from backpack_serving.sync.standing import read_standing, write_standing

log = structlog.get_logger(__name__)

CLOSE_SECONDS = 2.0
"""How long a start that failed or was cancelled waits for its store to close: one of its threads may still use it."""


@dataclass(frozen=True, slots=True)
class InterventionService:
    """A running intervention service."""

    server: rpc.Server
    store: Store
    drain: float
    failed: asyncio.Event
    """Set when the store has stopped for good: the process must be restarted."""
    background: tuple[asyncio.Task[None], ...]

    @property
    def address(self) -> str:
        return self.server.address

    async def stop(self) -> None:
        await self.server.stop(self.drain)
        await tasks.end(*self.background)
        await asyncio.to_thread(self.store.close)


async def start(settings: Settings, metrics: Metrics) -> InterventionService:
    """Serve on `settings.interventions_address`, once the database and the model's files are there.

    Raises ServiceError if the database can't be used, or not for this model, OSError if the address is taken or
    the state folder can't be written to, ManifestError if there is no model, ValueError if a key, certificates or
    the issuer of tokens are no good.
    """
    await starting.blocking(partial(rpc.check_address, settings.interventions_address))
    manifest = await starting.model(settings)
    tokenizer = await starting.blocking(partial(Tokenizer.read, settings.model / TOKENIZER, manifest.tokenizer))
    url = settings.database_url

    async def opened() -> Store:
        return await starting.blocking(partial(open_store, url), discard=lambda late: late.close())

    store: Store = await starting.wait_for("the database", opened, settings.start_wait)
    failed, loop = asyncio.Event(), asyncio.get_running_loop()

    def fail(why: str) -> None:
        log.critical("the store has stopped; start the service again", reason=why)
        loop.call_soon_threadsafe(failed.set)

    try:
        writes, bound = WriteNotifier(), settings.degradation if starting.can_judge(settings) else math.inf
        shape = replace(manifest.shape, spell=tokenizer.piece)
        service = Interventions(store, shape, on_write=writes.notify, degradation=bound)
        rollouts = Rollouts(service, ErrorGate(settings.canary_requests, settings.canary_errors))

        def on_remote_reader(text: str) -> None:
            try:
                loop.call_soon_threadsafe(rollouts.receive_remote, *read_standing(text))
            except (ValueError, ServiceError, DecodeError) as error:
                log.warning("another version of the service tells of a reader", error=str(error))

        store.listen(writes.notify, fail, on_remote_reader)

        def prepare() -> None:
            service.channels.check_model(settings.force_model)
            admin = _operator_key("BACKPACK_ADMIN_KEY", settings.admin_key, settings.key_file("admin"))
            replica = _operator_key("BACKPACK_SERVICE_KEY", settings.service_key, settings.key_file("replica"))
            service.tenants.bootstrap(admin, [Role.ADMIN])
            service.tenants.bootstrap(replica, [Role.REPLICA])

        # PostgreSQL may be lost at this moment too; a file that can't be written to stays so.
        wait = 0.0 if url.startswith("sqlite") else settings.start_wait
        await starting.wait_for("the database", lambda: starting.blocking(prepare), wait)

        checks: dict[str, SharedRead[Principal]] = {}  # of keys that are being looked up

        async def by_key(presented: str) -> Principal:
            """All readers have the same key, and call at once after a restart: they share a look into the database."""
            check = checks.get(presented)
            if check is None:
                look_up = partial(asyncio.to_thread, service.tenants.authenticate, presented)
                check = checks[presented] = SharedRead(look_up)
            try:
                return await check.get()
            finally:
                if check.idle:
                    checks.pop(presented, None)

        async def check_tenant(principal: Principal) -> None:
            await asyncio.to_thread(service.tenants.check_tenant, principal)

        identities = Identities(by_key, check_tenant, settings.issuer, settings.certificates)
        sync = SyncServicer(service, identities, rollouts)
        starting.freeze_heap()  # before readers come, after a restart all at once: it holds the loop
        server = await rpc.start(
            services(service, tokenizer, identities, sync, rollouts),
            settings.interventions_address,
            metrics.calls("interventions"),
            tls=settings.tls,
            connection_age=settings.connection_age,
        )
    except BaseException:
        with suppress(TimeoutError):  # its thread goes on; that doesn't keep the process from ending
            async with asyncio.timeout(CLOSE_SECONDS):
                await starting.blocking(store.close)
        raise
    publishing = rollouts.publish(lambda standing: store.publish(list(_write_all(standing))))
    background = tuple(map(asyncio.create_task, (publishing, sync.follow(writes))))
    return InterventionService(server, store, settings.drain, failed, background)


def _write_all(standing: Iterable[tuple[Hello, ReaderReport]]) -> Iterator[str]:
    """The status of readers as messages; a reader whose status can't be sent doesn't keep the others' from it."""
    for hello, report in standing:
        try:
            yield write_standing(hello, report, MAX_MESSAGE_BYTES - 100)
        except ValueError as error:
            log.error("a reader is unknown to the other processes of the service", error=str(error))


def _operator_key(variable: str, given: SecretStr, file: Path) -> ApiKeySecret:
    """The key that the operator chose, else the one in the state folder, made on the first start.

    Raises ValueError, saying where it is, if it isn't a whole key.
    """
    chosen = given.get_secret_value()
    try:
        return ApiKeySecret.parse(chosen or mint_key(file))
    except Unauthenticated as error:
        fix = "`backpack secrets` makes one" if chosen else "remove the file for a new one"
        raise ValueError(f"{variable if chosen else file}: {error.message}; or {fix}") from None


def mint_key(file: Path) -> str:
    """The key in a file that only its owner can read; a new one if there is no such file."""
    if not file.exists():
        write_key_file(str(ApiKeySecret.mint()), file)
    return read_key_file(file)
