"""The chart's own pods, run by Docker as Kubernetes and KubeRay do: environment, user, root file system,
mounts, memory, certificates, probes and hooks as rendered; Ray's nodes with the commands that KubeRay gives them.

No API server is involved. PostgreSQL and migrations are those of the compose stack.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml
from backpack_serving.auth.tls import Tls

from tests.deploy.chart import needs_helm, one, pods
from tests.deploy.stack import (
    GATEWAY,
    INTERVENTIONS,
    Stack,
    again,
    needs_engine,
    prepared,
    run,
    text,
    while_streaming,
)
from tests.e2e.conftest import System, copy

pytestmark = [*needs_engine, needs_helm]

VALUES = """
    image: {tag: latest}
    tls: {secret: certificates, name: parts.example, clientCertificates: [inference]}
    drainSeconds: 20
    inference:
      arguments: {count: 1, cpus: 1}
      workers: {min: 1, max: 2}
"""
TENANTS = count()
TOKEN = "0123456789abcdef0123456789abcdef"  # KubeRay makes one for each cluster
# As KubeRay writes them, with the resources of the chart's defaults.
RAY = "--block --dashboard-agent-listen-port=52365 --metrics-export-port=8080"
HEAD = f"ulimit -n 65536; ray start --head {RAY} --dashboard-host=0.0.0.0 --no-monitor --num-cpus=0 --memory=4294967296"
WORKER = f"ulimit -n 65536; ray start --address=r-head:6379 {RAY} --num-cpus=2 --memory=4294967296"
KILLED = 128 + 9  # what a container exits with that had no time left
HEALTHY = "wget --tries 1 -T 10 -q -O- http://localhost:{} | grep success"


class Pods:
    """Containers by the names of the pods they stand for."""

    def __init__(self, stack: Stack, certificates: Path) -> None:
        self.stack, self._certificates = stack, certificates
        self.started: list[str] = []

    def start(self, template: dict[str, Any], name: str, *alias: str, command: str = "", port: str = "") -> None:
        (container,) = template["spec"]["containers"]
        context = {**template["spec"]["securityContext"], **container["securityContext"]}
        assert context["capabilities"] == {"drop": ["ALL"]}
        flags = [
            f"--user={context['runAsUser']}:{context['runAsGroup']}",
            "--cap-drop=ALL",
            "--security-opt=no-new-privileges",
            f"--read-only={str(context.get('readOnlyRootFilesystem', False)).lower()}",
            f"--memory={container['resources']['limits']['memory'].removesuffix('i')}",
            "--shm-size=1g",
            *(f"--network-alias={a}" for a in (name, *alias)),
        ]
        for variable in container["env"]:
            flags.append(f"--env={variable['name']}={self._value(variable, container['resources'])}")
        if command:
            flags += ["--env=RAY_AUTH_MODE=token", f"--env=RAY_AUTH_TOKEN={TOKEN}", "--entrypoint=/bin/bash"]
        for mount in container["volumeMounts"]:
            source = f"{self._certificates}:" if mount["name"] == "tls" else ""
            flags.append(f"--volume={source}{mount['mountPath']}{':ro' if mount.get('readOnly') else ''}")
        if port:
            flags.append(f"--publish={port}:{port.rpartition(':')[2].replace('1847', '847')}")
        inside = f"{self.stack.project}_inside"
        subprocess.run(["docker", "rm", "--force", "--volumes", name], capture_output=True, check=False)
        run("docker", "create", f"--name={name}", f"--network={inside}", *flags, container["image"],
            *(["-c", command] if command else []))  # fmt: skip
        self.started.append(name)
        if port:
            run("docker", "network", "connect", f"{self.stack.project}_outside", name)
        run("docker", "start", name)

    def _value(self, variable: dict[str, Any], resources: dict[str, Any]) -> str:
        if "valueFrom" not in variable:
            return str(variable.get("value", ""))
        if resource := variable["valueFrom"].get("resourceFieldRef"):
            kind, _, name = resource["resource"].partition(".")
            return str(resources[kind][name])
        return (self.stack.secrets / variable["valueFrom"]["secretKeyRef"]["key"]).read_text()

    def inside(self, name: str, *command: str) -> str:
        return run("docker", "exec", name, *command)

    def until(self, name: str, *command: str, seconds: float = 600) -> str:
        """What a command prints in a container, once it succeeds."""
        until, said = time.monotonic() + seconds, ""
        while time.monotonic() < until:
            try:
                return self.inside(name, *command)
            except AssertionError as error:
                said = str(error)
                time.sleep(2)
        raise AssertionError(f"{name}: {said}\n{run('docker', 'logs', '--tail', '40', name)}")

    def remove(self) -> None:
        for name in self.started:
            subprocess.run(["docker", "rm", "--force", "--volumes", name], capture_output=True, check=False)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    authority = trustme.CA()
    issued = authority.issue_cert("parts.example", "localhost")
    authority.cert_pem.write_to_path(folder / "ca.crt")
    issued.private_key_pem.write_to_path(folder / "tls.key")
    for pem in issued.cert_chain_pems:
        pem.write_to_path(folder / "tls.crt", append=True)
    for file in (folder, *folder.iterdir()):
        file.chmod(0o755)
    for parent in list(folder.parents)[:3]:
        parent.chmod(parent.stat().st_mode | 0o055)
    return folder


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, certificates: Path) -> Iterator[Pods]:
    with prepared(tmp_path_factory.mktemp("stack"), "backpack-chart") as stack:
        stack.up("postgres")
        stack.compose("up", "--no-build", "--no-start", "gateway")  # for the network of those who are called
        stack.compose("run", "--rm", "migrations")
        found = Pods(stack, certificates)
        templates = pods(VALUES)
        try:
            found.start(templates["Deployment r-interventions"], "r-interventions", port=INTERVENTIONS)
            found.start(templates["Ray head"], "r-head", command=HEAD)
            found.until("r-head", "bash", "-c", HEALTHY.format("52365/api/local_raylet_healthz"))
            found.until("r-head", "bash", "-c", HEALTHY.format("8265/api/gcs_healthz"))
            found.start(templates["Ray replicas"], "r-worker", "r-directory", command=WORKER)
            found.until("r-worker", "bash", "-c", HEALTHY.format("52365/api/local_raylet_healthz"))
            _deploy(found)
            found.start(templates["Deployment r-gateway"], "r-gateway", port=GATEWAY)
            yield found
        except BaseException:
            for name in found.started:
                print(name, run("docker", "logs", "--tail", "30", name))
            raise
        finally:
            found.remove()


def _deploy(found: Pods) -> None:
    """What KubeRay's operator does with serveConfigV2: it puts it to the dashboard of the head, with the token."""
    config = yaml.safe_load(one(VALUES, "RayService", "r-inference")["spec"]["serveConfigV2"])
    put = (
        "import urllib.request as u\n"
        f"headers = {{'Authorization': 'Bearer {TOKEN}', 'Content-Type': 'application/json'}}\n"
        "url = 'http://localhost:8265/api/serve/applications/'\n"
        f"request = u.Request(url, {json.dumps(config)!r}.encode(), headers, method='PUT')\n"
        "print(u.urlopen(request).status)"
    )
    found.until("r-head", "python", "-c", put)


