"""The Helm chart, rendered by the real helm and read by Kubernetes' schemas, KubeRay's, and Ray Serve itself."""

from __future__ import annotations

import copy
import json
import os
import re
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
from backpack_serving.settings import Settings

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm"
HELM = shutil.which("helm", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
KUBERNETES = "1.35"
RAY_PORTS = {6379, 8265, 10001, 8000, 8080, 52365}

pytestmark = pytest.mark.skipif(not HELM, reason="no helm: python tests/deploy/helm.py .venv/bin/helm")

VARIANTS = {
    "as it is": "{}",
    "bare": """
        gateway: {autoscaling: {enabled: false}, replicas: 3}
        network: {enabled: false}
        monitoring: {enabled: false, dashboard: false}
    """,
    "everything": """
        image: {registry: registry.example/, tag: "2.0", pullSecrets: [one, two]}
        settings: {slots: 64, share_prefixes: true, log_level: debug}
        model: {claim: models, path: large}
        gateway:
          service: {type: LoadBalancer, annotations: {a/b: c}}
          nodeSelector: {pool: small}
          drainSeconds: 100
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
          database: {peers: [{ipBlock: {cidr: 10.1.2.3/32}}], port: 6432}
        monitoring: {labels: {release: prometheus}}
    """,
}


def _helm(*arguments: str, values: str = "{}") -> subprocess.CompletedProcess[str]:
    assert HELM
    return subprocess.run(
        [HELM, *arguments, "--values", "-"], input=values, capture_output=True, text=True, check=False
    )


@cache
def _render(values: str) -> list[dict[str, Any]]:
    done = _helm("template", "r", str(CHART), "--namespace", "backpack", values=values)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def _one(values: str, kind: str, name: str) -> dict[str, Any]:
    (found,) = (o for o in _render(values) if (o["kind"], o["metadata"]["name"]) == (kind, name))
    return found


def _pods(values: str) -> dict[str, dict[str, Any]]:
    """Every pod template: metadata and spec, by what makes the pods."""
    pods = {
        f"{o['kind']} {o['metadata']['name']}": o["spec"]["template"]
        for o in _render(values)
        if o["kind"] in ("Deployment", "Job")
    }
    cluster = _one(values, "RayService", "r-inference")["spec"]["rayClusterConfig"]
    pods["Ray head"] = cluster["headGroupSpec"]["template"]
    pods |= {f"Ray {group['groupName']}": group["template"] for group in cluster["workerGroupSpecs"]}
    return pods


every = pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS.keys())
DEFAULT, BARE, EVERYTHING = VARIANTS.values()


# ---- what there is


@every
def test_helm_lint_is_content(values: str) -> None:
    done = _helm("lint", "--strict", str(CHART), values=values)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_objects() -> None:
    assert sorted(f"{o['kind']} {o['metadata']['name']}" for o in _render(DEFAULT)) == [
        "ConfigMap r-dashboard",
        "Deployment r-gateway",
        "Deployment r-interventions",
        "HorizontalPodAutoscaler r-gateway",
        "Job r-migrations",
        "NetworkPolicy r-gateway",
        "NetworkPolicy r-inference",
        "NetworkPolicy r-interventions",
        "NetworkPolicy r-migrations",
        "PodDisruptionBudget r-gateway",
        "PodDisruptionBudget r-inference",
        "PodDisruptionBudget r-interventions",
        "PodMonitor r-replicas",
        "PrometheusRule r-alerts",
        "RayService r-inference",
        "Service r-gateway",
        "Service r-interventions",
        "ServiceMonitor r-services",
    ]
    left_out = {o["kind"] for o in _render(DEFAULT)} - {o["kind"] for o in _render(BARE)}
    assert left_out == {
        "ConfigMap", "HorizontalPodAutoscaler", "NetworkPolicy", "PodMonitor", "PrometheusRule", "ServiceMonitor",
    }  # fmt: skip


def test_there_is_one_copy_of_what_others_read_too() -> None:
    links = {file.name: str(file.readlink()) for file in (CHART / "files").iterdir()}
    assert links == {
        "serve.yaml": "../../ray/serve.yaml",
        "dashboard.json": "../../grafana/dashboards/backpack.json",
        "rules.yml": "../../prometheus/rules.yml",
    }
    assert _one(DEFAULT, "ConfigMap", "r-dashboard")["data"]["backpack.json"] == (
        (ROOT / "deploy/grafana/dashboards/backpack.json").read_text()
    )
    rules = yaml.safe_load((ROOT / "deploy/prometheus/rules.yml").read_text())
    assert _one(DEFAULT, "PrometheusRule", "r-alerts")["spec"] == rules


