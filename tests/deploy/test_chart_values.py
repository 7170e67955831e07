"""Values that operators know from other charts: what each changes, and what it leaves as it is."""

from __future__ import annotations

import copy
import json
import runpy
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.chart import (
    CHART,
    DEFAULT,
    EVERYTHING,
    HELM,
    HELM_3,
    ROOT,
    VARIANTS,
    environment,
    helm,
    needs_helm,
    needs_helm_3,
    one,
    pods,
    refused,
    render,
    validate,
)

pytestmark = needs_helm

EXTENDED = (Path(__file__).parent / "extended_values.yaml").read_text()
VERSION = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
POD: dict[str, Any] = yaml.safe_load(EXTENDED)["tests"]
PARTS = [
    "Deployment r-gateway",
    "Deployment r-interventions",
    "Deployment r-http",
    "Job r-migrations",
    "Ray head",
    "Ray replicas",
]


def _test_pod(values: str) -> dict[str, Any]:
    return one(values, "Pod", "r-test")


def _all_pods(values: str) -> dict[str, dict[str, Any]]:
    return {**pods(values), "Pod r-test": _test_pod(values)}


# ---- pods


def test_every_object_of_the_extended_values_is_valid() -> None:
    for thing in render(EXTENDED):
        validate(thing)
    for name, template in pods(EXTENDED).items():
        pod = {**copy.deepcopy(template), "apiVersion": "v1", "kind": "Pod"}
        pod["metadata"]["name"] = name.lower().replace(" ", "-")
        validate(pod)


@pytest.mark.parametrize("name", [*PARTS, "Pod r-test"])
def test_a_part_s_pods_take_what_pods_can_have(name: str) -> None:
    given = POD
    template = _all_pods(EXTENDED)[name]
    spec = template["spec"]
    for field in (
        "nodeSelector", "tolerations", "affinity", "topologySpreadConstraints", "priorityClassName",
        "runtimeClassName", "schedulerName", "serviceAccountName",
    ):  # fmt: skip
        assert spec[field] == given[field], field
    assert given["podLabels"].items() <= template["metadata"]["labels"].items()
    assert given["podAnnotations"].items() <= template["metadata"]["annotations"].items()
    container = spec["containers"][0]
    variables = [{k: v for k, v in e.items() if v != ""} for e in given["extraEnv"]]
    assert container["env"][-3:] == variables
    assert container["envFrom"] == given["envFrom"]
    assert [c["name"] for c in spec["initContainers"]] == ["first"]
    assert given["extraVolumes"][0] in spec["volumes"]
    assert given["extraVolumeMounts"][0] in container["volumeMounts"]
    if not name.startswith(("Job", "Pod")):
        assert spec["containers"][-1]["name"] == "beside"


def test_labels_and_annotations_of_all_are_on_every_object_and_pod_and_select_nothing() -> None:
    for thing in render(EXTENDED):
        assert thing["metadata"]["labels"]["cost"] == "research", thing
        assert thing["metadata"]["annotations"]["example.com/owner"] == "words", thing
        assert "research" not in json.dumps(thing["spec"].get("selector", {})) if "spec" in thing else True
    for name, template in _all_pods(EXTENDED).items():
        assert {"cost": "research", "everywhere": "1"}.items() <= template["metadata"]["labels"].items(), name
        assert template["metadata"]["annotations"]["everywhere"] == "1", name


def test_labels_of_the_operator_don_t_replace_those_that_services_select_by() -> None:
    values = "{podLabels: {app.kubernetes.io/component: mine}, gateway: {podLabels: {app.kubernetes.io/name: mine}}}"
    labels = pods(values)["Deployment r-gateway"]["metadata"]["labels"]
    assert one(values, "Service", "r-gateway")["spec"]["selector"].items() <= labels.items()


def test_a_variable_that_the_chart_sets_is_refused_where_it_would_be_there_twice() -> None:
    """Kubernetes' server-side apply takes no list that names one twice."""
    for at, name in (
        ("gateway", "BACKPACK_SERVICE_KEY"),
        ("interventions", "BACKPACK_DATABASE"),
        ("migrations", "BACKPACK_DATABASE"),
    ):
        told = refused(f"{{{at}: {{extraEnv: [{{name: {name}, value: x}}]}}}}")
        assert f"{at}.extraEnv: {name} is set by the chart" in told
    told = refused("{inference: {workers: {extraEnv: [{name: A, value: one}, {name: A, value: two}]}}}")
    assert "inference.workers.extraEnv: A is set by the chart or by `settings`, or is there twice" in told


