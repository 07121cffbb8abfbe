"""A worker of several processes, each of which has a part of the model: what the ways to cut a model have in common.

The processes of one worker compute every step together. The processes with the same part, one of each worker, have the same parameters: they add
up their gradients, take over each other's state, and any of them may write it down. So to its peers a process is what a whole worker is elsewhere.

Example: two workers of two processes. PyTorch's ranks 0 and 1 are the first worker, 2 and 3 the second. 0 and 2 have the first part.
"""

import copy
import uuid
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.distributed as dist

from jobs.training.step.flat import MESSAGES, FlatParameters


class Parts(ABC):
    """This process's part of a model."""

    def __init__(self, model: Any, part: int, parts: int, share: float = 1.0, ahead: int = 0) -> None:
        """``share``: what a process's loss, and its gradient of what all of its worker have, count in the sum of them. ``ahead``: the passes forward
        that this process makes before its first pass backward."""
        self.model, self.part, self.parts = model, part, parts
        emptied = {id(one): torch.nn.Parameter(one.to("meta"), one.requires_grad) for one in model.parameters()}
        self.whole = copy.deepcopy(model, emptied)
        """The whole model as transformers knows it, without its weights."""
        self.share, self.ahead = share, ahead
        self.group: Any = None
        """The processes of this worker, in the order of their parts."""
        self.peers: Any = None
        """The processes that have this part, one of each worker, in the order of the workers."""
        self.formation = ""
        """What no other process group is called, of any job."""
        self.collected: dict[str, torch.Tensor] = {}
        """Whole weights in the host's memory of part 0, of the last `collect`."""

    def form(self, world: int) -> None:
        """Prepare for a process group of so many workers, which this process has joined. All its processes call this together."""
        workers = [[*range(first, first + self.parts)] for first in range(0, world * self.parts, self.parts)]
        self.group, _ = dist.new_subgroups_by_enumeration(workers)
        self.peers, _ = dist.new_subgroups_by_enumeration([[*ranks] for ranks in zip(*workers, strict=True)])
        named = [uuid.uuid4().hex]
        dist.broadcast_object_list(named, 0)
        [self.formation] = named

    def leave(self) -> None:
        """The process group has ended or is broken. Only a group that nobody holds closes its connections, and by that the others notice."""
        self.group = self.peers = None

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add up what the processes of the worker have, in place."""
        dist.all_reduce(tensor, group=self.group)
        return tensor

    @abstractmethod
    def divided(self) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
        """The parameters that the run trains: those that this process alone has of its worker, and those that all of them have."""

    @abstractmethod
    def collect(self) -> None:
        """Bring the weights that the run trains to the host's memory of part 0, as ``collected``, one after the other. All processes of the worker
        call this together."""


class PartParameters(FlatParameters):
    """`FlatParameters` of one part. The vector begins with the parameters that this process alone has, and ends with those that all of its worker
    have."""

    def __init__(self, divided: Parts, learning_rate: float, weight_decay: float) -> None:
        own, common = divided.divided()
        super().__init__([*own, *common], learning_rate, weight_decay)
        self.divided = divided
        self.own_numbers = sum(one.numel() for one in own)

    def exchange(self, messages: torch.Tensor) -> tuple[list[float], float]:
        """See `FlatParameters.exchange`. The gradients are added up over the workers, within each part. Then the processes of a worker tell each
        other the lengths of theirs, what they were asked, and the gradients of what all of them have.

        So no process updates its part unless all of its worker have the sums for theirs: a worker's parts are always of the same step.
        """
        self.exchanged[-MESSAGES:] = messages
        dist.all_reduce(self.exchanged, group=self.divided.peers)
        common = self.exchanged[self.own_numbers :]
        own = self.exchanged[: self.own_numbers].norm() ** 2
        sums = self.divided.sum(torch.cat([common, own[None]]))
        common.copy_(sums[:-1] * self.divided.share)
        length = sums[-1] + common[:-MESSAGES].norm() ** 2
        return common[-MESSAGES:].tolist(), length.sqrt().item()
