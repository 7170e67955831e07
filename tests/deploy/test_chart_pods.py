"""What the chart promises of its pods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml
from backpack_serving.gateway.limits import Limit, read_limits
from backpack_serving.settings import Settings

from tests.deploy.chart import DEFAULT, EVERYTHING, environment, every, needs_helm, one, pods, refused, render

pytestmark = needs_helm


@every
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_ray_serve_itself_takes_the_config(values: str) -> None:
    pytest.importorskip("ray")
    from backpack_serving.inference import app
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build
    from ray.serve.schema import ServeDeploySchema

    service = one(values, "RayService", "r-inference")["spec"]
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
    found = environment(pods(values)["Deployment r-gateway"])
    assert found["BACKPACK_DIRECTORY_ADDRESS"] == address
    assert found["BACKPACK_DIRECTORY_APPLICATION"] == app.DIRECTORY
    head = service["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert "serve" not in {p["name"] for p in head["ports"]}, "or KubeRay would prefer it"


@every
def test_processes_get_settings_that_exist_and_secrets_by_reference(values: str) -> None:
    for name, template in pods(values).items():
        found = environment(template)
        if name.startswith("Ray "):
            assert found.pop("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"), "Ray's own"
        assert {n.removeprefix("BACKPACK_").lower() for n in found} <= Settings.model_fields.keys(), name
        secret = {"BACKPACK_SERVICE_KEY", "BACKPACK_ADMIN_KEY", "BACKPACK_DATABASE"} & found.keys()
        for variable, value in found.items():
            assert isinstance(value, str) != (variable in secret), (name, variable)
    who = {name: environment(t) for name, t in pods(values).items()}
    assert {name for name, e in who.items() if "BACKPACK_ADMIN_KEY" in e} == {"Deployment r-interventions"}
    assert not any(o["kind"] == "Secret" for o in render(values))


def test_settings_of_the_operator_reach_every_process() -> None:
    for name, template in pods(EVERYTHING).items():
        found = environment(template)
        if name != "Job r-migrations":
            assert (found["BACKPACK_SLOTS"], found["BACKPACK_SHARE_PREFIXES"]) == ("64", "true"), name
            assert found["BACKPACK_TENANT_BYTES"] == "67108864", "not 6.7e+07, which is no whole number to us"
            assert found["BACKPACK_MODEL"] == "/models/large", name
            assert {"name": "model", "mountPath": "/models", "readOnly": True} in template["spec"]["containers"][0][
                "volumeMounts"
            ]
        assert template["spec"]["containers"][0]["image"].startswith("registry.example/backpack-"), name
        assert template["spec"]["imagePullSecrets"] == [{"name": "one"}, {"name": "two"}], name


def test_a_gateway_pod_runs_one_process_on_the_one_core_that_it_requests() -> None:
    gateway = pods(DEFAULT)["Deployment r-gateway"]
    assert "BACKPACK_GATEWAY_PROCESSES" not in environment(gateway)
    assert gateway["spec"]["containers"][0]["resources"]["requests"]["cpu"] == "1"
    chosen = environment(pods("{settings: {gateway_processes: 1}}")["Deployment r-gateway"])
    assert chosen["BACKPACK_GATEWAY_PROCESSES"] == "1", "as charts of before allowed"
    assert "gateway_processes" in refused("{settings: {gateway_processes: 2}}")


@every
def test_pods_keep_to_the_restricted_standard(values: str) -> None:
    """Of Kubernetes' pod security: what a namespace may enforce, for the container that KubeRay adds, too."""
    for name, template in pods(values).items():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert {kind for v in spec["volumes"] for kind in v.keys() - {"name"}} <= {
            "emptyDir", "secret", "configMap", "persistentVolumeClaim",
        }  # fmt: skip
        for container in spec["containers"]:
            _restricted(container["securityContext"], name)
            assert container["securityContext"].get("readOnlyRootFilesystem", False) == (not name.startswith("Ray")), (
                name
            )
    cluster = one(values, "RayService", "r-inference")["spec"]["rayClusterConfig"]
    _restricted(cluster["autoscalerOptions"]["securityContext"], "autoscaler")