# ---- schemas


def _closed(schema: Any) -> Any:
    """A resource's schema that refuses unknown fields, as a strict API server does."""
    if isinstance(schema, dict):
        schema = {key: _closed(value) for key, value in schema.items()}
        open_already = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
        if isinstance(schema.get("properties"), dict) and not open_already:
            schema["additionalProperties"] = False
    elif isinstance(schema, list):
        schema = [_closed(value) for value in schema]
    return schema


@cache
def _rayservice() -> jsonschema.Draft202012Validator:
    schema = json.loads((Path(__file__).parent / "rayservice.schema.json").read_text())
    schema["properties"]["metadata"]["additionalProperties"] = True  # metav1.ObjectMeta, which no CRD repeats
    return jsonschema.Draft202012Validator(_closed(schema))


@every
def test_every_object_is_valid(values: str) -> None:
    for thing in _render(values):
        if thing["kind"] == "RayService":
            _rayservice().validate(thing)
        elif thing["apiVersion"] != "monitoring.coreos.com/v1":  # no schema of those is at hand; see below
            kubernetes_validate.validate(thing, KUBERNETES, strict=True)


@every
def test_every_pod_of_ray_is_valid(values: str) -> None:
    for name, template in _pods(values).items():
        pod = {"apiVersion": "v1", "kind": "Pod", **copy.deepcopy(template)}
        pod["metadata"]["name"] = name.lower().replace(" ", "-")
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_the_validation_finds_mistakes() -> None:
    thing = copy.deepcopy(_one(DEFAULT, "RayService", "r-inference"))
    thing["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]["imagee"] = "x"
    with pytest.raises(jsonschema.ValidationError, match="imagee"):
        _rayservice().validate(thing)
    thing = copy.deepcopy(_one(DEFAULT, "Deployment", "r-gateway"))
    thing["spec"]["template"]["spec"]["containers"][0]["imagee"] = "x"
    with pytest.raises(kubernetes_validate.ValidationError, match="imagee"):
        kubernetes_validate.validate(thing, KUBERNETES, strict=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("{gatway: {}}", "gatway"),
        ("{gateway: {replicas: 0}}", "/gateway/replicas"),
        ("{gateway: {service: {type: Public}}}", "/gateway/service/type"),
        ("{gateway: {autoscaling: {cpuPercent: 0}}}", "cpuPercent"),
        ("{image: {registry: registry.example}}", "/image/registry"),
        ("{secret: ''}", "/secret"),
        ("{settings: {service_key: bp_1}}", "service_key"),
        ("{inference: {workers: {max: none}}}", "/inference/workers/max"),
        ("{inference: {redis: {address: redis}}}", "/inference/redis/address"),
        ("{network: {database: {port: 99999}}}", "/network/database/port"),
    ],
)
def test_wrong_values_are_refused_by_name(values: str, message: str) -> None:
    done = _helm("template", "r", str(CHART), values=values)
    assert done.returncode != 0
    assert message in done.stderr


def test_every_value_is_in_the_schema_and_explained() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    lines = (CHART / "values.yaml").read_text().splitlines()

    def compare(values: dict[str, Any], schema: dict[str, Any], path: str) -> None:
        assert values.keys() == schema["properties"].keys() - {"global"}, path
        for name, value in values.items():
            inner = schema["properties"][name]
            if isinstance(value, dict) and "properties" in inner:
                compare(value, inner, f"{path}.{name}")

    compare(yaml.safe_load("\n".join(lines)), schema, "values")
    for at, line in enumerate(lines):
        if re.match(r"[a-z]+: \S", line):
            assert "#" in line or lines[at - 1].startswith("#"), f"no comment on {line}"


# ---- what they promise


