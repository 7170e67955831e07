"""The Helm chart as the real helm renders it, for a few sets of values."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm"
KUBERNETES = "1.35"


def _program(name: str) -> str | None:
    """What `make` put beside Python, or what is on PATH."""
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


HELM, HELM_3, KUBECTL = _program("helm"), _program("helm3"), _program("kubectl")
GET = "python tests/deploy/helm.py .venv/bin/helm"

needs_helm = pytest.mark.skipif(not HELM, reason=f"no helm: {GET}")
needs_helm_3 = pytest.mark.skipif(not HELM_3, reason=f"no helm3: {GET}")
needs_kubectl = pytest.mark.skipif(not KUBECTL, reason=f"no kubectl: {GET}")

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


def helm(*arguments: str, values: str = "{}", program: str | None = HELM) -> subprocess.CompletedProcess[str]:
    assert program
    return subprocess.run(
        [program, *arguments, "--values", "-"], input=values, capture_output=True, text=True, check=False
    )


@cache
def render(values: str, chart: Path = CHART, program: str | None = HELM) -> list[dict[str, Any]]:
    done = helm("template", "r", str(chart), "--namespace", "backpack", values=values, program=program)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def refused(values: str) -> str:
    """What helm says of values that it refuses."""
    done = helm("template", "r", str(CHART), values=values)
    assert done.returncode != 0, values
    return done.stderr


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


# ---- schemas


def closed(schema: Any) -> Any:
    """A resource's schema that refuses unknown fields, as a strict API server does."""
    if isinstance(schema, dict):
        schema = {key: closed(value) for key, value in schema.items()}
        open_already = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
        if isinstance(schema.get("properties"), dict) and not open_already:
            schema["additionalProperties"] = False
    elif isinstance(schema, list):
        schema = [closed(value) for value in schema]
    return schema


@cache
def definition() -> dict[str, Any]:
    """The schema of KubeRay's RayService, as its resource definition has it."""
    schema: dict[str, Any] = json.loads((Path(__file__).parent / "rayservice.schema.json").read_text())
    schema["properties"]["metadata"]["additionalProperties"] = True  # metav1.ObjectMeta, which no CRD repeats
    return schema


@cache
def _rayservice() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(closed(definition()))


@cache
def _others(file: str, kind: str) -> jsonschema.Draft202012Validator:
    schemas = json.loads((Path(__file__).parent / file).read_text())
    return jsonschema.Draft202012Validator(closed({"$ref": f"#/$defs/{kind}", "$defs": schemas["$defs"]}))


def validate(thing: dict[str, Any]) -> None:
    """Raises if an API server would refuse this object."""
    if thing["kind"] == "RayService":
        _rayservice().validate(thing)
    elif thing["apiVersion"] == "monitoring.coreos.com/v1":
        _others("monitoring.schema.json", thing["kind"]).validate(thing)
    elif thing["apiVersion"] == "gateway.networking.k8s.io/v1":
        _others("gatewayapi.schema.json", thing["kind"]).validate(thing)
    else:
        kubernetes_validate.validate(thing, KUBERNETES, strict=True)


every = pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS.keys())
DEFAULT, BARE, EVERYTHING = VARIANTS.values()


def environment(template: dict[str, Any]) -> dict[str, Any]:
    container = template["spec"]["containers"][0]
    return {e["name"]: e.get("value", e.get("valueFrom")) for e in container["env"]}