def test_containers_of_the_operator_keep_to_the_restricted_standard_unless_they_say_otherwise() -> None:
    for name, template in _all_pods(EXTENDED).items():
        for container in (*template["spec"]["initContainers"], *template["spec"]["containers"]):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False, name
            assert context["capabilities"] == {"drop": ["ALL"]}, name
    own = "{gateway: {sidecarContainers: [{name: x, image: y, securityContext: {runAsUser: 3}}]}}"
    assert pods(own)["Deployment r-gateway"]["spec"]["containers"][1]["securityContext"] == {"runAsUser": 3}


def test_users_can_be_left_to_the_cluster() -> None:
    values = "{podSecurityContext: {runAsUser: null, runAsGroup: null, fsGroup: null}}"
    for name, template in pods(values).items():
        context = template["spec"]["securityContext"]
        assert context == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}, name


def test_pods_have_an_account_of_their_own_if_wanted() -> None:
    assert not any("serviceAccountName" in t["spec"] for t in _all_pods(DEFAULT).values())
    made = "{serviceAccount: {create: true, annotations: {a/b: c}}}"
    account = one(made, "ServiceAccount", "r")
    assert account["metadata"]["annotations"] == {"a/b": "c"}
    assert account["automountServiceAccountToken"] is False
    accounts = {name: t["spec"].get("serviceAccountName") for name, t in _all_pods(made).items()}
    # Migrations run before it is made; KubeRay gives Ray's head one with rights.
    assert accounts == {
        "Deployment r-gateway": "r", "Deployment r-interventions": "r", "Ray replicas": "r",
        "Ray head": None, "Job r-migrations": None, "Pod r-test": None,
    }  # fmt: skip
    there = "{serviceAccount: {name: there}}"
    assert pods(there)["Ray replicas"]["spec"]["serviceAccountName"] == "there"
    assert not [o for o in render(there) if o["kind"] == "ServiceAccount"]


def test_an_image_is_named_for_all_parts_or_for_one() -> None:
    found = {name: t["spec"]["containers"][0] for name, t in _all_pods(EXTENDED).items()}
    images = {name: (c["image"], c["imagePullPolicy"]) for name, c in found.items()}
    part = (f"mirror.example/words/part@sha256:{'0' * 64}", "IfNotPresent")
    assert images == {
        "Deployment r-gateway": part,
        "Deployment r-interventions": part,
        "Deployment r-http": part,
        "Pod r-test": part,
        "Job r-migrations": (f"backpack-migrations:{VERSION}", "IfNotPresent"),
        "Ray head": ("engine:gpu", "Always"),
        "Ray replicas": ("engine:gpu", "Always"),
    }
    registry = "{image: {registry: all.example/, tag: t}, gateway: {image: {repository: g}}}"
    assert pods(registry)["Deployment r-gateway"]["spec"]["containers"][0]["image"] == "all.example/g:t"


