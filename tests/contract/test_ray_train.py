"""What jobs/training/ray_train_private.py relies on in Ray Train 2.60. A failure here means: read that file again before upgrading."""

import inspect
from typing import Any

from ray.train.torch import TorchConfig

from jobs.training.ray_train_private import FileBackend, FileRendezvous, TorchBackend


def test_a_torch_config_names_its_backend_in_a_property() -> None:
    assert isinstance(inspect.getattr_static(TorchConfig, "backend_cls"), property)
    assert FileRendezvous().backend_cls is FileBackend and issubclass(FileBackend, TorchBackend)


def test_a_backend_is_started_with_the_worker_group_and_the_config() -> None:
    assert list(inspect.signature(TorchBackend.on_start).parameters) == ["self", "worker_group", "backend_config"]


def test_a_worker_group_executes_on_all_on_one_and_asynchronously() -> None:
    """The group of Ray Train v2, which `TorchTrainer` uses."""
    from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup

    for name, first in (("execute", "fn"), ("execute_single", "rank"), ("execute_single_async", "rank")):
        parameters: Any = inspect.signature(getattr(WorkerGroup, name)).parameters
        assert list(parameters)[1] == first, name
    assert callable(WorkerGroup.get_resources_per_worker) and callable(WorkerGroup.__len__)
