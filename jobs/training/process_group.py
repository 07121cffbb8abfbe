"""A process group of `torch.distributed`, and where its workers meet.

Workers of one machine meet through a file, which needs no port: PyTorch's own meeting point listens on every interface, without
authentication. Workers of several machines meet at a port of the first one's machine.
"""

import contextlib
import shutil
import socket
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import ray
import torch.distributed as dist

PATIENCE_S = 600
"""How long a collective waits for the other workers. It notices at once that one is gone; the driver finds one that hangs."""


class ProcessGroup(NamedTuple):
    """A process group, as one of its workers sees it."""

    number: int
    rank: int
    world: int
    rendezvous: str
    """A ``file://`` URL where all workers are on one machine, else a ``tcp://`` URL of the first worker's machine."""


@contextlib.contextmanager
def joined(group: ProcessGroup, cuda: bool) -> Iterator[None]:
    """Be in the process group for the block."""
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=group.rendezvous,
        rank=group.rank,
        world_size=group.world,
        timeout=timedelta(seconds=PATIENCE_S),
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


class Rendezvous:
    """Makes the place where a process group meets, and removes its file when everybody has met."""

    def __init__(self) -> None:
        self.folder: Path | None = None

    def open(self, one_machine: bool) -> str:
        """The URL for `ProcessGroup.rendezvous`."""
        self.close()
        if one_machine:
            self.folder = Path(tempfile.mkdtemp(prefix="rendezvous-"))
            return (self.folder / "file").as_uri()
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def close(self) -> None:
        """Call this after everybody has met, and not while a worker may still be leaving: PyTorch's `FileStore` looks at its end whether the
        file is there, and where it vanishes at that moment it waits for it as long as for another worker."""
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None
