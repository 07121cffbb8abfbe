"""Checkpoints of a run whose workers have several processes, each with a part of the model (`jobs.training.sharding.parts`).

All workers have the same state, so the processes of one worker write it, each its own part. A checkpoint is complete once all parts of it are in
the store (`jobs.training.state.shard_checkpoints`). It is read by as many processes as wrote it.

Example: a worker has two processes, and died when one of them had written step 55. Another worker's two processes both go on from step 40.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from cluster.errors import StoreUnavailable
from cluster.store.objects import Store
from jobs.training.sharding.parts import Parts
from jobs.training.state.checkpoints import Snapshot
from jobs.training.state.shard_checkpoints import DamagedShard, Shard, ShardCheckpoints, Whole

Found = TypeVar("Found")


class PartCheckpoints:
    """`jobs.training.state.checkpoints.Checkpoints` for one process of a worker."""

    def __init__(self, store: Store, run: str, parallel: Parts) -> None:
        self.shards, self.parallel = ShardCheckpoints(store, run), parallel
        self.store, self.root = store, self.shards.root

    def commit(self, snapshot: Snapshot) -> None:
        """Write this process's part of a checkpoint. Raises `StoreUnavailable`; the checkpoints before stay then."""
        if self.shards.read(snapshot.step) is None:
            part, parts = self.parallel.part, self.parallel.parts
            numbers = {name: one.numel() * parts for name, one in snapshot.tensors.items()}
            step, meta, tensors, group = snapshot
            self.shards.commit(Shard(step, meta, tensors, numbers, part, parts, group))

    def newest(self, after: int = -1) -> Snapshot | None:
        """The newest complete checkpoint of a step later than ``after``. All processes of the worker call this together, and find the same one.

        Raises `StoreUnavailable` on all of them.
        """
        shared: list[Any] = [self._together(lambda: self._complete(after))]
        dist.broadcast_object_list(shared, group=self.parallel.group, group_src=0)
        for whole in shared[0]:
            if snapshot := self._together(lambda whole=whole: self._read(whole)):
                return snapshot
        return None

    def _complete(self, after: int) -> list[Whole]:
        """Those that part 0 finds, the newest first."""
        return [] if self.parallel.part else [whole for whole in self.shards.complete() if whole.step > after]

    def _read(self, whole: Whole) -> Snapshot:
        part = self.parallel.part
        names = whole.writers[part]["tensors"]
        return Snapshot(whole.step, whole.meta, {name: self.shards.piece(whole, name, part, torch.float32) for name in names})

    def _together(self, read: Callable[[], Found]) -> Found | None:
        """What this process reads; None on all processes of the worker if one of them finds a damaged part."""
        found, failed = None, None
        try:
            found = read()
        except (DamagedShard, StoreUnavailable) as error:
            print(error, flush=True)
            failed = error
        said: list[Exception | None] = [None] * self.parallel.parts
        dist.all_gather_object(said, failed, self.parallel.group)
        for error in said:
            if isinstance(error, StoreUnavailable):
                raise error
        return None if any(said) else found
