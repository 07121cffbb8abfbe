"""What objectives share: the gradients of a batch whose examples' losses add up, portion by portion, and what to do where memory is short."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from jobs.training.recipe import Recipe, schedule
from jobs.training.sharding.parts import PartParameters
from jobs.training.sharding.pipeline_parallel import PipelineParallel
from jobs.training.sharding.sharded import Sharded, SlicedParameters, Weights, passes
from jobs.training.sharding.tensor_parallel import TensorParallel
from jobs.training.step.flat import FlatParameters
from jobs.training.step.flops import peak_per_s, per_token
from jobs.training.step.kernels import choose
from jobs.training.step.packing import deal, portions
from jobs.training.step.precision import compute_dtype, computing
from jobs.training.work import Trained

One = TypeVar("One")


class Losses(NamedTuple):
    """Two tensors of shape ()."""

    minimised: torch.Tensor
    """What the gradient is of."""
    told: torch.Tensor
    """What the run reports, and by which it has diverged, where it minimises something else."""


class Objective(ABC, Generic[One]):
    """`jobs.training.work.Work` but for `measure` and `save`. ``One``: what is learnt at a time, and never divided: a row, or a pair of rows."""

    def __init__(
        self,
        recipe: Recipe,
        model: Any,
        count: int,
        hopeless: float,
        device: torch.device,
        weights: Weights | None = None,
        part: int = 0,
    ) -> None:
        """``recipe``: with its defaults resolved. ``model``: in training mode. ``count``: the examples to train on. ``weights`` opens what is in the
        model, for a recipe that shards it. ``part``: of the model, which this process has, for a recipe that gives a worker several processes."""
        self.recipe, self.hopeless, self.device = recipe, hopeless, device
        self.schedule = schedule(recipe, count)
        self.limit_tokens = recipe.micro_batch_tokens
        shape = model.config.get_text_config()
        peak = peak_per_s(device, getattr(torch, recipe.precision), shape.hidden_size)
        parts, fsdp = recipe.sharding.parts, recipe.sharding.weights == "fsdp"
        self.ideal_s_per_token = per_token(model) / peak / parts if peak else 0.0
        choose(recipe, model)
        self.sharded = Sharded(model, weights, compute_dtype(recipe), device) if weights and fsdp else None
        way = TensorParallel if recipe.sharding.tensor > 1 else PipelineParallel
        self.parallel = way(model, part, parts) if parts > 1 else None
        self.model: Any = model if self.sharded else model.to(device)
        rates = self.schedule.learning_rate, recipe.weight_decay
        if self.parallel:
            self.flat: Trained = PartParameters(self.parallel, *rates)
        elif self.slices is None:
            self.flat = FlatParameters([parameter for parameter in model.parameters() if parameter.requires_grad], *rates)

    # the model

    @property
    def slices(self) -> Sharded | None:
        """The model, if all weights are trained and each worker has only slices of them."""
        return None if self.recipe.lora else self.sharded

    def form(self, rank: int, world: int) -> None:
        """Prepare for a process group: a sharded model is cut anew. Where a pass needs several processes, all of them take as few tokens at a time as
        the one with the least memory."""
        if self.parallel:
            self.parallel.form(world)
        if self.sharded:
            self._shard(rank, world)
        if self.parallel or self.sharded:
            limits = [self.limit_tokens] * dist.get_world_size()
            dist.all_gather_object(limits, self.limit_tokens)
            self.limit_tokens = min(limits)

    def _shard(self, rank: int, world: int) -> None:
        assert self.sharded  # noqa: S101 (whoever calls this has looked)
        self.model = None
        self.sharded.form(world)
        self.model = self.sharded.module
        if self.slices is None:
            self.sharded.fill(rank, world)
        else:
            self.flat = SlicedParameters(self.sharded.parameters, self.schedule.learning_rate, self.recipe.weight_decay)

    @property
    def plain(self) -> Any:
        """The whole model as transformers knows it; without its weights, if it is divided."""
        if self.parallel:
            return self.parallel.whole
        return self.sharded.skeleton if self.sharded else self.model

    def weights(self) -> Mapping[str, torch.Tensor]:
        """The whole model's weights by name, or at least those that are trained, on rank 0. Those that were collected are given away once."""
        divided = self.slices or self.parallel
        if divided is None:
            return self.plain.state_dict()
        found, divided.collected = divided.collected, {}
        return found

    # a batch

    @abstractmethod
    def examples(self, batch: Sequence[int]) -> list[One]:
        """The training examples of these numbers."""

    @abstractmethod
    def tokens(self, example: One) -> int:
        """The tokens that an example takes in memory."""

    @abstractmethod
    def weight(self, example: One) -> int:
        """What an example counts in the mean over a batch."""

    @abstractmethod
    def losses(self, portion: list[One]) -> Losses:
        """Of a portion, summed."""

    def gradients(self, batch: list[int], rank: int, world: int) -> tuple[torch.Tensor, int]:
        """Add this worker's part of the batch to the gradients. Returns its part of the loss, of shape (), and the tokens of the whole batch.

        The loss is the mean over the whole batch. So it depends on neither the portions nor the number of workers. Example: a batch has answers of
        10 and 30 tokens, one on each of two workers. Each divides its sum by 40, and the two parts add up to the mean over 40 tokens.
        """
        examples = self.examples(batch)
        tokens = [self.tokens(one) for one in examples]
        weight, shares = sum(self.weight(one) for one in examples), deal(tokens, world)
        while True:
            try:
                mine = passes(self.model, [portions(share, tokens, self.limit_tokens) for share in shares], rank)
                return self._accumulate(examples, mine, weight), sum(tokens)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self._halve([tokens[i] for i in shares[rank]], error)

    def _accumulate(self, examples: list[One], mine: list[list[int]], weight: int) -> torch.Tensor:
        """Add the gradients of these portions of the examples, one after the other. An empty one adds nothing, in a pass as the others."""
        total, shortest = torch.zeros((), device=self.device), min(examples, key=self.tokens)
        ahead, forward = self.parallel.ahead if self.parallel else 0, deque[torch.Tensor]()
        for portion in mine:
            with computing(self.recipe, self.device):
                losses = self.losses([examples[i] for i in portion] or [shortest])
            counted = 1 / weight if portion else 0.0
            forward.append(losses.minimised * counted)
            total += losses.told.detach() * counted
            if len(forward) > ahead:
                forward.popleft().backward()
        while forward:
            forward.popleft().backward()
        return total

    def _halve(self, tokens: list[int], error: Exception) -> None:
        """Take half as many tokens at a time from now on. Raises ``error`` where a single example is too much, and where a pass needs several
        processes: the others wait within it, so all have to begin anew, in the next process group."""
        longest = max(tokens)
        if self.limit_tokens <= longest:
            raise error
        self.flat.clear()
        self.limit_tokens = max(longest, self.limit_tokens // 2)
        print(f"out of memory: {self.limit_tokens} tokens at a time from now on (micro_batch_tokens)", flush=True)
        if self.sharded or self.parallel:
            raise error


def is_out_of_memory(error: RuntimeError) -> bool:
    """PyTorch has a class for GPUs only; its allocator for processors says it in words."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
