"""What jobs/training/drivers/ray_train_private.py relies on in Ray Train 2.60. A failure here means: read that file again before upgrading."""

import inspect
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.v2._internal import constants

from jobs.training.drivers.ray_train_private import FileBackend, FileRendezvous, TorchBackend


def test_a_torch_config_names_its_backend_in_a_property() -> None:
    assert isinstance(inspect.getattr_static(TorchConfig, "backend_cls"), property)
    assert FileRendezvous().backend_cls is FileBackend and issubclass(FileBackend, TorchBackend)


def test_a_backend_is_started_and_shut_down_with_the_worker_group_and_the_config() -> None:
    for name in ("on_start", "on_shutdown"):
        assert list(inspect.signature(getattr(TorchBackend, name)).parameters) == ["self", "worker_group", "backend_config"]


def test_a_worker_group_executes_on_all_on_one_and_asynchronously() -> None:
    """The group of Ray Train v2, which `TorchTrainer` uses."""
    from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup

    for name, first in (("execute", "fn"), ("execute_single", "rank"), ("execute_single_async", "rank")):
        parameters: Any = inspect.signature(getattr(WorkerGroup, name)).parameters
        assert list(parameters)[1] == first, name
    assert callable(WorkerGroup.get_resources_per_worker) and callable(WorkerGroup.__len__)


def test_environment_variables_that_workers_get_from_the_driver() -> None:
    """What `jobs.training.drivers.ray_train.trainer` sets."""
    assert constants.ENABLE_PRINT_PATCH_ENV_VAR == "RAY_TRAIN_ENABLE_PRINT_PATCH"
    assert constants.HEALTH_CHECK_INTERVAL_S_ENV_VAR == "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
    assert constants.HEALTH_CHECK_INTERVAL_S_ENV_VAR in constants.ENV_VARS_TO_PROPAGATE


def test_a_fixed_number_of_workers_is_requested_from_the_autoscaler_and_never_resized() -> None:
    """So control leaves these slots out of its own request, see `Heartbeat.requested`."""
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

    source = inspect.getsource(FixedScalingPolicy.make_decision_for_running_worker_group)
    assert "_maybe_send_resource_request" in source and "NoopDecision" in source
