"""What KubeRay writes back into a RayService is what the chart applies, so the next upgrade finds no conflict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.chart import DEFAULT, EVERYTHING, definition, every, needs_helm, needs_kubectl, one, pods
from tests.deploy.test_chart_values import EXTENDED
from tests.deploy.writeback import ALWAYS, OMITTED, conflicts, defaulted, through_go, written_back

pytestmark = needs_helm

RECORD = Path(__file__).parent / "kuberay_write_back.json"


def _spec() -> dict[str, Any]:
    schema: dict[str, Any] = definition()["properties"]["spec"]
    return schema


def _group() -> dict[str, Any]:
    group: dict[str, Any] = _spec()["properties"]["rayClusterConfig"]["properties"]["workerGroupSpecs"]
    return group


def _conflicts(spec: dict[str, Any]) -> list[str]:
    stored = defaulted(spec, _spec())
    return list(conflicts(spec, stored, defaulted(written_back(stored), _spec()), _spec(), ".spec"))


@needs_kubectl
@pytest.mark.parametrize("values", [DEFAULT, EVERYTHING, EXTENDED], ids=["as it is", "everything", "extended"])
def test_kuberay_s_write_back_changes_nothing_that_an_upgrade_applies(values: str) -> None:
    assert _conflicts(one(values, "RayService", "r-inference")["spec"]) == []


@needs_kubectl
def test_the_conflict_that_was_seen_is_found_in_what_was_applied_then() -> None:
    """The worker group of a chart without `scaleStrategy`; the record says where each part of it is from."""
    record = json.loads(RECORD.read_text())
    group = _group()["items"]
    stored = defaulted(record["applied"], group)
    spec = one(DEFAULT, "RayService", "r-inference")["spec"] | {}
    cluster = {**spec["rayClusterConfig"], "workerGroupSpecs": [record["applied"]]}
    (written,) = written_back({**spec, "rayClusterConfig": {**cluster, "workerGroupSpecs": [stored]}})[
        "rayClusterConfig"
    ]["workerGroupSpecs"]
    assert defaulted(written, group) == record["written"]
    assert _conflicts({**spec, "rayClusterConfig": cluster}) == [record["conflict"]]


@every
def test_a_worker_group_has_all_that_kuberay_s_types_always_serialise(values: str) -> None:
    (group,) = one(values, "RayService", "r-inference")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    schema = _group()
    assert schema.get("x-kubernetes-list-type", "atomic") == "atomic", "one value, with one owner"
    required = set(schema["items"]["required"])
    objects = {name for name, field in schema["items"]["properties"].items() if field["type"] == "object"}
    assert objects == {*ALWAYS, *OMITTED, "template", "rayStartParams"}, "how is a new one written?"
    assert {*required, *ALWAYS, "rayStartParams"} <= group.keys()
    assert defaulted(group, schema["items"]) == {"priority": 0, **group}, "of 1.7; 1.5 doesn't know it"


@every
def test_no_variable_of_ray_s_nodes_is_an_empty_text(values: str) -> None:
    """Go leaves an empty value out, so it would be a change."""
    for name in ("Ray head", "Ray replicas"):
        for container in pods(values)[name]["spec"]["containers"]:
            assert all(variable.get("value") != "" for variable in container["env"]), name
            assert "resources" in container, name


QUANTITIES = {
    "1000m": "1", "1500m": "1500m", "0.5": "500m", "0.1": "100m", "0.08": "80m", "2": "2", "1000": "1k",
    "2500": "2500", "0": "0", "0.0": "0", "1.0": "1", "1024Mi": "1Gi", "1.5Gi": "1536Mi", "0.5Ki": "512",
    "1500Mi": "1500Mi", "4Gi": "4Gi", "4000M": "4G", "1.5G": "1500M", "100k": "100k", "10.25": "10250m",
    "0Gi": "0", "1Ki": "1Ki", "2048Ki": "2Mi",
}  # fmt: skip


def _rendered(quantities: list[Any]) -> list[str]:
    # By names that only quantities have: limits of the head, whose processors nobody counts.
    limits = {f"example.com/q{i}": quantity for i, quantity in enumerate(quantities)}
    values = yaml.safe_dump({"inference": {"head": {"resources": {"limits": limits}}}})
    found = pods(values)["Ray head"]["spec"]["containers"][0]["resources"]["limits"]
    return [found[name] for name in limits]


def test_quantities_are_written_as_kubernetes_writes_them() -> None:
    assert _rendered([*QUANTITIES, 8, 0.25, 67108864, 1000000]) == [
        *QUANTITIES.values(), "8", "250m", "67108864", "1M",
    ]  # fmt: skip


@needs_kubectl
def test_kubernetes_writes_these_quantities_so() -> None:
    limits = {f"example.com/q{i}": quantity for i, quantity in enumerate(QUANTITIES)}
    pod = {"spec": {"containers": [{"name": "x", "image": "x", "resources": {"limits": limits}}]}}
    found = through_go(pod)["spec"]["containers"][0]["resources"]["limits"]
    assert [found[name] for name in limits] == list(QUANTITIES.values())
