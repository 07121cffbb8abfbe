"""All uses of private parts of Ray Train 2.60: the backend of `TorchConfig`, and its worker group. tests/contract/test_ray_train.py pins them.

Ray Train's workers meet at a TCP port, which PyTorch opens on every interface without authentication. A pool on one machine must listen on
loopback only. So workers on one machine meet through a file, and gloo and NCCL use loopback. Workers on several machines meet in Ray Train's way.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (Ray's own annotations are partial; what comes back is typed at once.)
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch.distributed
from ray.train.torch import TorchConfig, get_device

TorchBackend: Any = TorchConfig().backend_cls


@dataclass
class FileRendezvous(TorchConfig):
    """The ``torch_config`` of a ``TorchTrainer`` whose workers meet through a file if they are on one machine."""

    @property
    def backend_cls(self) -> Any:
        return FileBackend


class FileBackend(TorchBackend):
    folder = ""
    """Where the workers met; empty if they met in Ray Train's way."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Form the process group. Ray Train calls this after it has started the workers."""
        if len(set(worker_group.execute(node))) > 1:
            return super().on_start(worker_group, backend_config)
        backend = "nccl" if worker_group.get_resources_per_worker().get("GPU") else "gloo"
        self.folder = worker_group.execute_single(0, tempfile.mkdtemp)
        world = len(worker_group)
        ray.get([worker_group.execute_single_async(rank, join, rank, world, backend, self.folder) for rank in range(world)])

    def on_shutdown(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Leave the process group. Ray Train calls this before it ends the workers. Until then the workers may meet again, in smaller groups."""
        super().on_shutdown(worker_group, backend_config)
        if self.folder:
            worker_group.execute_single(0, shutil.rmtree, self.folder, ignore_errors=True)


def node() -> str:
    """Ray's id of the machine; runs on each worker."""
    return ray.get_runtime_context().get_node_id()


def join(rank: int, world: int, backend: str, folder: str) -> None:
    """Join the process group; runs on each worker.

    ``folder`` is on the machine that all workers share. The environment variables are those of ``torchrun``; Hugging Face's libraries read them.
    """
    context = ray.train.get_context()
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "NODE_RANK": str(context.get_node_rank()),
        "ACCELERATE_TORCH_DEVICE": str(get_device()),
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
    }
    rendezvous = (Path(folder) / "rendezvous").as_uri()
    torch.distributed.init_process_group(backend, init_method=rendezvous, rank=rank, world_size=world)
