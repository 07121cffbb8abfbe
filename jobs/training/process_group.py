"""A process group of `torch.distributed`, and the rendezvous where its workers meet.

Workers on one machine meet through a file. A file needs no port, and PyTorch's `TCPStore` listens on every interface without authentication.
Workers on several machines meet at a TCP port on the machine of rank 0.
"""

import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import ray
import torch.distributed as dist

from cluster.address import authority, family
from cluster.machine import temporary_folder

PATIENCE_S = 600
"""How long a collective waits for the other workers. It fails at once if one dies. The driver ends one that hangs, long before this."""


class ProcessGroup(NamedTuple):
    """A process group, as one process of it sees it."""

    number: int
    """Groups of a run are numbered in their order, from 1."""
    rank: int
    """This worker's place in the group, from 0."""
    world: int
    """The number of workers."""
    rendezvous: str
    """A ``file://`` URL if all workers are on one machine, else a ``tcp://`` URL of the machine of rank 0. Empty if this process has joined
    already, as a worker of Ray Train has."""
    part: int = 0
    """This process's place in its worker."""
    parts: int = 1
    """The number of processes of each worker. Those of one worker follow one another in PyTorch's ranks."""

    @property
    def leads(self) -> bool:
        """Whether this is the one process of the group that speaks for all."""
        return self.rank == self.part == 0


@contextlib.contextmanager
def joined(group: ProcessGroup, cuda: bool) -> Iterator[None]:
    """Join the process group, and leave it at the end of the block. ``cuda``: whether the tensors are on a GPU.

    Waits until all workers have joined. Raises `RuntimeError` if they do not within `PATIENCE_S`.
    """
    if not group.rendezvous:
        yield  # whoever formed the group ends it
        return
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=group.rendezvous,
        rank=group.rank * group.parts + group.part,
        world_size=group.world * group.parts,
        timeout=timedelta(seconds=PATIENCE_S),
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


class Rendezvous:
    """Makes the place where a process group meets, and removes its file after all workers have met."""

    def __init__(self) -> None:
        self.folder: Path | None = None

    def open(self, one_machine: bool) -> str:
        """Make a new rendezvous. Returns the URL for `ProcessGroup.rendezvous`.

        Examples: ``file:///tmp/rendezvous-x1y2/file`` on one machine, ``tcp://10.0.0.5:41234`` on several.
        """
        self.close()
        if one_machine:
            self.folder = Path(tempfile.mkdtemp(prefix="rendezvous-", dir=temporary_folder(os.environ)))  # PyTorch decodes no URL
            return (self.folder / "file").as_uri()
        host = ray.util.get_node_ip_address()
        with socket.socket(family(host)) as probe:
            probe.bind(("", 0))
            return f"tcp://{authority(host, probe.getsockname()[1])}"

    def close(self) -> None:
        """Remove the file. Call this after all workers have met, and not while a worker may be leaving the group.

        A worker that leaves destroys its `FileStore`, which looks for the file. If the file vanishes at that moment, PyTorch waits for it as
        long as for another worker.
        """
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None