@every
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_ray_serve_itself_takes_the_config(values: str) -> None:
    pytest.importorskip("ray")
    from backpack_serving.inference import app
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build
    from ray.serve.schema import ServeDeploySchema

    service = _one(values, "RayService", "r-inference")["spec"]
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["serveConfigV2"]))
    for application in config.applications:
        build(getattr(app, application.import_path.partition(":")[2]), application.args)
    given = yaml.safe_load(values).get("inference", {}).get("arguments", {})
    (replicas,) = (a for a in config.applications if a.name == app.REPLICAS)
    assert given.items() <= replicas.args.items()
    # Gateways call the directory where KubeRay makes its service, which takes over a port named `serve` only.
    (port,) = service["serveService"]["spec"]["ports"]
    assert port == {"name": "serve", "port": config.grpc_options.port}
    address = f"{service['serveService']['metadata']['name']}:{port['port']}"
    environment = _environment(_pods(values)["Deployment r-gateway"])
    assert environment["BACKPACK_DIRECTORY_ADDRESS"] == address
    assert environment["BACKPACK_DIRECTORY_APPLICATION"] == app.DIRECTORY
    head = service["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert "serve" not in {p["name"] for p in head["ports"]}, "or KubeRay would prefer it"


def _environment(template: dict[str, Any]) -> dict[str, Any]:
    (container,) = template["spec"]["containers"]
    return {e["name"]: e.get("value", e.get("valueFrom")) for e in container["env"]}


@every
def test_processes_get_settings_that_exist_and_secrets_by_reference(values: str) -> None:
    for name, template in _pods(values).items():
        environment = _environment(template)
        assert {n.removeprefix("BACKPACK_").lower() for n in environment} <= Settings.model_fields.keys(), name
        secret = {"BACKPACK_SERVICE_KEY", "BACKPACK_ADMIN_KEY", "BACKPACK_DATABASE"} & environment.keys()
        for variable, value in environment.items():
            assert isinstance(value, str) == (variable not in secret), (name, variable)
    who = {name: _environment(t) for name, t in _pods(values).items()}
    assert {name for name, e in who.items() if "BACKPACK_ADMIN_KEY" in e} == {"Deployment r-interventions"}
    assert not any(o["kind"] == "Secret" for o in _render(values))


def test_settings_of_the_operator_reach_every_process() -> None:
    for name, template in _pods(EVERYTHING).items():
        environment = _environment(template)
        if name != "Job r-migrations":
            assert (environment["BACKPACK_SLOTS"], environment["BACKPACK_SHARE_PREFIXES"]) == ("64", "true"), name
            assert environment["BACKPACK_MODEL"] == "/models/large", name
            assert {"name": "model", "mountPath": "/models", "readOnly": True} in template["spec"]["containers"][
                0
            ]["volumeMounts"]
        assert template["spec"]["containers"][0]["image"].startswith("registry.example/backpack-"), name
        assert template["spec"]["imagePullSecrets"] == [{"name": "one"}, {"name": "two"}], name


@every
def test_nobody_runs_as_root_or_may_become_it(values: str) -> None:
    for name, template in _pods(values).items():
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True, name
        for container in template["spec"]["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, name
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, name
            assert container["securityContext"].get("readOnlyRootFilesystem", False) == (
                not name.startswith("Ray")
            ), name


@every
def test_what_serves_is_probed_disturbed_with_care_and_has_the_time_to_drain(values: str) -> None:
    for part, port in (("gateway", 8470), ("interventions", 8471)):
        template = _pods(values)[f"Deployment r-{part}"]
        container = template["spec"]["containers"][0]
        assert container["readinessProbe"]["grpc"]["port"] == port
        assert "grpc" not in container["livenessProbe"], "no replica is no reason to restart a gateway"
        drain = float(_environment(template).get("BACKPACK_DRAIN", Settings.model_fields["drain"].default))
        assert template["spec"]["terminationGracePeriodSeconds"] >= drain
        strategy = _one(values, "Deployment", f"r-{part}")["spec"]["strategy"]["rollingUpdate"]
        assert strategy == {"maxUnavailable": 0, "maxSurge": 1}
    for part in ("gateway", "interventions", "inference"):
        budget = _one(values, "PodDisruptionBudget", f"r-{part}")["spec"]
        assert budget["maxUnavailable"] == 1
        labels = budget["selector"]["matchLabels"].items()
        guarded = {name for name, t in _pods(values).items() if labels <= t["metadata"]["labels"].items()}
        assert guarded == {"Ray replicas" if part == "inference" else f"Deployment r-{part}"}


def test_migrations_run_before_new_processes_and_as_the_owner_of_the_schema() -> None:
    job = _one(DEFAULT, "Job", "r-migrations")
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    assert _environment(_pods(DEFAULT)["Job r-migrations"]) == {
        "BACKPACK_DATABASE": {"secretKeyRef": {"name": "backpack", "key": "owner_database"}}
    }


# ---- networks


def _ports(rule: dict[str, Any]) -> set[int]:
    return {
        p for entry in rule.get("ports", []) for p in range(entry["port"], entry.get("endPort", entry["port"]) + 1)
    }


def _peers(rule: dict[str, Any], side: str) -> list[str]:
    component = "app.kubernetes.io/component"
    return [
        peer.get("podSelector", {}).get("matchLabels", {}).get(component, "other") for peer in rule.get(side, [])
    ]


def test_every_pod_has_a_policy_for_both_directions() -> None:
    policies = [o for o in _render(DEFAULT) if o["kind"] == "NetworkPolicy"]
    for name, template in _pods(DEFAULT).items():
        labels = template["metadata"]["labels"].items()
        held = [p for p in policies if p["spec"]["podSelector"]["matchLabels"].items() <= labels]
        assert [p["spec"]["policyTypes"] for p in held] == [["Ingress", "Egress"]], name


def test_ports_of_ray_and_of_engines_stay_inside() -> None:
    rules = _one(DEFAULT, "NetworkPolicy", "r-inference")["spec"]["ingress"]
    for rule in rules:
        assert rule["from"], "a rule without peers lets everybody in"
        peers = set(_peers(rule, "from"))
        if not rule.get("ports"):
            assert peers == {"inference"}, "every port: for Ray's own pods only"
        elif "gateway" in peers:
            assert peers == {"gateway"}
            assert _ports(rule) == {9000, *range(8480, 8496)}
            assert not _ports(rule) & RAY_PORTS
        else:
            assert peers == {"other"}
            assert _ports(rule) <= RAY_PORTS | set(range(9464, 9480))
    assert not any(
        o["kind"] == "Service" and o["spec"]["selector"].get("app.kubernetes.io/component") == "inference"
        for o in _render(DEFAULT)
    ), "KubeRay makes the only service: the directory's"


def test_engines_listen_on_ports_that_gateways_may_call() -> None:
    from backpack_serving.inference import app

    allowed = _ports(_one(DEFAULT, "NetworkPolicy", "r-gateway")["spec"]["egress"][2])
    first = int(_environment(_pods(DEFAULT)["Ray replicas"])["BACKPACK_INFERENCE_ADDRESS"].rpartition(":")[2])
    assert set(range(first, first + app.PORTS)) <= allowed


def test_only_migrations_and_interventions_reach_the_database() -> None:
    reach = {
        p["metadata"]["name"]
        for p in _render(EVERYTHING)
        if p["kind"] == "NetworkPolicy" and any(6432 in _ports(rule) for rule in p["spec"]["egress"])
    }
    assert reach == {"r-interventions", "r-migrations"}


def test_clients_and_operators_can_be_narrowed_down() -> None:
    (clients, _) = _one(EVERYTHING, "NetworkPolicy", "r-gateway")["spec"]["ingress"]
    assert clients["from"] == [{"ipBlock": {"cidr": "10.0.0.0/8"}}]
    (callers, _) = _one(EVERYTHING, "NetworkPolicy", "r-interventions")["spec"]["ingress"]
    assert _peers(callers, "from") == ["gateway", "inference", "other"]
    assert callers["from"][-1] == {"podSelector": {"matchLabels": {"app": "console"}}}


# ---- monitoring and scaling


def test_monitors_find_every_port_of_metrics() -> None:
    services = [o for o in _render(EVERYTHING) if o["kind"] == "Service"]
    monitor = _one(EVERYTHING, "ServiceMonitor", "r-services")
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    for service in services:
        assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
        assert monitor["spec"]["endpoints"][0]["port"] in {p["name"] for p in service["spec"]["ports"]}
    monitor = _one(EVERYTHING, "PodMonitor", "r-replicas")
    workers = _pods(EVERYTHING)["Ray replicas"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= workers["metadata"]["labels"].items()
    named = {p["name"]: p["containerPort"] for p in workers["spec"]["containers"][0]["ports"]}
    assert [named[e["port"]] for e in monitor["spec"]["podMetricsEndpoints"]] == [9464, 9465, 9466, 9467]


def test_gateways_are_scaled_by_their_processors_and_slowly_down() -> None:
    scaler = _one(DEFAULT, "HorizontalPodAutoscaler", "r-gateway")["spec"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (2, 8)
    assert scaler["behavior"]["scaleDown"]["stabilizationWindowSeconds"] == 600
    assert "replicas" not in _one(DEFAULT, "Deployment", "r-gateway")["spec"], "the scaler's to decide"
    assert _one(BARE, "Deployment", "r-gateway")["spec"]["replicas"] == 3
