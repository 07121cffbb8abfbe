"""The serving graph as Ray Serve's declarative configuration, the same on a laptop and inside a RayService.

Nothing about versions is in it: Serve restarts replicas when an application's arguments change, and publishing must not.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (Ray's own annotations are partial; what comes back is typed at once.)
import re
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from typing import Any

import httpx

from cluster import errors
from cluster.address import WITHOUT_TLS, ipv4
from cluster.config import Config, Fleet, FleetSpec
from cluster.errors import PoolUnavailable
from cluster.pool import local
from cluster.pool.lean import LEAN
from cluster.pool.serve_api import ServeApi
from cluster.types import VersionId

BUILDERS = "deployments.app"
"""The module that builds the applications. This file alone knows it, and by its name only: `deployments` imports `cluster`."""
GATEWAY_APP = "gateway"
FLEET_PREFIX = "fleet-"
FLEET_SCALING = (
    "priority",
    "min_replicas",
    "max_replicas",
    "target_running",
    "scale_up_after_s",
    "scale_down_after_s",
    "sleep_after_s",
)
"""What may change while the pool runs, and replaces no replica. What else the policy goes by is part of the code to Serve."""
DRAIN = {"RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0"}
"""For a fleet's replicas. Behind HAProxy Serve gives balancers 30 s to notice before it asks a replica to end, and its slot is nobody's
meanwhile. None balances to these: gateways do, and a replica's own drain (`deployments.replica.replica`) waits for them."""
EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(?:\.|Error|Exception)\w*: ")
FINAL = tuple(f"{error.__module__}.{error.__name__}: " for error in errors.FINAL)
"""How Serve's message quotes an engine that will not start at the next attempt either."""
SURGE_ATTEMPTS = 2
"""How often the engine of a surge may fail to start. Nobody waits for this one, and what it lacks it will lack again."""
READY_TIMEOUT_S = 1800
"""A large model may load for a long time; `deploy` gives up earlier where Serve says that it failed."""


def fleet_app(name: str) -> str:
    return f"{FLEET_PREFIX}{name}"


def fleet_of(app: str) -> str:
    """The fleet whose application it is; empty where it is another kind of application.

    >>> fleet_of("fleet-chat"), fleet_of("gateway")
    ('chat', '')
    """
    return app.removeprefix(FLEET_PREFIX) if app.startswith(FLEET_PREFIX) else ""


def schema(config: Config) -> dict[str, Any]:
    """A ``ServeDeploySchema`` as plain values: what `serve deploy` takes and what a RayService embeds."""
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": ipv4(config.gateway.host), "port": config.gateway.port},
        "applications": [*(_fleet(config.spec(name)) for name in config.fleets), _gateway(config)],
    }


def unscaled(config: Config) -> dict[str, Any]:
    """The configuration without how many replicas there are: that is an option of the deployments, so changing it restarts nothing."""
    values = config.dump()
    del values["gateway"]["replicas"]
    for fleet in (values["fleet"], *values["fleets"].values()):
        _drop_scaling(fleet)
    return values


def scaling(config: Config) -> dict[str, Any]:
    """What `unscaled` leaves out. Merged into that it is the whole configuration again."""
    values = config.dump()
    parts = {name: {key: fleet[key] for key in FLEET_SCALING if key in fleet} for name, fleet in values["fleets"].items()}
    shared = {key: values["fleet"][key] for key in FLEET_SCALING}
    return {"gateway": {"replicas": config.gateway.replicas}, "fleet": shared, "fleets": parts}


def _drop_scaling(fleet: dict[str, Any]) -> None:
    for key in FLEET_SCALING:
        fleet.pop(key, None)


def _fleet(spec: FleetSpec) -> dict[str, Any]:
    arguments = spec.model_dump(mode="json")
    _drop_scaling(arguments["fleet"])
    return {
        "name": fleet_app(spec.name),
        "route_prefix": None,  # reached through the gateway only
        "import_path": f"{BUILDERS}:build_fleet",
        "args": arguments,
        "deployments": [{"name": "Replica", **replica_options(spec), **_scaling(spec.fleet)}],
    }


def replica_options(spec: FleetSpec) -> dict[str, Any]:
    """Serve's options for one replica: its slots, its health, how long it may take to end."""
    fleet = spec.fleet
    accelerators = {"num_gpus": fleet.tensor_parallel_size} if spec.accelerator == "gpu" else {}
    slots = {"resources": {"slot": fleet.tensor_parallel_size}} if spec.accelerator == "slot" else {}
    return {
        "ray_actor_options": {"num_cpus": 0, **accelerators, **slots, "runtime_env": {"env_vars": DRAIN}},
        "health_check_period_s": 2,
        "health_check_timeout_s": 10,
        "graceful_shutdown_timeout_s": fleet.drain_timeout_s + 15,
        "graceful_shutdown_wait_loop_s": 0.2,
    }


def _scaling(fleet: Fleet) -> dict[str, Any]:
    """Always as autoscaling, bounds that are equal too: between a fixed number and a range Serve would replace every replica."""
    return {
        "autoscaling_config": {
            "min_replicas": fleet.min_replicas,
            "initial_replicas": max(1, fleet.min_replicas),
            "max_replicas": fleet.max_replicas,
            "upscale_delay_s": fleet.scale_up_after_s,
            "downscale_delay_s": fleet.scale_down_after_s,
            "downscale_to_zero_delay_s": fleet.sleep_after_s,
            "target_ongoing_requests": fleet.target_running,
            "metrics_interval_s": 0.5,
            "look_back_period_s": 1,
            "policy": {
                "policy_function": "deployments.autoscaling:LoadPolicy",
                "policy_kwargs": {"kv_use": fleet.target_kv_use, "ttft_s": fleet.target_ttft_s},
            },
        }
    }


