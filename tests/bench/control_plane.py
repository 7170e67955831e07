"""The intervention service with 1,000 readers and 20,000 channels, on PostgreSQL.

    python -m tests.bench.control_plane [--readers N] [--tenants N] [--rounds N]

One process is the service, one a whole replica (model micro), one a gateway; each has a watcher of its loop. The other
readers are real streams, one connection each, in two more processes: they acknowledge each change as soon as they have
read it, report every second as readers do, and keep a position only. The store is filled through its transactions, so
that its chain is whole. Everything shares this machine's cores: times are upper bounds.

1. begin: nobody knows anything: first the whole readers, then the others, forty a second, get the whole state.
2. quiet: nothing is written for ten seconds.
3. releases: Activate with wait ALL of a release that is ready: when each reader held it, and when the answer came.
4. restart: the service is stopped and started again: all say Hello at once, with their positions.
5. epoch: a new epoch begins, as after a restore: each gets the whole state again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from backpack_lm.patch import Cell, RevisionContent, ScaleEdit, release_digest
from backpack_proto.v1 import interventions_pb2 as ipb
from backpack_proto.v1 import sync_pb2 as pb
from backpack_proto.v1.interventions_pb2_grpc import ReleaseServiceStub
from backpack_proto.v1.sync_pb2_grpc import FleetServiceStub
from backpack_serving import rpc, starting
from backpack_serving.auth.keys import ApiKeySecret, Role, Verifier
from backpack_serving.interventions import database
from backpack_serving.interventions.database import open_store
from backpack_serving.interventions.records import (
    BlobRecord,
    ChannelRecord,
    EventRecord,
    KeyRecord,
    PatchRecord,
    ReleaseRecord,
    RevisionRecord,
    TenantRecord,
    visible,
)
from backpack_serving.settings import Settings
from pydantic import SecretStr

from tests.bench.control_parts import Part, serve_gateway, serve_interventions, serve_replica, simulate

# Torch is imported by main() only: the other processes import this module too, and are measured.

CHANNELS = 100
"""Of each tenant."""

PROCESSES = 2
"""In which the simulated readers are."""


# ---- the store


def fill(url: str, fingerprint: str, tenants: int, secret: ApiKeySecret) -> None:
    """Tenants with a key, a patch, its revision, two releases, and channels at the second; in one write for fifty."""
    store, now = open_store(url), datetime.now(UTC)
    verifier = Verifier.of(secret.secret)
    for first in range(0, tenants, 50):
        with store.write() as tx:
            changes: list[dict[str, Any]] = []
            for number in range(first, min(first + 50, tenants)):
                tenant = f"t{number}"
                edit = ScaleEdit((Cell(number % 500, 1), Cell(number // 500, 2)), 0.5)
                content = RevisionContent(fingerprint, (edit,))
                digest = release_digest([content.digest])
                key = secret.id if number == 0 else f"k{number}"
                told = [
                    TenantRecord(tenant, now),
                    KeyRecord(tenant, key, str(Role.RELEASER), verifier.salt, verifier.digest, now),
                    *(
                        ChannelRecord(tenant, f"c{n}", 1, digest, 0, 1, now, moved=tx.position.revision)
                        for n in range(CHANNELS)
                    ),
                ]
                for record in (
                    *told,
                    PatchRecord(tenant, "p", "", now),
                    BlobRecord(tenant, content.digest, content.to_bytes()),
                    RevisionRecord(tenant, "p", 1, content.digest, fingerprint, now),
                    ReleaseRecord(tenant, 0, release_digest([]), "[]", "", now),
                    ReleaseRecord(tenant, 1, digest, '[["p", 1]]', "", now),
                ):
                    tx.add(record)
                changes += map(visible, told)
            tx.log(EventRecord(0, "system", "tenants/system", "Fill", "tenants", json.dumps(changes), now))
    store.close()


# ---- what is measured


class Fleet:
    """All parts, and what is asked of them."""

    def __init__(self, settings: Settings, readers: int, secret: ApiKeySecret) -> None:
        self._settings, self._secret = settings, secret
        self.service = Part(serve_interventions, settings)
        self.service.wait()
        self._fingerprint = starting.complete(settings.model, False).fingerprint
        self._key = settings.key_for("replica")
        self.count = readers
        self.simulated: list[Part] = []
        self.whole: dict[str, Part] = {}

    def begin(self, folder: Path) -> None:
        """Start the whole readers."""
        self.begun = time.monotonic()
        for name, target in (("replica", serve_replica), ("gateway", serve_gateway)):
            own = {"state": folder / name, "service_key": SecretStr(self._key), "inference_address": "127.0.0.1:0"}
            self.whole[name] = Part(target, self._settings.model_copy(update=own))
        self.fresh = {name: part.wait() for name, part in self.whole.items()}

    def simulate(self) -> None:
        each = self.count // PROCESSES
        for n in range(PROCESSES):
            arguments = n * each, each, self._settings.interventions_address, self._key, self._fingerprint
            self.simulated.append(Part(simulate, *arguments))

    def ends(self) -> dict[str, int]:
        """Why streams of simulated readers have ended, and how many."""
        return dict(sum((Counter(part.ask("ends")) for part in self.simulated), Counter[str]()))

    def at(self) -> list[tuple[int, int, float, int]]:
        """(epoch, revision, when it was reached, streams opened) of each simulated reader."""
        return [reader for part in self.simulated for reader in part.ask("at")]

    def until(self, epoch: int, revision: int, seconds: float = 300) -> tuple[float, dict[str, float]]:
        """Wait until everybody holds this; when the last simulated reader did, and when each of the whole ones."""
        until, whole = time.monotonic() + seconds, dict[str, float]()
        while True:
            for name, part in self.whole.items():
                if name not in whole and part.ask("at") >= (epoch, revision):
                    whole[name] = time.monotonic()
            simulated = self.at()
            held = [at for e, r, at, _ in simulated if (e, r) >= (epoch, revision)]
            if len(held) == len(simulated) and len(whole) == len(self.whole):
                return max(held, default=0.0), whole
            if time.monotonic() > until:
                raise TimeoutError(f"{len(held)} of {len(simulated)} readers, and {list(whole)}")
            time.sleep(0.5)

    def take(self) -> dict[str, Any]:
        """Holds and memory of the service and of the whole readers since the last call."""
        return {"service": self.service.ask("figures")} | {n: p.ask("figures") for n, p in self.whole.items()}

    def restart(self) -> float:
        """Stop the service and start it again; returns when it served again."""
        self.service.ask("stop")
        self.service.kill()
        self.service = Part(serve_interventions, self._settings)
        self.service.wait()
        return time.monotonic()

    def end(self) -> None:
        for part in (*self.simulated, *self.whole.values(), self.service):
            part.kill()


async def connected(address: str, admin: str, count: int) -> int:
    """Wait until the service counts so many readers at the store's position; the position's revision."""
    async with rpc.channel(address) as channel:
        stub = FleetServiceStub(channel)
        while True:
            request, readers = pb.ListReadersRequest(), []
            while True:
                answer = await stub.ListReaders(request, metadata=rpc.with_key(admin))
                readers += answer.readers
                if not getattr(answer, "next_page_token", ""):
                    break
                request.page_token = answer.next_page_token
            if sum(reader.connected and reader.position == answer.position for reader in readers) >= count:
                return int(answer.position.revision)
            await asyncio.sleep(2)


async def activate(address: str, key: str, rounds: int, fleet: Fleet) -> dict[str, Any]:
    """Seconds until each simulated reader held a release, and until the answer to Activate with wait ALL."""
    held: list[float] = []
    answered: list[float] = []
    async with rpc.channel(address) as channel:
        stub, metadata = ReleaseServiceStub(channel), rpc.with_key(key)
        for number in range(rounds):
            now = (await stub.GetChannel(ipb.GetChannelRequest(name="channels/c0"), metadata=metadata)).channel
            request = ipb.ActivateRequest(channel="channels/c0", release=number % 2, etag=now.etag, wait=ipb.WAIT_ALL)
            request.wait_timeout.FromSeconds(60)
            began = time.monotonic()
            answer = await stub.Activate(request, metadata=metadata)
            answered.append(time.monotonic() - began)
            assert answer.rollout.complete, answer.rollout
            held += [at - began for _, _, at, _ in await asyncio.to_thread(fleet.at)]
            await asyncio.sleep(random.uniform(0.5, 1.0))
    return {"held": _shares(held), "answered": _shares(answered)}


def _shares(values: Sequence[float]) -> dict[str, float]:
    """Median, 99 of 100, and the longest, in milliseconds."""
    ordered = sorted(values)
    at = {"p50": 0.5, "p99": 0.99, "longest": 1.0}
    return {name: 1e3 * ordered[min(len(ordered) - 1, int(share * len(ordered)))] for name, share in at.items()}


def measure(postgres: Any, folder: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    from tests.conftest import free_port  # and that the model is micro

    url, secret = postgres.migrated(), ApiKeySecret.mint()
    settings = Settings(
        state=folder,
        database=url,
        threads=1,
        slots=4,
        **{f"{part}_address": f"127.0.0.1:{free_port()}" for part in ("gateway", "interventions", "directory")},
    )
    fill(url, starting.complete(settings.model, False).fingerprint, chosen.tenants, secret)
    fleet, found = Fleet(settings, chosen.readers, secret), dict[str, Any]()
    address, admin = settings.interventions_address, settings.key_for("admin")
    everybody = fleet.count + 2

    def note(name: str, **more: Any) -> None:
        found[name] = {**more, "parts": fleet.take()}
        print(name, json.dumps(found[name]), file=sys.stderr, flush=True)

    try:
        note("empty")
        fleet.begin(folder)
        revision = asyncio.run(connected(address, admin, 2))
        _, whole = fleet.until(1, revision)
        note("whole", seconds={name: at - fleet.begun for name, at in whole.items()}, fresh=fleet.fresh)

        fleet.simulate()
        asyncio.run(connected(address, admin, everybody))
        note("begin", streams=sum(r[3] for r in fleet.at()), ends=fleet.ends())

        before, began = fleet.service.cpu(), time.monotonic()
        time.sleep(10)
        note("quiet", cores=(fleet.service.cpu() - before) / (time.monotonic() - began))

        note("releases", **asyncio.run(activate(address, str(secret), chosen.rounds, fleet)))

        at = fleet.restart()
        served = at
        asyncio.run(connected(address, admin, everybody))
        note("restart", seconds=time.monotonic() - served, streams=sum(r[3] for r in fleet.at()), ends=fleet.ends())

        began = time.monotonic()
        position = database.raise_epoch(url)
        last, whole = fleet.until(position.epoch, position.revision)
        seconds = {name: at - began for name, at in {"simulated": last, **whole}.items()}
        asyncio.run(connected(address, admin, everybody))
        note("epoch", seconds=seconds, streams=sum(r[3] for r in fleet.at()), ends=fleet.ends())
        return found
    finally:
        fleet.end()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--readers", type=int, default=1000)
    options.add_argument("--tenants", type=int, default=200, help=f"with {CHANNELS} channels each")
    options.add_argument("--rounds", type=int, default=30)
    chosen = options.parse_args()
    from tests.bench.report import write
    from tests.interventions.postgres import Postgres

    postgres = Postgres()
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(postgres, Path(folder), chosen)
    finally:
        postgres.remove()
    rows = []
    for step, figures in found.items():
        for part, seen in figures["parts"].items():
            holds, memory = seen["holds"], seen["memory"]
            longest = (f"{1e3 * holds[name]:.0f}" for name in ("longest", "longest_process", "longest_cpu"))
            rows.append([step, part, *longest, f"{memory['now']:.0f}", f"{memory['most']:.0f}", ""])
        told = {name: value for name, value in figures.items() if name not in ("parts", "fresh")}
        rows[-1][-1] = "; ".join(f"{name} {_rounded(value)}" for name, value in told.items())
    write(
        "control_plane",
        f"The intervention service on PostgreSQL: {chosen.readers} readers, {CHANNELS * chosen.tenants} channels",
        f"python -m tests.bench.control_plane --readers {chosen.readers} --tenants {chosen.tenants}",
        [
            "step",
            "process",
            "longest hold of its loop, ms",
            "without other processes",
            "CPU of the loop's thread",
            "memory, MiB",
            "at most",
            "measured",
        ],
        rows,
        found,
    )


def _rounded(value: Any) -> str:
    """Numbers with three digits, whatever holds them."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_rounded(inner)}" for name, inner in value.items()) or "none"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
