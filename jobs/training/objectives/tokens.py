"""What objectives share that learn the next token: the gradients on a batch of rows, the held-out loss, and what to do where memory is short."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from jobs.data.rows import Row
from jobs.training.flat import FlatParameters
from jobs.training.flops import peak_per_s, per_token
from jobs.training.held_out import answer_losses, answer_tokens, held_out_loss
from jobs.training.packing import deal, portions
from jobs.training.precision import computing
from jobs.training.recipe import Recipe, schedule

HOPELESS = 2.0
"""Times the loss of a model that takes every token of its vocabulary for equally likely: who does worse is not learning."""


class Losses(NamedTuple):
    """Two tensors of shape (), in nats."""

    minimised: torch.Tensor
    """What the gradient is of."""
    told: torch.Tensor
    """The cross entropy with the data. The run reports it, and has diverged where it is hopeless, whatever else it minimises."""


class NextTokens:
    """`jobs.training.work.Work` but for `save`: a model that learns rows."""

    def __init__(self, recipe: Recipe, model: Any, rows: Sequence[Row], held_out: Sequence[Row]) -> None:
        """``recipe``: with its defaults resolved. ``model``: on this worker's device, in training mode."""
        self.recipe, self.model, self.rows, self.held_out = recipe, model, rows, held_out
        self.schedule = schedule(recipe, len(rows))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.flat = FlatParameters(trained, self.schedule.learning_rate, recipe.weight_decay)
        self.limit_tokens = recipe.micro_batch_tokens
        shape = model.config.get_text_config()
        self.hopeless = HOPELESS * math.log(shape.vocab_size)
        peak = peak_per_s(self.flat.vector.device, getattr(torch, recipe.precision), shape.hidden_size)
        self.ideal_s_per_token = per_token(model) / peak if peak else 0.0

    def gradients(self, batch: list[int], rank: int, world: int) -> tuple[torch.Tensor, int]:
        """Add this worker's part of the batch to the gradients. Returns its part of the loss, of shape (), and the tokens of the whole batch.

        The loss is the mean over the answer tokens of the whole batch, in nats per token. So it depends on neither the portions nor the number of
        workers. Example: a batch has answers of 10 and 30 tokens, one on each of two workers. Each divides its sum by 40, and the two parts
        add up to the mean over 40 tokens.
        """
        rows = [self.rows[i] for i in batch]
        answers = sum(answer_tokens(row) for row in rows)
        mine = [rows[i] for i in deal([len(row.input_ids) for row in rows], world)[rank]]
        while True:
            try:
                return self._accumulate(mine, answers), sum(len(row.input_ids) for row in rows)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(mine, error)

    def _accumulate(self, rows: list[Row], answers: int) -> torch.Tensor:
        """Add the gradients of these rows, one portion after the other."""
        device = self.flat.vector.device
        total, tokens = torch.zeros((), device=device), [len(row.input_ids) for row in rows]
        for portion in portions(range(len(rows)), tokens, self.limit_tokens):
            with computing(self.recipe, device):
                loss = self.losses([rows[i] for i in portion])
            (loss.minimised / answers).backward()
            total += loss.told.detach() / answers
        return total

    def losses(self, rows: Sequence[Row]) -> Losses:
        """Of one portion, summed over its answer tokens."""
        loss = answer_losses(self.model, rows).sum()
        return Losses(loss, loss)

    def _halve(self, rows: list[Row], error: Exception) -> None:
        """Take half as many tokens at a time from now on. Raises ``error`` where a single example is too much."""
        longest = max(len(row.input_ids) for row in rows)
        if self.limit_tokens <= longest:
            raise error
        self.flat.clear()
        self.limit_tokens = max(longest, self.limit_tokens // 2)
        print(f"out of memory: {self.limit_tokens} tokens at a time from now on (micro_batch_tokens)", flush=True)

    @torch.no_grad()
    def measure(self, rank: int, world: int) -> dict[str, float]:
        """``{"eval_loss"}``: the held-out loss in nats per token. All workers of the process group call this together."""
        self.model.eval()
        with computing(self.recipe, self.flat.vector.device):
            loss = held_out_loss(self.model, self.held_out, self.limit_tokens, rank, world)
        self.model.train()
        return {"eval_loss": loss}


def is_out_of_memory(error: RuntimeError) -> bool:
    """PyTorch has a class for GPUs only; its allocator for processors says it in words."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
