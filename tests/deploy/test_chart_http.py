"""HTTP in the chart: off, until it is asked for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml

from tests.deploy.chart import DEFAULT, EVERYTHING, environment, needs_helm, one, pods, refused, render, validate
from tests.deploy.test_chart_values import EXTENDED

pytestmark = needs_helm

ON = "{http: {enabled: true}}"
SECURE = yaml.safe_dump({**yaml.safe_load(EVERYTHING), "http": {"enabled": True}})


def test_it_adds_its_own_objects_and_nothing_else() -> None:
    def names(values: str) -> set[str]:
        return {f"{o['kind']} {o['metadata']['name']}" for o in render(values)}

    assert names(ON) - names(DEFAULT) == {
        "Deployment r-http",
        "NetworkPolicy r-http",
        "PodDisruptionBudget r-http",
        "Service r-http",
        "Service r-http-metrics",
    }
    assert names(DEFAULT) <= names(ON)


@pytest.mark.parametrize("values", [ON, SECURE], ids=["as it is", "everything"])
def test_every_object_is_valid(values: str) -> None:
    for thing in render(values):
        validate(thing)
    pod = {**copy.deepcopy(pods(values)["Deployment r-http"]), "apiVersion": "v1", "kind": "Pod"}
    pod["metadata"]["name"] = "http"
    validate(pod)


def test_it_holds_no_secret_and_knows_whom_to_call() -> None:
    settings = environment(pods(ON)["Deployment r-http"])
    assert settings["BACKPACK_GATEWAY_ADDRESS"] == "r-gateway:8470"
    assert settings["BACKPACK_INTERVENTIONS_ADDRESS"] == "r-interventions:8471"
    assert all(isinstance(value, str) for value in settings.values())
    origins = environment(
        pods('{http: {enabled: true}, settings: {http_origins: ["https://a.b"]}}')["Deployment r-http"]
    )
    assert origins["BACKPACK_HTTP_ORIGINS"] == '["https://a.b"]'


def test_it_is_probed_by_http_and_with_client_certificates_by_a_command() -> None:
    def ready(values: str) -> Any:
        return pods(values)["Deployment r-http"]["spec"]["containers"][0]["readinessProbe"]

    assert ready(ON)["httpGet"] == {"path": "/readyz", "port": "http"}
    assert ready(SECURE)["httpGet"] == {"path": "/readyz", "port": "http", "scheme": "HTTPS"}
    clients = yaml.safe_dump({"tls": {"secret": "s", "clientCertificates": ["http"]}, "http": {"enabled": True}})
    assert ready(clients)["exec"]["command"] == ["backpack", "health", "https://127.0.0.1:8480"]
    assert environment(pods(clients)["Deployment r-http"])["BACKPACK_TLS_CLIENT_CA"] == "/tls/ca.crt"
    container = pods(ON)["Deployment r-http"]["spec"]["containers"][0]
    assert container["livenessProbe"]["tcpSocket"] == {"port": "http"}


def test_its_calls_are_let_out_and_in() -> None:
    def components(rule: Any, way: str) -> set[str]:
        selectors = [peer.get("podSelector", {}).get("matchLabels", {}) for peer in rule.get(way, ())]
        return {labels.get("app.kubernetes.io/component", "") for labels in selectors}

    (own,) = [o for o in render(SECURE) if (o["kind"], o["metadata"]["name"]) == ("NetworkPolicy", "r-http")]
    out = {(part, rule["ports"][0]["port"]) for rule in own["spec"]["egress"] for part in components(rule, "to")}
    assert {("gateway", 8470), ("interventions", 8471)} <= out
    for part in ("gateway", "interventions"):
        into = one(SECURE, "NetworkPolicy", f"r-{part}")["spec"]["ingress"][0]
        assert "http" in components(into, "from"), part
        assert "http" not in components(one(EVERYTHING, "NetworkPolicy", f"r-{part}")["spec"]["ingress"][0], "from")
    assert own["spec"]["ingress"][0]["from"] == yaml.safe_load(EVERYTHING)["network"]["clients"]
    (everybody, _) = one(ON, "NetworkPolicy", "r-http")["spec"]["ingress"]
    assert everybody == {"ports": [{"port": 8480}]}


def test_calls_come_in_by_a_service_an_ingress_or_the_gateway_api() -> None:
    service = one(EXTENDED, "Service", "r-http")["spec"]
    assert (service["type"], service["loadBalancerClass"]) == ("LoadBalancer", "example.com/internal")
    assert service["ports"] == [
        {"name": "http", "port": 8480, "targetPort": "http", "nodePort": 30070, "appProtocol": "http"}
    ]
    assert "appProtocol" not in one(SECURE, "Service", "r-http")["spec"]["ports"][0], "with TLS it is https"
    ingress = one(EXTENDED, "Ingress", "r-http")
    (path,) = ingress["spec"]["rules"][0]["http"]["paths"]
    assert path["backend"]["service"] == {"name": "r-http", "port": {"name": "http"}}
    route = one(EXTENDED, "HTTPRoute", "r-http")["spec"]
    assert route["rules"][0]["backendRefs"] == [{"name": "r-http", "port": 8480}]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ("{http: {enabled: true, ingress: {enabled: true}}}", "http.ingress.hosts is empty"),
        ("{http: {enabled: true, httpRoute: {enabled: true}}}", "http.httpRoute.parentRefs is empty"),
        ("{http: {enabled: true, service: {loadBalancerClass: x}}}", "http.service: loadBalancerClass is of a service"),
        ("{http: {replicas: 0}}", "/http/replicas"),
        ("{http: {grpcRoute: {enabled: true}}}", "grpcRoute"),
        ("{http: {enabled: 1}}", "/http/enabled"),
        ("{http: {enabled: true, extraEnv: [{name: BACKPACK_DRAIN, value: x}]}}", "http.extraEnv: BACKPACK_DRAIN"),
        ("{settings: {http_address: x}}", "http_address"),
    ],
)  # fmt: skip
def test_values_that_cant_be_are_refused_by_name(values: str, says: str) -> None:
    assert says in refused(values)


def test_a_start_waits_as_long_as_its_probe_allows() -> None:
    for values, waits in ((ON, "100"), (EXTENDED, "580")):
        assert environment(pods(values)["Deployment r-http"])["BACKPACK_START_WAIT"] == waits
