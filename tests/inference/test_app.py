"""The arguments of the applications under Ray Serve, as Ray Serve itself reads them from its config file."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from backpack_lm.config import ConfigError
from pydantic import ValidationError

pytest.importorskip("ray")
from backpack_serving.inference import app
from backpack_serving.inference.autoscaling import METRIC
from ray import serve
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build
from ray.serve.config import AutoscalingContext
from ray.serve.schema import ServeDeploySchema

MICRO = {"settings": {"model": "micro"}}
CONFIG = Path(__file__).parents[2] / "deploy" / "ray" / "serve.yaml"


def _deployment(arguments: dict[str, Any]) -> Any:
    application = build(app.replicas, arguments)
    assert isinstance(application, serve.Application)
    return application._bound_deployment


def test_the_config_file_is_one_that_ray_serve_deploys() -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load(CONFIG.read_text()))
    assert config.grpc_options.grpc_servicer_functions == app.GRPC_SERVICERS
    by_name = {application.name: application for application in config.applications}
    assert set(by_name) == {app.DIRECTORY, app.REPLICAS}
    assert by_name[app.REPLICAS].route_prefix is None
    for application in by_name.values():
        module, _, function = application.import_path.partition(":")
        assert module == app.__name__
        build(getattr(app, function), application.args)


def test_the_config_file_shows_every_argument_that_most_would_change() -> None:
    config = yaml.safe_load(CONFIG.read_text())
    (replicas,) = (a for a in config["applications"] if a["name"] == app.REPLICAS)
    shown, defaults = replicas["args"], app.Arguments()
    assert shown == {name: getattr(defaults, name) for name in shown}, "the file says what holds without it"


@pytest.mark.parametrize("gpus", [0, 0.25, 1])
def test_a_replica_has_cores_and_a_gpu_or_a_part_of_one(gpus: float) -> None:
    deployment = _deployment({"count": 3, "cpus": 0.5, "gpus": gpus, "surge_percent": 0})
    assert deployment.num_replicas == 3
    options = deployment.ray_actor_options
    assert (options["num_cpus"], options["num_gpus"]) == (0.5, gpus)
    assert deployment._deployment_config.max_surge_percent == 0
    assert deployment._replica_config.placement_group_bundles is None


@pytest.mark.parametrize(("chosen", "strategy"), [({}, "STRICT_PACK"), ({"placement": "SPREAD"}, "SPREAD")])
def test_a_replica_of_several_ranks_is_a_placement_group(chosen: dict[str, Any], strategy: str) -> None:
    deployment = _deployment({"count": 3, "tensor_parallel": 2, "cpus": 0.5, "gpus": 1} | chosen | MICRO)
    assert deployment._replica_config.placement_group_bundles == [{"CPU": 0.5, "GPU": 1}] * 2
    assert deployment._replica_config.placement_group_strategy == strategy
    assert deployment.num_replicas == 3, "groups"
    scaled = {"autoscaling": {"max_replicas": 4}, "tensor_parallel": 2} | MICRO
    assert _deployment(scaled)._deployment_config.autoscaling_config.max_replicas == 4, "groups"


def test_ranks_that_the_model_does_not_fit_are_refused_when_it_is_deployed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"3 ranks can't share 8 senses.*can: 1, 2$"):
        _deployment({"tensor_parallel": 3} | MICRO)
    assert _deployment({"tensor_parallel": 3, "settings": {"model": str(tmp_path)}}), "whoever has the model refuses it"


def test_a_replica_that_is_stopped_has_the_time_to_drain() -> None:
    assert _deployment({"settings": {"drain": 100}})._deployment_config.graceful_shutdown_timeout_s == 110


def test_autoscaling_by_tokens_in_flight_goes_through_ray_serve() -> None:
    wanted = {"max_replicas": 4, "tokens_in_flight": 500, "down_after_seconds": 900}
    deployment = _deployment({"autoscaling": wanted})
    config = deployment._deployment_config.autoscaling_config
    assert (config.min_replicas, config.max_replicas) == (1, 4)
    assert (config.upscale_delay_s, config.downscale_delay_s) == (10, 900)
    policy = config.policy.get_policy()(**config.policy.policy_kwargs)  # unpickled, as the controller does
    seen: dict[str, Any] = dict.fromkeys(AutoscalingContext.__init__.__annotations__)
    seen |= {"target_num_replicas": 2, "aggregated_metrics": {METRIC: {"a": 1200.0, "b": 300.0}}}
    assert policy(AutoscalingContext(**seen)) == (3.0, {})


def test_replicas_of_one_node_take_one_port_after_the_other() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        host, _, found = app._listen_address("127.0.0.1", f"0.0.0.0:{port}").rpartition(":")
        assert host == "127.0.0.1"
        assert port < int(found) < port + app.PORTS
    assert app._listen_address("127.0.0.1", "0.0.0.0:0") == "127.0.0.1:0"
    with pytest.raises(OSError, match=r"no free port .*: 7000 and the 15 after it"):
        app._listen_address("192.0.2.1", "0.0.0.0:7000")  # an address that no machine has
    with pytest.raises(OSError, match=r"no free port .*: 65535 and"):
        app._listen_address("192.0.2.1", "0.0.0.0:65535")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"replicas": 2}, "replicas\n  Extra inputs are not permitted"),
        ({"count": 0}, "count\n"),
        ({"count": "many"}, "count\n"),
        ({"gpus": 2}, "2 GPUs: a rank computes on one; set gpus: 1, and tensor_parallel to"),
        ({"gpus": 1.5}, "1.5 GPUs: a rank computes on one; set gpus: 1, and tensor_parallel to"),
        ({"gpus": -1}, "gpus\n"),
        ({"count": 2, "autoscaling": {"max_replicas": 3}}, r"count \(2\) and autoscaling exclude each other"),
        ({"autoscaling": {"max_replicas": 3, "target": 5}}, "autoscaling.target\n"),
        ({"settings": {"slotz": 4}}, "no setting is called `slotz`; `backpack settings` lists them"),
        ({"settings": {"slots": 0}}, "slots\n"),
        ({"settings": {"ranks": 2}}, "`ranks` are processes that Ray would set nothing aside for; use tensor_parallel"),
        ({"tensor_parallel": 0}, "tensor_parallel\n"),
        ({"tensor_parallel": 2, "gpus": 0.5}, "gpus is 0.5: ranks .* need a GPU each, or none"),
        ({"tensor_parallel": 2, "cpus": 0}, "cpus and gpus are 0: Ray places ranks"),
        ({"tensor_parallel": 2, "placement": "PACK"}, "placement\n  Input should be 'STRICT_PACK' or 'SPREAD'"),
        ({"placement": "SPREAD"}, "placement is SPREAD: placement needs tensor_parallel above 1"),
        ({"settings": {"service_key": "bp_1"}}, "`service_key` is a secret; set BACKPACK_SERVICE_KEY"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        build(app.replicas, arguments)
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        build(app.directory, {"count": 1})