@pytest.fixture
async def system(running: Pods, certificates: Path) -> AsyncIterator[System]:
    tls = Tls(authorities=certificates / "ca.crt", name="parts.example")
    system = System(GATEWAY, INTERVENTIONS, running.stack.settings, tls=tls, _names=TENANTS)
    yield system
    await system.close()


async def test_steered_text_comes_through_the_chart_s_pods_with_tls(running: Pods, system: System) -> None:
    running.until("r-worker", "backpack", "health", "127.0.0.1:9000", "--replicas", "1")
    running.until("r-worker", "bash", "-c", HEALTHY.format("8000/-/healthz"))
    for part in ("gateway", "interventions"):
        probe = pods(VALUES)[f"Deployment r-{part}"]["spec"]["containers"][0]["readinessProbe"]["exec"]["command"]
        assert "SERVING" in running.until(f"r-{part}", *probe)
    ship, plain = await system.tenant(copy("king", "ship")), await system.tenant()
    steered, unsteered = await text(system, ship), await text(system, plain)
    print(f"steered {steered!r}, unsteered {unsteered!r}", flush=True)
    assert steered != unsteered


def test_replicas_take_gateways_only(running: Pods) -> None:
    """Who has no certificate by the authority doesn't get as far as a call."""
    plain = "env -u BACKPACK_TLS_CERTIFICATE -u BACKPACK_TLS_KEY backpack health r-worker:8480"
    with pytest.raises(AssertionError, match="UNAVAILABLE"):
        running.inside("r-gateway", "sh", "-c", plain)
    assert "SERVING" in running.inside("r-gateway", "backpack", "health", "r-worker:8480")