def start_fleet(spec: FleetSpec) -> None:
    """Deploy a fleet beside the declared applications; returns at once."""
    _run(fleet_app(spec.name), import_module(BUILDERS).fleet(spec, None, {**replica_options(spec), **_scaling(spec.fleet)}))


def start_surge(spec: FleetSpec, app: str, weights: VersionId, replicas: int) -> None:
    """Deploy ``replicas`` of a fleet that host ``weights`` whatever is live, as an application of their own; returns at once."""
    options = {**replica_options(spec), "num_replicas": replicas, "max_constructor_retry_count": SURGE_ATTEMPTS}
    _run(app, import_module(BUILDERS).fleet(spec, weights, options))


def _run(name: str, application: Any) -> None:
    from ray import serve  # in control's process; commands only declare, and need not wait seconds for its import

    target = serve.RunTarget(application, name, None)
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def _gateway(config: Config) -> dict[str, Any]:
    return {
        "name": GATEWAY_APP,
        "route_prefix": "/",
        "import_path": f"{BUILDERS}:build_gateway",
        "args": unscaled(config),
        "deployments": [
            {
                "name": "Gateway",
                "num_replicas": config.gateway.replicas,
                "user_config": scaling(config),  # Serve hands it to running gateways, which tell control, and restarts nothing
                "max_ongoing_requests": 10_000,  # the engine queues by itself; limits per tenant come with tenants
                "health_check_period_s": 2,  # a gateway that hangs holds up every move until Serve replaces it
                "health_check_timeout_s": 10,
                "ray_actor_options": {"num_cpus": 0, "runtime_env": {"env_vars": LEAN}},
            }
        ],
    }


def deploy(config: Config, watch: Callable[[str], None] = lambda _: None) -> None:
    """Bring the graph up on the running pool and wait until it answers. ``watch`` hears each application's state.

    Raises `PoolUnavailable` with Serve's own message where an application fails.
    """
    api = ServeApi(local.require(config).dashboard, local.bearer())
    wanted = schema(config)
    api.deploy(wanted)
    for states in _states(api, {app["name"] for app in wanted["applications"]}):
        watch(", ".join(f"{name} {state}" for name, (state, _) in sorted(states.items())))
        failed = dict.fromkeys(cause(message) for state, message in states.values() if given_up(state, message))
        if failed:
            raise PoolUnavailable(f"Serving did not start. {' '.join(failed)}", "`springtide doctor` checks the usual causes.")
        if states and all(state == "RUNNING" for state, _ in states.values()) and _answers(config):
            return
    raise PoolUnavailable(f"Serving did not start within {READY_TIMEOUT_S} s.", "`springtide status` shows what it waits for.")


def cause(message: str) -> str:
    """The last exception that Serve's message quotes, without the tracebacks around it.

    >>> cause("The deployment failed.\\nTraceback (most recent call last):\\n  File x\\ncluster.errors.ModelNotFound: m has no version.\\n")
    'm has no version.'
    """
    raised = quoted(message)
    return EXCEPTION.sub("", raised[-1]) if raised else message.strip().partition("\n")[0]


def quoted(message: str) -> list[str]:
    """The exceptions that Serve's message quotes, each with its class."""
    return [line.strip() for line in message.splitlines() if EXCEPTION.match(line.strip())]


def given_up(state: str, message: str) -> bool:
    """Whether an application does not come up: Serve has given up, or the attempts that it will still make end like the first.

    >>> given_up("DEPLOYING", "A replica failed to start. Retrying 2 more time(s). Error:\\ncluster.errors.EngineFailed: no memory\\n")
    True
    """
    return state == "DEPLOY_FAILED" or (state == "DEPLOYING" and any(line.startswith(FINAL) for line in quoted(message)[-1:]))


def message_of(application: str, deployments: Iterable[str]) -> str:
    """Serve's message about an application. The application's own says only which deployment failed, and the deployment's says why.

    >>> message_of("Failed to update the deployments ['Replica'].", ["", "The deployment failed to start.\\nValueError: no memory"])
    'The deployment failed to start.\\nValueError: no memory'
    """
    return next((one for one in deployments if quoted(one)), application)


def _answers(config: Config) -> bool:
    """Whether the gateway knows a replica for every fleet's model: its view comes from control a moment after Serve says RUNNING."""
    url = f"{local.gateway(config)}/v1/models"
    try:
        with httpx.Client(timeout=2, trust_env=False, verify=WITHOUT_TLS) as client:
            return all(client.get(f"{url}/{fleet.model}").status_code == 200 for fleet in config.fleets.values())
    except httpx.HTTPError:
        return False


def _states(api: ServeApi, declared: set[str]) -> Iterator[dict[str, tuple[str, str]]]:
    """Each declared application's (state, message), polled until the time is over. Those that control started are its own business."""
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline_s:
        yield {name: (app["status"], _message(app)) for name, app in api.applications().items() if name in declared}
        time.sleep(0.5)


def _message(app: dict[str, Any]) -> str:
    return message_of(app["message"], (one["message"] for one in app["deployments"].values()))
