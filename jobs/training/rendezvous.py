"""How the workers of a run find each other: through a file where all are on one machine, else as Ray Train does it.

PyTorch's own meeting point is a TCP port on every interface, without authentication, and everything on a pool of one machine listens on
loopback. A file needs no port, and gloo and NCCL are told to talk over loopback.
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

RayTrains: Any = TorchConfig().backend_cls


@dataclass
class FileRendezvous(TorchConfig):
    """For ``TorchTrainer(torch_config=…)``."""

    @property
    def backend_cls(self) -> Any:
        return FileOrPort


class FileOrPort(RayTrains):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        if len(set(worker_group.execute(node))) > 1:
            return super().on_start(worker_group, backend_config)
        backend = "nccl" if worker_group.get_resources_per_worker().get("GPU") else "gloo"
        folder = worker_group.execute_single(0, tempfile.mkdtemp)
        world = len(worker_group)
        ray.get([worker_group.execute_single_async(rank, meet, rank, world, backend, folder) for rank in range(world)])
        worker_group.execute_single(0, shutil.rmtree, folder, ignore_errors=True)


def node() -> str:
    return ray.get_runtime_context().get_node_id()


def meet(rank: int, world: int, backend: str, folder: str) -> None:
    """On each worker. The variables are those of ``torchrun``, which Hugging Face's libraries read."""
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
    meeting = (Path(folder) / "meeting").as_uri()
    torch.distributed.init_process_group(backend, init_method=meeting, rank=rank, world_size=world)