def test_keys_of_the_secret_may_be_called_otherwise() -> None:
    asked = {
        (name, variable, value["secretKeyRef"]["key"])
        for name, template in pods(EXTENDED).items()
        for variable, value in environment(template).items()
        if isinstance(value, dict) and "secretKeyRef" in value
    }
    assert asked == {
        ("Deployment r-gateway", "BACKPACK_SERVICE_KEY", "service"),
        ("Deployment r-interventions", "BACKPACK_ADMIN_KEY", "admin"),
        ("Deployment r-interventions", "BACKPACK_DATABASE", "url"),
        ("Deployment r-interventions", "BACKPACK_SERVICE_KEY", "service"),
        ("Job r-migrations", "BACKPACK_DATABASE", "owner-url"),
        ("Ray head", "BACKPACK_SERVICE_KEY", "service"),
        ("Ray replicas", "BACKPACK_SERVICE_KEY", "service"),
    }
    options = one(EXTENDED, "RayService", "r-inference")["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]
    assert options["redisPassword"]["valueFrom"]["secretKeyRef"]["key"] == "redis"


# ---- names


@pytest.mark.parametrize(
    ("values", "prefix", "label"),
    [
        ("{}", "r", "backpack"),
        ("{nameOverride: words}", "r-words", "words"),
        ("{fullnameOverride: words}", "words", "backpack"),
    ],
)
def test_names_follow_the_release_or_the_overrides(values: str, prefix: str, label: str) -> None:
    for thing in render(values):
        assert thing["metadata"]["name"].startswith(f"{prefix}-"), thing["metadata"]["name"]
        assert thing["metadata"]["labels"]["app.kubernetes.io/name"] == label
    gateway = one(values, "Deployment", f"{prefix}-gateway")["spec"]["template"]
    assert environment(gateway)["BACKPACK_INTERVENTIONS_ADDRESS"] == f"{prefix}-interventions:8471"
    service = one(values, "RayService", f"{prefix}-inference")["spec"]["serveService"]
    assert environment(gateway)["BACKPACK_DIRECTORY_ADDRESS"] == f"{service['metadata']['name']}:9000"
    monitor = one(values, "ServiceMonitor", f"{prefix}-services")["spec"]["selector"]["matchLabels"]
    assert monitor.items() <= one(values, "Service", f"{prefix}-interventions")["metadata"]["labels"].items()


def test_an_override_has_to_be_a_name_that_kuberay_takes() -> None:
    assert "KubeRay takes 37 characters" in refused(f"fullnameOverride: {'r' * 38}")
    assert "must begin with a letter" in refused("fullnameOverride: 1prod")
    assert "fullnameOverride" in refused("fullnameOverride: A.B")


# ---- ways in


@pytest.mark.parametrize(("part", "port"), [("gateway", 8470), ("interventions", 8471)])
def test_a_service_takes_what_load_balancers_ask_for(part: str, port: int) -> None:
    service = one(EXTENDED, "Service", f"r-{part}")["spec"]
    assert service["type"] == "LoadBalancer"
    assert service["loadBalancerClass"] == "example.com/internal"
    assert service["loadBalancerSourceRanges"] == ["10.0.0.0/8"]
    assert service["externalTrafficPolicy"] == "Local"
    assert (service["ports"][0]["port"], service["ports"][0]["nodePort"]) == (port, 30070)
    told = refused(f"{{{part}: {{service: {{loadBalancerClass: x}}}}}}")
    assert f"{part}.service: loadBalancerClass is of a service of type LoadBalancer" in told


@pytest.mark.parametrize(("part", "port"), [("gateway", 8470), ("interventions", 8471)])
def test_calls_come_in_by_an_ingress_or_by_the_gateway_api(part: str, port: int) -> None:
    ingress = one(EXTENDED, "Ingress", f"r-{part}")
    assert ingress["metadata"]["annotations"]["a/b"] == "c"
    (rule,) = ingress["spec"]["rules"]
    assert rule["host"] == "llm.example.com"
    (path,) = rule["http"]["paths"]
    named = {p["name"]: p["port"] for p in one(EXTENDED, "Service", f"r-{part}")["spec"]["ports"]}
    assert path["backend"]["service"] == {"name": f"r-{part}", "port": {"name": "grpc"}}
    assert named["grpc"] == port
    route = one(EXTENDED, "GRPCRoute", f"r-{part}")["spec"]
    assert route["parentRefs"] == [{"name": "edge", "namespace": "gateways"}]
    assert route["rules"][0]["backendRefs"] == [{"name": f"r-{part}", "port": port}]
    for kind, name in (("ingress", "hosts"), ("grpcRoute", "parentRefs")):
        assert f"{part}.{kind}.{name} is empty" in refused(f"{{{part}: {{{kind}: {{enabled: true}}}}}}")


def test_gateways_that_are_ready_have_addresses_of_their_own_in_a_headless_service() -> None:
    service = one(EXTENDED, "Service", "r-gateway-headless")
    assert service["spec"]["clusterIP"] == "None"
    assert not service["spec"].get("publishNotReadyAddresses", False)
    labels = pods(EXTENDED)["Deployment r-gateway"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert not [o for o in render(DEFAULT) if o["metadata"]["name"] == "r-gateway-headless"]


# ---- probes, budgets, scaling


@pytest.mark.parametrize("part", ["gateway", "interventions"])
def test_probes_keep_their_questions_and_take_other_numbers(part: str) -> None:
    (before, after) = (pods(v)[f"Deployment r-{part}"]["spec"]["containers"][0] for v in (DEFAULT, EXTENDED))
    assert after["startupProbe"] == before["startupProbe"] | {"failureThreshold": 300}
    assert after["readinessProbe"] == before["readinessProbe"] | {"periodSeconds": 7, "failureThreshold": 5}
    assert after["livenessProbe"] == before["livenessProbe"] | {"timeoutSeconds": 9}


@pytest.mark.parametrize("part", ["gateway", "interventions"])
def test_a_start_waits_for_what_is_missing_as_long_as_its_probe_allows(part: str) -> None:
    for values, waits in ((DEFAULT, "100"), (EXTENDED, "580")):
        template = pods(values)[f"Deployment r-{part}"]
        probe = template["spec"]["containers"][0]["startupProbe"]
        assert environment(template)["BACKPACK_START_WAIT"] == waits
        assert float(waits) < probe["periodSeconds"] * probe["failureThreshold"], "or who waits is killed"


def test_budgets_can_be_tuned_or_left_out() -> None:
    for part in ("gateway", "interventions"):
        budget = one(EXTENDED, "PodDisruptionBudget", f"r-{part}")["spec"]
        assert (budget["minAvailable"], budget["unhealthyPodEvictionPolicy"]) == ("50%", "IfHealthyBudget")
        assert "maxUnavailable" not in budget, "Kubernetes takes one of the two"
    assert one(EXTENDED, "PodDisruptionBudget", "r-inference")["spec"]["minAvailable"] == 0
    off: dict[str, Any] = {"podDisruptionBudget": {"enabled": False}}
    none = yaml.safe_dump({"gateway": off, "interventions": off, "inference": {"workers": off}})
    assert not [o for o in render(none) if o["kind"] == "PodDisruptionBudget"]


def test_gateways_can_be_scaled_by_metrics_of_the_operator() -> None:
    scaler = one(EXTENDED, "HorizontalPodAutoscaler", "r-gateway")["spec"]
    assert [m["type"] for m in scaler["metrics"]] == ["Pods"]
    assert scaler["behavior"]["scaleUp"] == {"stabilizationWindowSeconds": 30}
    assert scaler["behavior"]["scaleDown"]["stabilizationWindowSeconds"] == 600, "the rest stays"
    assert "neither cpuPercent nor metrics" in refused("{gateway: {autoscaling: {cpuPercent: null}}}")


# ---- workers


def test_a_worker_has_no_hook_that_ends_itself_and_the_time_to_drain() -> None:
    """`ray stop` ends the container's first process, and the hook with it. Ray drains a node on SIGTERM."""
    for values in VARIANTS.values():
        worker = pods(values)["Ray replicas"]["spec"]
        container = worker["containers"][0]
        assert "lifecycle" not in container
        drain = float(environment({"spec": worker})["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        calls = float(environment({"spec": worker})["BACKPACK_DRAIN"])
        assert calls + 10 < drain < worker["terminationGracePeriodSeconds"], "Serve gives a replica ten seconds more"
        head = environment(pods(values)["Ray head"])
        assert head["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] == "0", "nothing moves away from it: it would wait in vain"


def test_ray_knows_the_variable_that_says_how_long_a_node_drains() -> None:
    constants = pytest.importorskip("ray._private.ray_constants", reason="Ray isn't installed")
    assert constants.RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S == 30


def test_kernels_and_tables_can_be_kept_on_a_volume() -> None:
    def mounted(values: str) -> tuple[Any, Any]:
        spec = pods(values)["Ray replicas"]["spec"]
        mounts = [m for m in spec["containers"][0]["volumeMounts"] if m["name"] == "cache"]
        return mounts, [v for v in spec["volumes"] if v["name"] == "cache"]

    assert mounted(DEFAULT) == ([], [])
    mount = {"name": "cache", "mountPath": "/var/lib/backpack/.cache"}
    claim = {"name": "cache", "persistentVolumeClaim": {"claimName": "kernels"}}
    assert mounted(EXTENDED) == ([mount], [claim])
    folder = {"name": "cache", "hostPath": {"path": "/var/cache/backpack", "type": "Directory"}}
    assert mounted("{inference: {cache: {hostPath: /var/cache/backpack}}}") == ([mount], [folder])
    assert "either claim or hostPath" in refused("{inference: {cache: {claim: a, hostPath: /b}}}")


# ---- helm test


@pytest.mark.parametrize("values", [DEFAULT, EVERYTHING, EXTENDED], ids=["as it is", "everything", "extended"])
def test_helm_test_asks_gateways_and_the_service_by_the_names_that_clients_use(values: str) -> None:
    pod = _test_pod(values)
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    assert pod["spec"]["restartPolicy"] == "Never"
    asked = [c["command"] for c in pod["spec"]["containers"]]
    assert asked == [["backpack", "health", "r-gateway:8470"], ["backpack", "health", "r-interventions:8471"]]
    assert all(c["securityContext"]["readOnlyRootFilesystem"] for c in pod["spec"]["containers"])
    names = {e["name"] for c in pod["spec"]["containers"] for e in c["env"]}
    assert not any(name.endswith(("_KEY", "DATABASE")) and "TLS" not in name for name in names), "no secret"
    if yaml.safe_load(values).get("tls"):
        assert {"BACKPACK_TLS_CA", "BACKPACK_TLS_NAME"} <= names


def test_what_helm_test_starts_is_let_out_and_in_whoever_else_may_call() -> None:
    labels = _test_pod(EVERYTHING)["metadata"]["labels"].items()
    out = one(EVERYTHING, "NetworkPolicy", "r-test")["spec"]
    assert out["podSelector"]["matchLabels"].items() <= labels
    assert {p["port"] for rule in out["egress"] for p in rule["ports"]} == {53, 8470, 8471}
    for part in ("gateway", "interventions"):
        rule = one(EVERYTHING, "NetworkPolicy", f"r-{part}")["spec"]["ingress"][0]
        selectors = [p["podSelector"]["matchLabels"].items() for p in rule["from"] if "podSelector" in p]
        assert any(selector <= labels for selector in selectors), part
    off = "{tests: {enabled: false}}"
    assert not [o for o in render(off) if o["metadata"]["name"] == "r-test"]


# ---- the chart as others get it


def test_the_readme_of_values_is_made_from_them() -> None:
    values, script = (CHART / "values.yaml").read_text(), runpy.run_path(str(ROOT / "deploy" / "chart.py"))
    assert (CHART / "README.md").read_text() == script["readme"](values), "python deploy/chart.py writes it anew"
    named = {name for name, _, _ in script["table"](values)}

    def leaves(value: Any, path: str) -> set[str]:
        if isinstance(value, dict) and value and path not in named:
            return {leaf for key, inner in value.items() for leaf in leaves(inner, f"{path}.{key}".strip("."))}
        return {path}

    assert {leaf for leaf in leaves(yaml.safe_load(values), "") if leaf} <= named


@needs_helm_3
@pytest.mark.parametrize("values", [*VARIANTS.values(), EXTENDED], ids=[*VARIANTS, "extended"])
def test_helm_3_renders_what_helm_4_does(values: str) -> None:
    assert render(values, program=HELM_3) == render(values)


@pytest.mark.parametrize("program", [HELM, pytest.param(HELM_3, marks=needs_helm_3)], ids=["helm 4", "helm 3"])
def test_the_package_has_files_and_no_links_and_renders_the_same(program: str | None, tmp_path: Path) -> None:
    assert program
    subprocess.run([program, "package", str(CHART), "--destination", str(tmp_path)], check=True, capture_output=True)
    (package,) = tmp_path.iterdir()
    with tarfile.open(package) as members:
        found = {member.name: member for member in members}
        assert all(member.isfile() for member in found.values())
        for link in (CHART / "files").iterdir():
            packed = members.extractfile(f"backpack/files/{link.name}")
            assert packed
            assert packed.read() == link.read_bytes()
    assert "backpack/README.md" in found
    assert render(EVERYTHING, chart=package) == render(EVERYTHING)


def test_make_packages_the_chart() -> None:
    done = subprocess.run(["make", "-n", "chart"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "package deploy/helm --destination dist" in done.stdout


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("{gateway: {extraEnv: [{name: A, valeu: b}]}}", "/gateway/extraEnv/0"),
        ("{gateway: {sidecarContainers: [{image: b}]}}", "/gateway/sidecarContainers/0"),
        ("{gateway: {image: {digest: abc}}}", "/gateway/image/digest"),
        ("{gateway: {startupProbe: {exec: {}}}}", "/gateway/startupProbe"),
        ("{gateway: {podDisruptionBudget: {minAvailable: half}}}", "/gateway/podDisruptionBudget/minAvailable"),
        ("{interventions: {service: {externalTrafficPolicy: Far}}}", "externalTrafficPolicy"),
        ("{secretKeys: {adminKey: ''}}", "/secretKeys/adminKey"),
        ("{inference: {cache: {hostPath: relative}}}", "/inference/cache/hostPath"),
        ("{inference: {workers: {affinity: []}}}", "/inference/workers/affinity"),
        ("{commonLabels: {a: 1}}", "/commonLabels/a"),
    ],
)
def test_wrong_values_of_these_are_refused_by_name(values: str, message: str) -> None:
    assert message in refused(values)


def test_a_value_that_pods_take_is_tried_of_every_part() -> None:
    """One that is added has to be added to the extended values."""
    known = yaml.safe_load((CHART / "values.yaml").read_text())
    parts = {name: known[name] for name in ("gateway", "interventions", "migrations", "tests")}
    parts |= {name: known["inference"][name] for name in ("head", "workers")}
    for name, values in parts.items():
        beside = set() if name in ("migrations", "tests") else {"sidecarContainers"}
        assert {*POD, *beside} <= values.keys(), name
    assert parts["head"].keys() - {*POD, "resources"} == {"sidecarContainers"}
    assert helm("lint", "--strict", str(CHART), values=EXTENDED).returncode == 0
