"""The Helm chart as the real helm renders it, for a few sets of values."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm"
HELM = shutil.which("helm", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))

needs_helm = pytest.mark.skipif(not HELM, reason="no helm: python tests/deploy/helm.py .venv/bin/helm")

VARIANTS = {
    "as it is": "{}",
    "bare": """
        gateway: {autoscaling: {enabled: false}, replicas: 3}
        network: {enabled: false}
        monitoring: {enabled: false, dashboard: false}
    """,
    "everything": """
        image: {registry: registry.example/, tag: "2.0", pullSecrets: [one, two]}
        settings: {slots: 64, share_prefixes: true, log_level: debug, tenant_bytes: 67108864}
        secretVersion: "3"
        drainSeconds: 100
        tls: {secret: certificates, name: parts.example, clientCertificates: [interventions, inference]}
        database: {authorities: postgres-authorities}
        model: {claim: models, path: large}
        gateway:
          service: {type: LoadBalancer, annotations: {a/b: c}}
          nodeSelector: {pool: small}
          limits: {harbour: {requests_per_minute: 600, tokens_per_minute: 20000000}, clinic: {concurrent: 3}}
        interventions: {tolerations: [{key: k, operator: Exists}]}
        inference:
          arguments:
            gpus: 0.5
            cpus: 4
            autoscaling: {min_replicas: 2, max_replicas: 16, tokens_in_flight: 20000, down_after_seconds: 1200}
            settings: {slots: 128}
          workers:
            min: 1
            max: 8
            resources: {limits: {nvidia.com/gpu: 1, cpu: 8, memory: 32Gi}}
            nodeSelector: {gpu: h100}
            tolerations: [{key: nvidia.com/gpu, operator: Exists}]
          redis: {address: "redis:6379"}
        network:
          clients: [{ipBlock: {cidr: 10.0.0.0/8}}]
          operators: [{podSelector: {matchLabels: {app: console}}}]
          egress: [{ports: [{port: 4317}], to: [{namespaceSelector: {matchLabels: {name: tracing}}}]}]
          database: {peers: [{ipBlock: {cidr: 10.1.2.3/32}}], port: 6432}
        monitoring: {labels: {release: prometheus}}
    """,
}


def helm(*arguments: str, values: str = "{}") -> subprocess.CompletedProcess[str]:
    assert HELM
    return subprocess.run(
        [HELM, *arguments, "--values", "-"], input=values, capture_output=True, text=True, check=False
    )


@cache
def render(values: str) -> list[dict[str, Any]]:
    done = helm("template", "r", str(CHART), "--namespace", "backpack", values=values)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def one(values: str, kind: str, name: str) -> dict[str, Any]:
    (found,) = (o for o in render(values) if (o["kind"], o["metadata"]["name"]) == (kind, name))
    return found


def pods(values: str) -> dict[str, dict[str, Any]]:
    """Every pod template: metadata and spec, by what makes the pods."""
    found = {
        f"{o['kind']} {o['metadata']['name']}": o["spec"]["template"]
        for o in render(values)
        if o["kind"] in ("Deployment", "Job")
    }
    cluster = one(values, "RayService", "r-inference")["spec"]["rayClusterConfig"]
    found["Ray head"] = cluster["headGroupSpec"]["template"]
    found |= {f"Ray {group['groupName']}": group["template"] for group in cluster["workerGroupSpecs"]}
    return found


every = pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS.keys())
DEFAULT, BARE, EVERYTHING = VARIANTS.values()


def environment(template: dict[str, Any]) -> dict[str, Any]:
    (container,) = template["spec"]["containers"]
    return {e["name"]: e.get("value", e.get("valueFrom")) for e in container["env"]}
