"""Who reaches whom in the cluster, who is scraped, and what is scaled."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.chart import BARE, DEFAULT, EVERYTHING, environment, needs_helm, one, pods, render

RAY_PORTS = {6379, 8265, 10001, 8000, 8080, 52365}

pytestmark = needs_helm


# ---- networks


def _ports(rule: dict[str, Any]) -> set[int]:
    return {p for entry in rule.get("ports", []) for p in range(entry["port"], entry.get("endPort", entry["port"]) + 1)}


def _peers(rule: dict[str, Any], side: str) -> list[str]:
    component = "app.kubernetes.io/component"
    return [peer.get("podSelector", {}).get("matchLabels", {}).get(component, "other") for peer in rule.get(side, [])]


def test_every_pod_has_a_policy_for_both_directions() -> None:
    policies = [o for o in render(DEFAULT) if o["kind"] == "NetworkPolicy"]
    for name, template in pods(DEFAULT).items():
        labels = template["metadata"]["labels"].items()
        held = [p for p in policies if p["spec"]["podSelector"]["matchLabels"].items() <= labels]
        assert [p["spec"]["policyTypes"] for p in held] == [["Ingress", "Egress"]], name


def test_ports_of_ray_and_of_engines_stay_inside() -> None:
    rules = one(DEFAULT, "NetworkPolicy", "r-inference")["spec"]["ingress"]
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
        for o in render(DEFAULT)
    ), "KubeRay makes the only service: the directory's"


def test_nobody_listed_is_nobody_let_in() -> None:
    for values in ("{network: {monitoring: [], kuberay: []}}", "{network: {monitoring: null, kuberay: null}}"):
        for part in ("gateway", "interventions", "inference"):
            for rule in one(values, "NetworkPolicy", f"r-{part}")["spec"]["ingress"]:
                assert rule.get("from") or _ports(rule) == {8470}, "a rule without peers lets everybody in"
                assert "other" not in _peers(rule, "from") or part == "interventions"


def test_engines_listen_on_ports_that_gateways_may_call() -> None:
    from backpack_serving.inference import app

    allowed = _ports(one(DEFAULT, "NetworkPolicy", "r-gateway")["spec"]["egress"][2])
    first = int(environment(pods(DEFAULT)["Ray replicas"])["BACKPACK_INFERENCE_ADDRESS"].rpartition(":")[2])
    assert set(range(first, first + app.PORTS)) <= allowed


def test_only_migrations_and_interventions_reach_the_database() -> None:
    reach = {
        p["metadata"]["name"]
        for p in render(EVERYTHING)
        if p["kind"] == "NetworkPolicy" and any(6432 in _ports(rule) for rule in p["spec"]["egress"])
    }
    assert reach == {"r-interventions", "r-migrations"}


def test_issuers_and_collectors_can_be_let_out_to() -> None:
    (rule,) = yaml.safe_load(EVERYTHING)["network"]["egress"]
    for part in ("gateway", "interventions", "inference"):
        assert rule in one(EVERYTHING, "NetworkPolicy", f"r-{part}")["spec"]["egress"], part
    assert rule not in one(EVERYTHING, "NetworkPolicy", "r-migrations")["spec"]["egress"]


def test_every_call_between_parts_is_let_out_and_in() -> None:
    """Every address that a part is given, and Ray among its own pods; both ends' policies."""
    rules = {
        part: one(DEFAULT, "NetworkPolicy", f"r-{part}")["spec"] for part in ("gateway", "interventions", "inference")
    }
    calls = {("inference", "inference", 6379), ("gateway", "inference", 8480)}
    where = {"r-interventions": "interventions", "r-directory": "inference"}
    for template in pods(DEFAULT).values():
        caller = template["metadata"]["labels"]["app.kubernetes.io/component"]
        for value in environment(template).values():
            host, _, port = str(value).rpartition(":")
            if host in where:
                calls.add((caller, where[host], int(port)))
    assert {(c, s) for c, s, _ in calls} == {
        ("gateway", "interventions"), ("gateway", "inference"),
        ("inference", "interventions"), ("inference", "inference"),
    }  # fmt: skip
    for caller, called, port in calls:
        out = [rule for rule in rules[caller]["egress"] if called in _peers(rule, "to")]
        into = [rule for rule in rules[called]["ingress"] if caller in _peers(rule, "from")]
        for found in (out, into):
            assert any(not rule.get("ports") or port in _ports(rule) for rule in found), (caller, called, port)


def test_every_pod_may_ask_for_names() -> None:
    for policy in (o for o in render(EVERYTHING) if o["kind"] == "NetworkPolicy"):
        open_to_all = [rule for rule in policy["spec"]["egress"] if "to" not in rule]
        asked = {(p["port"], p.get("protocol")) for rule in open_to_all for p in rule["ports"]}
        assert {(53, "UDP"), (53, "TCP")} <= asked, policy["metadata"]["name"]