def test_metrics_are_told_over_tls(running: Pods) -> None:
    scrape = (
        "import ssl, urllib.request as u\n"
        "c = ssl.create_default_context(cafile='/tls/ca.crt'); c.check_hostname = False\n"
        "c.load_cert_chain('/tls/tls.crt', '/tls/tls.key')\n"
        "print(u.urlopen('https://{}:9464/metrics', context=c).read().decode())"
    )
    assert "backpack_replicas 1.0" in running.inside("r-gateway", "python", "-c", scrape.format("localhost"))
    assert "backpack_replica_releases" in running.inside("r-gateway", "python", "-c", scrape.format("r-worker"))


def test_nothing_was_killed_for_its_memory_or_writes_where_it_may_not(running: Pods) -> None:
    for name in ("r-gateway", "r-interventions", "r-head", "r-worker"):
        state = json.loads(run("docker", "inspect", "--format", "{{json .State}}", name))
        assert (state["Running"], state["OOMKilled"]) == (True, False), name
        with pytest.raises(AssertionError, match=r"Permission denied|Read-only"):
            running.inside(name, "touch", "/opt/backpack/x")


async def test_a_pod_that_is_stopped_lets_its_streams_finish_or_be_tried_again(running: Pods, system: System) -> None:
    """As the kubelet does: the hook first if there is one, then SIGTERM, then the grace period."""
    key = await system.tenant(copy("king", "ship"))
    code, ended = await while_streaming(system, key, lambda: _stop(running, "Deployment r-gateway", "r-gateway"))
    assert code == 0
    assert {tokens for tokens, _ in ended} == {0}, "it drained: what had begun went on to its end"

    run("docker", "start", "r-gateway")
    await again(lambda: text(system, key))
    code, ended = await while_streaming(system, key, lambda: _stop(running, "Ray replicas", "r-worker"))
    assert code != KILLED
    assert {error.code for _, error in ended} == {"UNAVAILABLE"}
    assert {error.reason for tokens, error in ended if tokens} <= {"DRAINING"}, "Ray drained the node first"


def test_a_head_that_is_stopped_ends_in_its_time(running: Pods) -> None:
    assert _stop(running, "Ray head", "r-head") != KILLED


def _stop(running: Pods, pod: str, name: str) -> int:
    spec = pods(VALUES)[pod]["spec"]
    if hook := spec["containers"][0].get("lifecycle", {}).get("preStop"):
        run("docker", "exec", name, *hook["exec"]["command"])
    run("docker", "stop", "--time", str(spec.get("terminationGracePeriodSeconds", 30)), name)
    return int(run("docker", "inspect", "--format", "{{.State.ExitCode}}", name))