def _restricted(context: dict[str, Any], name: str) -> None:
    assert context["allowPrivilegeEscalation"] is False, name
    assert context["capabilities"] == {"drop": ["ALL"]}, name


@every
def test_what_serves_is_probed_and_has_the_time_to_drain(values: str) -> None:
    tls = bool(yaml.safe_load(values).get("tls"))
    for part, port in (("gateway", 8470), ("interventions", 8471)):
        template = pods(values)[f"Deployment r-{part}"]
        container = template["spec"]["containers"][0]
        if tls:  # the kubelet's own probe knows none
            assert container["readinessProbe"]["exec"]["command"] == ["backpack", "health", f"127.0.0.1:{port}"]
        else:
            assert container["readinessProbe"]["grpc"]["port"] == port
        for probe in ("startupProbe", "livenessProbe"):
            assert container[probe]["tcpSocket"] == {"port": "grpc"}, "no replica is no reason to restart"
        pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
        drain = float(environment(template)["BACKPACK_DRAIN"])
        assert template["spec"]["terminationGracePeriodSeconds"] >= pause + drain + 10, "the guide's ten seconds"
        strategy = one(values, "Deployment", f"r-{part}")["spec"]["strategy"]["rollingUpdate"]
        assert strategy == {"maxUnavailable": 0, "maxSurge": 1}
    workers = pods(values)["Ray replicas"]
    assert workers["spec"]["terminationGracePeriodSeconds"] >= float(environment(workers)["BACKPACK_DRAIN"]) + 20


def _least_replicas(values: str) -> int:
    (group,) = one(values, "RayService", "r-inference")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    return int(group["minReplicas"])


@every
def test_what_serves_is_disturbed_with_care(values: str) -> None:
    for part in ("gateway", "interventions", "inference"):
        budget = one(values, "PodDisruptionBudget", f"r-{part}")["spec"]
        # One of one may be evicted, or a node could never be emptied; so may gateways that wait for replicas.
        # Of pods whose owner has no scale subresource, a RayCluster's, Kubernetes counts `minAvailable` only.
        wanted = {"minAvailable": _least_replicas(values) - 1} if part == "inference" else {"maxUnavailable": 1}
        assert {name: n for name, n in budget.items() if name.endswith("vailable")} == wanted
        assert budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
        labels = budget["selector"]["matchLabels"].items()
        guarded = {name for name, t in pods(values).items() if labels <= t["metadata"]["labels"].items()}
        assert guarded == {"Ray replicas" if part == "inference" else f"Deployment r-{part}"}


def test_pods_are_replaced_for_what_changes_them_and_for_nothing_else() -> None:
    """A Ray cluster whose template changes is made anew: the chart's version mustn't."""
    for name, template in pods(EVERYTHING).items():
        assert "helm.sh/chart" not in template["metadata"]["labels"], name
        known = template["metadata"].get("annotations")
        assert known == (None if name == "Job r-migrations" else {"backpack/secret-version": "3"}), name
    assert not any("annotations" in template["metadata"] for template in pods(DEFAULT).values())


# ---- TLS


