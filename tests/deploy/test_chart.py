"""The Helm chart, rendered by the real helm; the schemas of Kubernetes, KubeRay and the Prometheus operator."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import fields
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from backpack_serving.gateway.limits import Limit
from backpack_serving.inference.autoscaling import Autoscaling
from backpack_serving.settings import Settings

from tests.deploy.chart import (
    BARE,
    CHART,
    DEFAULT,
    EVERYTHING,
    ROOT,
    VARIANTS,
    environment,
    every,
    helm,
    needs_helm,
    one,
    pods,
    refused,
    render,
    validate,
)

pytestmark = needs_helm


# ---- what there is


@every
def test_helm_lint_is_content(values: str) -> None:
    done = helm("lint", "--strict", str(CHART), values=values)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_objects() -> None:
    assert sorted(f"{o['kind']} {o['metadata']['name']}" for o in render(DEFAULT)) == [
        "ConfigMap r-dashboard",
        "Deployment r-gateway",
        "Deployment r-interventions",
        "HorizontalPodAutoscaler r-gateway",
        "Job r-migrations",
        "NetworkPolicy r-gateway",
        "NetworkPolicy r-inference",
        "NetworkPolicy r-interventions",
        "NetworkPolicy r-migrations",
        "NetworkPolicy r-test",
        "Pod r-test",
        "PodDisruptionBudget r-gateway",
        "PodDisruptionBudget r-inference",
        "PodDisruptionBudget r-interventions",
        "PodMonitor r-replicas",
        "PrometheusRule r-alerts",
        "RayService r-inference",
        "Service r-gateway",
        "Service r-gateway-metrics",
        "Service r-interventions",
        "ServiceMonitor r-services",
    ]
    left_out = {o["kind"] for o in render(DEFAULT)} - {o["kind"] for o in render(BARE)}
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
    assert one(DEFAULT, "ConfigMap", "r-dashboard")["data"]["backpack.json"] == (
        (ROOT / "deploy/grafana/dashboards/backpack.json").read_text()
    )
    rules = (ROOT / "deploy/prometheus/rules.yml").read_text()
    here = 'absent(backpack_replicas{installation="backpack/r"})'
    assert one(DEFAULT, "PrometheusRule", "r-alerts")["spec"] == yaml.safe_load(
        rules.replace("absent(backpack_replicas)", here)
    )


# ---- schemas


@every
def test_every_object_is_valid(values: str) -> None:
    for thing in render(values):
        validate(thing)


@every
def test_every_pod_of_ray_is_valid(values: str) -> None:
    for name, template in pods(values).items():
        pod = {**copy.deepcopy(template), "apiVersion": "v1", "kind": "Pod"}
        pod["metadata"]["name"] = name.lower().replace(" ", "-")
        validate(pod)


def test_the_validation_finds_mistakes() -> None:
    thing = copy.deepcopy(one(DEFAULT, "RayService", "r-inference"))
    thing["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]["imagee"] = "x"
    with pytest.raises(jsonschema.ValidationError, match="imagee"):
        validate(thing)
    thing = copy.deepcopy(one(DEFAULT, "Deployment", "r-gateway"))
    thing["spec"]["template"]["spec"]["containers"][0]["imagee"] = "x"
    with pytest.raises(kubernetes_validate.ValidationError, match="imagee"):
        validate(thing)
    thing = copy.deepcopy(one(DEFAULT, "PodMonitor", "r-replicas"))
    thing["spec"]["podMetricsEndpoints"][0]["prot"] = "x"
    with pytest.raises(jsonschema.ValidationError, match="prot"):
        validate(thing)


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
        ("{settings: {slotz: 3}}", "slotz"),
        ("{settings: {slots: many}}", "/settings/slots"),
        ("{settings: {log_format: yaml}}", "/settings/log_format"),
        ("{inference: {arguments: {settings: {precision: float16}}}}", "/precision"),
        ("{settings: {drain: 3}}", "drain"),
        ("{tls: {clientCertificates: [everybody]}}", "/tls/clientCertificates/0"),
        ("{gateway: {limits: {acme: {requests: 3}}}}", "requests"),
        ("{gateway: {resources: {limits: {memory: much}}}}", "/gateway/resources/limits/memory"),
        ("{gateway: {resources: {requests: {cpu: null}}}}", "gateway.resources.requests.cpu is needed"),
        ("{gateway: {autoscaling: {min: 9}}}", "gateway.autoscaling: min (9) is more than max (8)"),
        ("{inference: {arguments: {cpu: 1}}}", "cpu"),
        ("{inference: {arguments: {autoscaling: {min_replicas: 1}}}}", "max_replicas"),
        (
            "{inference: {arguments: {autoscaling: {min_replicas: 3, max_replicas: 2}}}}",
            "inference.arguments.autoscaling: min_replicas (3) is more than max_replicas (2)",
        ),
        ("{inference: {workers: {min: 5}}}", "inference.workers: min (5) is more than max (4)"),
        # What Ray would wait for without a word.
        ("{inference: {arguments: {cpus: 3}}}", "(arguments: cpus 3, gpus 0) doesn't fit into a pod"),
        ("{inference: {arguments: {gpus: 1}}}", "(workers.resources.limits: 2 CPUs, 0 GPUs)"),
        ("{inference: {arguments: {tensor_parallel: 0}}}", "/inference/arguments/tensor_parallel"),
        ("{inference: {arguments: {gpus: 2}}}", "/inference/arguments/gpus"),
        ("{inference: {arguments: {placement: PACK}}}", "/inference/arguments/placement"),
        ("{inference: {arguments: {placement: SPREAD}}}", "there are no ranks to spread (tensor_parallel is 1)"),
        ("{inference: {arguments: {tensor_parallel: 2, gpus: 0.5}}}", "need a GPU each, or none; gpus is 0.5"),
        ("{inference: {arguments: {tensor_parallel: 2, cpus: 0}}}", "cpus and gpus are 0"),
        (
            "{inference: {arguments: {tensor_parallel: 2}}}",
            "2 ranks of a replica (arguments: cpus 2, gpus 0 each) don't fit into a pod (workers.resources.limits: "
            "2 CPUs, 0 GPUs); placement: SPREAD lets them be in several",
        ),
        (
            "{inference: {arguments: {count: 5}}}",
            "5 replicas don't fit into workers.max (4) pods, which hold 1 each",
        ),
        ("{inference: {arguments: {autoscaling: {max_replicas: 5}}}}", "5 replicas don't fit"),
        ("{inference: {workers: {max: none}}}", "/inference/workers/max"),
        ("{inference: {redis: {address: redis}}}", "/inference/redis/address"),
        ("{network: {database: {port: 99999}}}", "/network/database/port"),
    ],
)
def test_wrong_values_are_refused_by_name(values: str, message: str) -> None:
    done = helm("template", "r", str(CHART), values=values)
    assert done.returncode != 0
    assert message in done.stderr


def test_replicas_share_pods_as_ray_counts() -> None:
    """1500m is two CPUs to Ray: four replicas of half a CPU, so sixteen in four pods."""
    values = "inference: {arguments: {cpus: 0.5, count: COUNT}, workers: {resources: {limits: {cpu: 1500m}}}}"
    render(values.replace("COUNT", "16"))
    told = "17 replicas don't fit into workers.max (4) pods, which hold 4 each"
    assert told in refused(values.replace("COUNT", "17"))


def test_ranks_of_a_replica_share_a_pod_or_are_spread() -> None:
    pod = "workers: {resources: {limits: {nvidia.com/gpu: GPUS, cpu: 8}}}"
    values = "{inference: {arguments: {tensor_parallel: 4, gpus: 1, cpus: 1, count: COUNT}, " + pod + "}}"
    packed = values.replace("GPUS", "8")  # two replicas of four GPUs in each of four pods
    render(packed.replace("COUNT", "8"))
    told = "9 replicas of 4 ranks don't fit into workers.max (4) pods, which hold 2 each"
    assert told in refused(packed.replace("COUNT", "9"))
    narrow = values.replace("GPUS", "3")
    assert "4 ranks of a replica" in refused(narrow.replace("COUNT", "1"))
    spread = narrow.replace("tensor_parallel", "placement: SPREAD, tensor_parallel")  # twelve GPUs in all
    (service,) = (thing for thing in render(spread.replace("COUNT", "3")) if thing["kind"] == "RayService")
    (_, replicas) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    assert (replicas["args"]["tensor_parallel"], replicas["args"]["placement"]) == (4, "SPREAD")
    told = "4 replicas of 4 ranks don't fit into workers.max (4) pods, which hold 3 ranks each"
    assert told in refused(spread.replace("COUNT", "4"))


def test_a_release_has_a_name_that_kuberay_takes() -> None:
    assert helm("template", "r" * 37, str(CHART)).returncode == 0
    assert "KubeRay takes 37 characters" in helm("template", "r" * 38, str(CHART)).stderr
    for name in ("1prod", "a.b"):  # helm takes them; a Service and a RayService can't be called so
        assert "must begin with a letter" in helm("template", name, str(CHART)).stderr


def test_the_schema_knows_our_settings_and_arguments() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())["properties"]
    decided = {
        name for values in VARIANTS.values() for template in pods(values).values() for name in _settings(template)
    }
    decided |= {"admin_key", "service_key", "database", "model"}  # secrets, and what has values of its own
    decided |= {"state", "gateway_address", "http_address", "metrics_address"}  # by the images
    decided |= {"ranks"}  # of a replica on one machine; under Ray an argument says how many
    decided -= {*yaml.safe_load(EVERYTHING)["settings"]}  # what operators may decide instead
    settings, told = schema["settings"]["properties"], Settings.model_json_schema()["properties"]
    assert settings.keys() == told.keys() - decided
    bounds = {"type", "pattern", "minimum", "exclusiveMinimum", "maximum", "uniqueItems"}
    for name, setting in settings.items():
        assert {b: setting.get(b) for b in bounds} == {b: told[name].get(b) for b in bounds}, name
    app = pytest.importorskip("backpack_serving.inference.app", reason="Ray isn't installed")
    arguments = schema["inference"]["properties"]["arguments"]["properties"]
    assert arguments.keys() == app.Arguments.model_fields.keys()
    assert arguments["autoscaling"]["properties"].keys() == Autoscaling.model_fields.keys()
    limits = schema["gateway"]["properties"]["limits"]["additionalProperties"]["properties"]
    assert limits.keys() == {field.name for field in fields(Limit)}


def _settings(template: dict[str, Any]) -> set[str]:
    return {name.removeprefix("BACKPACK_").lower() for name in environment(template)}


def test_every_value_is_in_the_schema_and_explained() -> None:
    whole = json.loads((CHART / "values.schema.json").read_text())
    lines = (CHART / "values.yaml").read_text().splitlines()

    # Of settings, of Ray Serve's arguments, of a part's own image and of probes, the values choose some.
    some = {"settings", "arguments", "startupProbe", "readinessProbe", "livenessProbe"}

    def compare(values: dict[str, Any], schema: dict[str, Any], path: str) -> None:
        assert values.keys() == schema["properties"].keys() - {"global"}, path
        for name, value in values.items():
            inner = schema["properties"][name]
            if "$ref" in inner:
                inner = whole["$defs"].get(inner["$ref"].removeprefix("#/$defs/"), {})
            if isinstance(value, dict) and "properties" in inner and name not in some and value:
                compare(value, inner, f"{path}.{name}")

    compare(yaml.safe_load("\n".join(lines)), whole, "values")
    for at, line in enumerate(lines):
        if re.match(r"[a-z]+: \S", line):
            assert "#" in line or lines[at - 1].startswith("#"), f"no comment on {line}"
