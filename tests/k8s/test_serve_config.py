"""The Serve configuration of a RayService, and the laptop's. Ray's schema accepts unknown keys silently, so it is walked."""

import types
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

from cluster import config
from cluster import config as configuration
from cluster.config import Config, FleetSpec
from cluster.pool import graph

ROOT = Path(__file__).parents[2]
EMBEDDED = yaml.safe_load(yaml.safe_load((ROOT / "k8s/base/rayservice.yaml").read_text())["spec"]["serveConfigV2"])
LAPTOP = graph.schema(configuration.load("laptop", Path("/nonexistent")))


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models that a value of this type may be: ``list[A] | None`` → ``[A]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, list):
        return [model for argument in get_args(annotation) for model in models_in(argument)]
    return []


def unknown_keys(value: Any, models: list[type[BaseModel]], at: str = "") -> list[str]:
    """Keys that no field, nor a field's alias, of the models names."""
    if isinstance(value, list):
        return [key for n, item in enumerate(value) for key in unknown_keys(item, models, f"{at}[{n}]")]
    if not isinstance(value, dict) or not models:
        return []
    fields = {name: field for model in models for name, field in model.model_fields.items()}
    found = [f"{at}.{key}" for key in value if key not in fields]
    known = {key: models_in(fields[key].annotation) for key in value if key in fields}
    return found + [key for name, inner in known.items() for key in unknown_keys(value[name], inner, f"{at}.{name}")]


def problems(schema: dict[str, Any]) -> list[str]:
    ServeDeploySchema.model_validate(schema)
    for deployment in (deployment for app in schema["applications"] for deployment in app["deployments"]):
        if "autoscaling_config" in deployment:
            AutoscalingConfig.model_validate(deployment["autoscaling_config"])
    return unknown_keys(schema, [ServeDeploySchema])


@pytest.mark.parametrize("schema", [EMBEDDED, LAPTOP], ids=["gpu", "laptop"])
def test_serve_accepts_the_configuration_and_knows_every_key(schema: dict[str, Any]) -> None:
    assert problems(schema) == []


@pytest.mark.parametrize(
    ("path", "typo"),
    [
        ((), "proxy_loaction"),
        (("http_options",), "prot"),
        (("applications", 0), "import_paht"),
        (("applications", 0, "deployments", 0), "health_check_periode_s"),
        (("applications", 0, "deployments", 0, "ray_actor_options"), "num_gpu"),
        (("applications", 0, "deployments", 0, "autoscaling_config"), "max_replica"),
        (("applications", 0, "deployments", 0, "autoscaling_config", "policy"), "policy_kwarg"),
    ],
)
def test_the_walk_catches_a_typo_that_serve_accepts(path: tuple[str | int, ...], typo: str) -> None:
    schema = yaml.safe_load(yaml.safe_dump(EMBEDDED))
    target = schema
    for step in path:
        target = target[step]
    target[typo] = 1
    assert [key.rpartition(".")[2] for key in problems(schema)] == [typo]


@pytest.mark.parametrize("schema", [EMBEDDED, LAPTOP], ids=["gpu", "laptop"])
def test_arguments_of_every_application_parse_back(schema: dict[str, Any]) -> None:
    for app in schema["applications"]:
        kind = Config if app["name"] == graph.GATEWAY_APP else FleetSpec
        assert kind.model_validate(app["args"]).store.startswith("file:///")


def test_the_gateway_gets_the_whole_configuration_that_jobs_get() -> None:
    mounted = yaml.safe_load((ROOT / "k8s/base/config.yaml").read_text())["data"]["springtide.yaml"]
    gateway = next(app for app in EMBEDDED["applications"] if app["name"] == graph.GATEWAY_APP)
    whole = config.parse(yaml.safe_load(mounted))
    assert gateway["args"] == graph.unscaled(whole)


def test_running_gateways_hear_how_many_replicas_there_may_be() -> None:
    """Control divides slots by it, and used to know the defaults only: what changes without a restart is no argument of the gateway's."""
    two = config.parse({"fleets": {"chat": {"min_replicas": 0}, "code": {"max_replicas": 5, "priority": 2}}})
    gateway = next(app for app in graph.schema(two)["applications"] if app["name"] == graph.GATEWAY_APP)
    assert config.merge(gateway["args"], gateway["deployments"][0]["user_config"]) == two.dump()


def test_every_declared_fleet_is_an_application_of_its_own() -> None:
    two = config.parse({"fleet": {"max_replicas": 3}, "fleets": {"chat": {"model": "support"}, "code": {"max_replicas": 5}}})
    apps = {app["name"]: app for app in graph.schema(two)["applications"]}
    assert list(apps) == ["fleet-chat", "fleet-code", graph.GATEWAY_APP]
    assert [apps[name]["args"]["fleet"]["model"] for name in ("fleet-chat", "fleet-code")] == ["support", "code"]
    most = [apps[name]["deployments"][0]["autoscaling_config"]["max_replicas"] for name in ("fleet-chat", "fleet-code")]
    assert most == [3, 5], "what a fleet does not say of itself it has from `fleet`"


def test_the_gpu_preset_serves_bf16_across_gpus_within_bounds() -> None:
    fleet = next(app for app in EMBEDDED["applications"] if app["name"] == graph.fleet_app("seedling"))
    replica = fleet["deployments"][0]
    assert fleet["args"]["fleet"]["dtype"] == "bfloat16"
    assert fleet["args"]["fleet"]["tensor_parallel_size"] == 2
    assert replica["ray_actor_options"]["num_gpus"] == 2
    assert (replica["autoscaling_config"]["min_replicas"], replica["autoscaling_config"]["max_replicas"]) == (1, 3)
    assert EMBEDDED["http_options"] == {"host": "0.0.0.0", "port": 8000}