def test_a_policy_of_a_hook_goes_with_its_job() -> None:
    job, policy = one(DEFAULT, "Job", "r-migrations"), one(DEFAULT, "NetworkPolicy", "r-migrations")
    job, policy = job["metadata"]["annotations"], policy["metadata"]["annotations"]
    assert job["helm.sh/hook"] == policy["helm.sh/hook"]
    assert int(policy["helm.sh/hook-weight"]) < int(job.get("helm.sh/hook-weight", 0)), "the policy first"
    assert all("hook-succeeded" in hook["helm.sh/hook-delete-policy"] for hook in (job, policy))


def test_clients_and_operators_can_be_narrowed_down() -> None:
    (clients, _) = one(EVERYTHING, "NetworkPolicy", "r-gateway")["spec"]["ingress"]
    assert clients["from"][0] == {"ipBlock": {"cidr": "10.0.0.0/8"}}
    assert _peers(clients, "from") == ["other", "test"], "what `helm test` starts calls as clients do"
    (callers, _) = one(EVERYTHING, "NetworkPolicy", "r-interventions")["spec"]["ingress"]
    assert _peers(callers, "from") == ["gateway", "inference", "other", "test"]
    assert callers["from"][-2] == {"podSelector": {"matchLabels": {"app": "console"}}}


# ---- monitoring and scaling


def test_monitors_find_every_port_of_metrics() -> None:
    services = [o for o in render(EVERYTHING) if o["kind"] == "Service"]
    monitor = one(EVERYTHING, "ServiceMonitor", "r-services")
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    (endpoint,) = monitor["spec"]["endpoints"]
    scraped = [s for s in services if endpoint["port"] in {p["name"] for p in s["spec"]["ports"]}]
    assert {s["metadata"]["name"] for s in scraped} == {"r-gateway-metrics", "r-interventions"}
    for service in scraped:
        assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    monitor = one(EVERYTHING, "PodMonitor", "r-replicas")
    workers = pods(EVERYTHING)["Ray replicas"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= workers["metadata"]["labels"].items()
    named = {p["name"]: p["containerPort"] for p in workers["spec"]["containers"][0]["ports"]}
    assert [named[e["port"]] for e in monitor["spec"]["podMetricsEndpoints"]] == [9464, 9465, 9466, 9467]


def test_what_is_scraped_is_told_from_other_installations() -> None:
    """By a label that alerts and dashboard ask for: names of releases come again in other namespaces."""
    services = one(DEFAULT, "ServiceMonitor", "r-services")["spec"]["endpoints"]
    for endpoint in (*services, *one(DEFAULT, "PodMonitor", "r-replicas")["spec"]["podMetricsEndpoints"]):
        assert endpoint["relabelings"] == [{"targetLabel": "installation", "replacement": "backpack/r"}]


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool isn't installed: apt install prometheus")
def test_gateways_of_another_installation_do_not_hide_that_there_is_none_here(tmp_path: Path) -> None:
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(one(DEFAULT, "PrometheusRule", "r-alerts")["spec"]))
    told = {"exp_labels": {"severity": "page", "installation": "backpack/r"}}
    alert = {"eval_time": "5m", "alertname": "BackpackNoGateway", "exp_alerts": [told]}
    told["exp_annotations"] = {"summary": "No gateway tells anything."}
    other = {"series": 'backpack_replicas{installation="trial/r"}', "values": "2x10"}
    test = {"interval": "1m", "input_series": [other], "alert_rule_test": [alert]}
    (tmp_path / "test.yml").write_text(yaml.safe_dump({"rule_files": ["rules.yml"], "tests": [test]}))
    done = subprocess.run(
        ["promtool", "test", "rules", "test.yml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_scrapes_use_tls_where_the_parts_do() -> None:
    for values in (DEFAULT, EVERYTHING):
        (service,) = one(values, "ServiceMonitor", "r-services")["spec"]["endpoints"]
        for endpoint in (service, *one(values, "PodMonitor", "r-replicas")["spec"]["podMetricsEndpoints"]):
            if values is DEFAULT:
                assert "scheme" not in endpoint
                continue
            tls = endpoint["tlsConfig"]
            assert (endpoint["scheme"], tls["serverName"]) == ("https", "parts.example")
            assert tls["ca"]["secret"] == {"name": "certificates", "key": "ca.crt"}
            assert tls["cert"]["secret"] == {"name": "certificates", "key": "tls.crt"}
            assert tls["keySecret"] == {"name": "certificates", "key": "tls.key"}


def test_what_clients_reach_has_no_metrics() -> None:
    """The gateway's service may be a load balancer that is open to the world."""
    service = one(EVERYTHING, "Service", "r-gateway")["spec"]
    assert service["type"] == "LoadBalancer"
    assert [p["port"] for p in service["ports"]] == [8470]
    assert one(EVERYTHING, "Service", "r-gateway-metrics")["spec"]["clusterIP"] == "None"


def test_gateways_are_scaled_by_their_processors_and_slowly_down() -> None:
    scaler = one(DEFAULT, "HorizontalPodAutoscaler", "r-gateway")["spec"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (2, 8)
    assert scaler["behavior"]["scaleDown"]["stabilizationWindowSeconds"] == 600
    assert "replicas" not in one(DEFAULT, "Deployment", "r-gateway")["spec"], "the scaler's to decide"
    assert one(BARE, "Deployment", "r-gateway")["spec"]["replicas"] == 3
