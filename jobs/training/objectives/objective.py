"""What objectives share: the gradients of a batch whose examples' losses add up, portion by portion, and what to do where memory is short."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from jobs.training.flat import FlatParameters
from jobs.training.flops import peak_per_s, per_token
from jobs.training.packing import deal, portions
from jobs.training.precision import computing
from jobs.training.recipe import Recipe, schedule

One = TypeVar("One")


class Losses(NamedTuple):
    """Two tensors of shape ()."""

    minimised: torch.Tensor
    """What the gradient is of."""
    told: torch.Tensor
    """What the run reports, and by which it has diverged where it is hopeless, whatever else it minimises."""


class Objective(ABC, Generic[One]):
    """`jobs.training.work.Work` but for `measure` and `save`. ``One``: what is learnt at a time, and never divided: a row, or a sampled answer."""

    def __init__(self, recipe: Recipe, model: Any, count: int, hopeless: float) -> None:
        """``recipe``: with its defaults resolved. ``model``: on this worker's device, in training mode. ``count``: the examples to train on."""
        self.recipe, self.model, self.hopeless = recipe, model, hopeless
        self.schedule = schedule(recipe, count)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.flat = FlatParameters(trained, self.schedule.learning_rate, recipe.weight_decay)
        self.limit_tokens = recipe.micro_batch_tokens
        shape = model.config.get_text_config()
        peak = peak_per_s(self.flat.vector.device, getattr(torch, recipe.precision), shape.hidden_size)
        self.ideal_s_per_token = per_token(model) / peak if peak else 0.0

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
        """The summed losses of a portion."""

    def gradients(self, batch: list[int], rank: int, world: int) -> tuple[torch.Tensor, int]:
        """Add this worker's part of the batch to the gradients. Returns its part of the loss, of shape (), and the tokens of the whole batch.

        The loss is the mean over the whole batch. So it depends on neither the portions nor the number of workers. Example: a batch has answers of
        10 and 30 tokens, one on each of two workers. Each divides its sum by 40, and the two parts add up to the mean over 40 tokens.
        """
        examples = self.examples(batch)
        tokens = [self.tokens(one) for one in examples]
        weight = sum(self.weight(one) for one in examples)
        mine = [examples[i] for i in deal(tokens, world)[rank]]
        while True:
            try:
                return self._accumulate(mine, weight), sum(tokens)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(mine, error)

    def _accumulate(self, examples: list[One], weight: int) -> torch.Tensor:
        """Add the gradients of these examples, one portion after the other."""
        device = self.flat.vector.device
        total, tokens = torch.zeros((), device=device), [self.tokens(one) for one in examples]
        for portion in portions(range(len(examples)), tokens, self.limit_tokens):
            with computing(self.recipe, device):
                loss = self.losses([examples[i] for i in portion])
            (loss.minimised / weight).backward()
            total += loss.told.detach() / weight
        return total

    def _halve(self, examples: list[One], error: Exception) -> None:
        """Take half as many tokens at a time from now on. Raises ``error`` where a single example is too much."""
        longest = max(self.tokens(one) for one in examples)
        if self.limit_tokens <= longest:
            raise error
        self.flat.clear()
        self.limit_tokens = max(longest, self.limit_tokens // 2)
        print(f"out of memory: {self.limit_tokens} tokens at a time from now on (micro_batch_tokens)", flush=True)


def is_out_of_memory(error: RuntimeError) -> bool:
    """PyTorch has a class for GPUs only; its allocator for processors says it in words."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