def test_certificates_come_from_a_secret_and_clients_need_one_where_said() -> None:
    for name, template in pods(EVERYTHING).items():
        if name == "Job r-migrations":
            continue
        settings = environment(template)
        files = {settings[f"BACKPACK_TLS_{what}"] for what in ("CERTIFICATE", "KEY", "CA")}
        assert files == {"/tls/tls.crt", "/tls/tls.key", "/tls/ca.crt"}
        assert settings["BACKPACK_TLS_NAME"] == "parts.example"
        wanted = None if name == "Deployment r-gateway" else "/tls/ca.crt"
        assert settings.get("BACKPACK_TLS_CLIENT_CA") == wanted, name
        (container,) = template["spec"]["containers"]
        assert {"name": "tls", "mountPath": "/tls", "readOnly": True} in container["volumeMounts"], name
        (volume,) = (v for v in template["spec"]["volumes"] if v["name"] == "tls")
        # Read by the group that the pod's volumes belong to, by nobody else.
        assert volume["secret"] == {"secretName": "certificates", "defaultMode": 0o440}
        assert template["spec"]["securityContext"]["fsGroup"] == 10001
    for template in pods(DEFAULT).values():
        assert not any("TLS" in name for name in environment(template))


def test_the_parts_take_these_settings_and_speak_tls_with_each_other(tmp_path: Path) -> None:
    """Of each part, with real certificates in the place of the Secret's."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.crt")
    certificate = authority.issue_cert("parts.example", "clients.example")
    certificate.private_key_pem.write_to_path(tmp_path / "tls.key")
    for pem in certificate.cert_chain_pems:
        pem.write_to_path(tmp_path / "tls.crt", append=True)
    for name, template in pods(EVERYTHING).items():
        if name == "Job r-migrations":
            continue
        given = {
            variable.removeprefix("BACKPACK_").lower(): value.replace("/tls/", f"{tmp_path}/")
            for variable, value in environment(template).items()
            if isinstance(value, str)
        }
        tls = Settings(**given).tls
        assert tls.identity(), name
        assert tls.servers() == authority.cert_pem.bytes(), name
        assert bool(tls.clients()) == (name != "Deployment r-gateway"), name


def test_limits_of_tenants_are_a_file_that_gateways_read(tmp_path: Path) -> None:
    file = tmp_path / "limits.toml"
    file.write_text(one(EVERYTHING, "ConfigMap", "r-limits")["data"]["limits.toml"])
    assert read_limits(file, Limit(concurrent=7)) == {
        "harbour": Limit(600, 20_000_000, 7),
        "clinic": Limit(0, 0, 3),
    }
    template = pods(EVERYTHING)["Deployment r-gateway"]
    assert environment(template)["BACKPACK_LIMITS_FILE"] == "/etc/backpack/limits.toml"
    assert {"name": "limits", "configMap": {"name": "r-limits"}} in template["spec"]["volumes"]
    mounts = template["spec"]["containers"][0]["volumeMounts"]
    assert {"name": "limits", "mountPath": "/etc/backpack", "readOnly": True} in mounts, "a file alone isn't renewed"


def test_migrations_run_before_new_processes_and_as_the_owner_of_the_schema() -> None:
    job = one(DEFAULT, "Job", "r-migrations")
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    assert environment(pods(DEFAULT)["Job r-migrations"]) == {
        "BACKPACK_DATABASE": {"secretKeyRef": {"name": "backpack", "key": "owner_database"}}
    }


def test_who_calls_the_database_and_nobody_else_has_its_authorities() -> None:
    assert not any("database" in _mounted(template) for template in pods(DEFAULT).values())
    found = {name: _mounted(template) for name, template in pods(EVERYTHING).items()}
    assert {name for name, each in found.items() if "database" in each} == {
        "Deployment r-interventions",
        "Job r-migrations",
    }
    for name in ("Deployment r-interventions", "Job r-migrations"):
        assert found[name]["database"] == ("/database", {"name": "postgres-authorities"})


def _mounted(template: dict[str, Any]) -> dict[str, tuple[str, Any]]:
    """Where the pod's first container has each of its ConfigMaps."""
    spec = template["spec"]
    maps = {v["name"]: v["configMap"] for v in spec.get("volumes", ()) if "configMap" in v}
    mounts = spec["containers"][0].get("volumeMounts", ())
    return {m["name"]: (m["mountPath"], maps[m["name"]]) for m in mounts if m["name"] in maps}
