"""The training state of a run whose workers have slices of it.

No worker has the whole state, so a worker that joins gets its slices from the store. When a process group is told to stop, all its workers write
their slices of the last step, and leave only then: the next group, of any size, loses no step. When a worker dies, its slices are lost, and the next
group goes on from the newest checkpoint that is complete.
"""

import itertools
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from cluster.store.objects import Store
from jobs.training.process_group import ProcessGroup
from jobs.training.sharding.sharded import Sharded
from jobs.training.state.checkpoints import Checkpoints, Writer
from jobs.training.state.part_checkpoints import PartCheckpoints
from jobs.training.state.shard_checkpoints import DamagedShard, Shard, ShardCheckpoints, Whole
from jobs.training.state.state import Counters, State
from jobs.training.work import Work


def state_of(work: Work, store: Store, run: str) -> "State | SlicedState":
    """The state that the kind of work needs."""
    if work.slices is not None:
        return SlicedState(work, work.slices, ShardCheckpoints(store, run))
    checkpoints = PartCheckpoints(store, run, work.parallel) if work.parallel else Checkpoints(store, run)
    return State(work, checkpoints)


class SlicedState:
    """This worker's slices of the parameters and of the optimizer's moments, with the counters, which are the same on all workers."""

    def __init__(self, work: Work, slices: Sharded, checkpoints: ShardCheckpoints) -> None:
        self.work, self.slices, self.checkpoints = work, slices, checkpoints
        self.counters = Counters()
        self.lock = threading.Lock()
        """Held while the state changes."""
        self.group = ""
        """What no other process group is called, of any job."""

    @property
    def step(self) -> int:
        return self.counters.step

    def alone(self) -> None:
        """What a worker can write without the others: nothing."""

    def share(self, group: ProcessGroup) -> Shard:
        """What this worker writes of a checkpoint. All of the group do so after the same step."""
        tensors = self.work.flat.tensors(self.step)
        copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        rows = {name: self.slices.rows(name) for name in tensors}
        return Shard(self.step, self.counters._asdict(), copies, rows, group.rank, group.world, self.group)

    def collect(self, group: ProcessGroup) -> None:
        """Bring the whole weights to rank 0. All workers call this together."""
        self.slices.collect(group.rank, group.world)

    def leave(self, writer: Writer) -> None:
        """The process group has ended or is broken. What this worker has not written by now is lost."""
        if writer.flush().step < self.step:
            self.counters = Counters()

    def level(self, group: ProcessGroup) -> None:
        """Give all workers of the group their slices: of the newest complete checkpoint, or of what the run starts from. All of them call
        this together. If there is no checkpoint, the run begins: the workers measure the model and continue at step 0.

        Raises `StoreUnavailable`, and `RuntimeError` if another worker dies meanwhile.
        """
        with self.lock:
            self.counters = Counters()
            self.work.form(group.rank, group.world)
            if any(self._take(whole, group) for whole in self._candidates(group)):
                return
            self.slices.fill(group.rank, group.world)
        self.counters = Counters(0, before=self.work.measure(group.rank, group.world))

    def _candidates(self, group: ProcessGroup) -> Iterator[Whole]:
        """The complete checkpoints, the newest first, as rank 0 finds them."""
        found = self.checkpoints.complete() if group.rank == 0 else itertools.repeat(None)
        shared: list[Any] = [None, uuid.uuid4().hex]
        while True:
            shared[0] = next(found, None)
            dist.broadcast_object_list(shared, 0)
            whole, self.group = shared
            if whole is None:
                return
            yield Whole(*whole)

    @torch.no_grad()
    def _take(self, whole: Whole, group: ProcessGroup) -> bool:
        """Read this worker's slices. False, on all workers, if any of them finds a damaged piece."""
        intact = True
        try:
            for name, tensor in self.work.flat.tensors(whole.step).items():
                mine = self.checkpoints.slice_of(whole, name, group.rank, group.world, tensor)
                if mine is not None:
                    tensor.copy_(mine)
        except DamagedShard as error:
            print(f"{error}; taking the checkpoint before", flush=True)
            intact = False
        said = [False] * group.world
        dist.all_gather_object(said, intact)
        if all(said):
            self.counters = Counters.read(whole.meta)
        return all(said)
