"""What a RayService is after KubeRay has written it back, and what a server-side apply then calls a conflict.

KubeRay reads a RayService into Go types and writes all of it back. Pods go through Kubernetes' own types here, by
kubectl; of KubeRay's types we keep what they always serialise (ALWAYS), as its raycluster_types.go has them and as
`scaleStrategy` was seen on a cluster. No API server is involved: ownership follows the rules of server-side apply.
"""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Iterator
from typing import Any

from tests.deploy.chart import KUBECTL

ALWAYS: dict[str, Any] = {"scaleStrategy": {}}
"""Of a worker group: structs that are no pointers, so `omitempty` leaves nothing out."""

OMITTED = {"labels", "resources"}
"""Of a worker group: maps, left out when they are empty."""


def defaulted(value: Any, schema: dict[str, Any]) -> Any:
    """As the API server stores it: with the resource definition's defaults, without fields it lacks."""
    if isinstance(value, list):
        return [defaulted(item, schema.get("items", {})) for item in value]
    properties = schema.get("properties")
    if not isinstance(value, dict) or properties is None:
        return value
    given = {name: field["default"] for name, field in properties.items() if "default" in field} | value
    return {name: defaulted(field, properties[name]) for name, field in given.items() if name in properties}


def written_back(spec: dict[str, Any]) -> dict[str, Any]:
    spec = copy.deepcopy(spec)
    cluster = spec["rayClusterConfig"]
    cluster["headGroupSpec"]["template"] = through_go(cluster["headGroupSpec"]["template"])
    for group in cluster["workerGroupSpecs"]:
        group["template"] = through_go(group["template"])
        for name, empty in ALWAYS.items():
            group.setdefault(name, empty)
    options = cluster["autoscalerOptions"]
    container = {"name": "autoscaler", "image": "x", "resources": options["resources"]}
    read = through_go({"spec": {"containers": [container]}})["spec"]["containers"][0]
    options["resources"] = read["resources"]
    return spec


def through_go(template: dict[str, Any]) -> dict[str, Any]:
    """A pod template as Kubernetes' Go types write it."""
    assert KUBECTL
    pod = {**copy.deepcopy(template), "apiVersion": "v1", "kind": "Pod"}
    pod.setdefault("metadata", {}).setdefault("name", "pod")
    first = pod["spec"]["containers"][0]
    # kubectl prints what it has changed only: another image, which is put back.
    command = [KUBECTL, "set", "image", "--local", "-f", "-", "-o", "json", f"{first['name']}=another"]
    done = subprocess.run(command, input=json.dumps(pod), capture_output=True, text=True, check=True)
    read: dict[str, Any] = json.loads(done.stdout)
    read["spec"]["containers"][0]["image"] = first["image"]
    if "name" not in template.get("metadata", {}):
        del read["metadata"]["name"]
    return {"metadata": read["metadata"], "spec": read["spec"]}


def conflicts(ours: Any, stored: Any, written: Any, schema: dict[str, Any], path: str = "") -> Iterator[str]:
    """The paths that we apply and that the write changed: the writer owns them, and we may change them no more."""
    if isinstance(ours, dict) and isinstance(written, dict) and "properties" in schema:
        for name, value in ours.items():
            field = schema["properties"][name]
            yield from conflicts(value, stored.get(name), written.get(name), field, f"{path}.{name}")
    elif isinstance(ours, list) and schema.get("x-kubernetes-list-type") == "map":
        keys = schema["x-kubernetes-list-map-keys"]
        items = {name: field["default"] for name, field in schema["items"]["properties"].items() if "default" in field}

        def named(values: list[dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, Any]]:
            return {tuple({**items, **value}.get(key) for key in keys): value for value in values}

        at, after = named(stored), named(written or [])
        for key, value in named(ours).items():
            yield from conflicts(value, at[key], after.get(key), schema["items"], f"{path}[{key[0]}]")
    elif stored != written:
        yield path
