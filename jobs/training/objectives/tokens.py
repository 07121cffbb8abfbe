"""What objectives share that learn the next token: the gradients on a batch of rows, the held-out loss, and what to do where memory is short."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from jobs.data.rows import Row
from jobs.training.flat import FlatParameters
from jobs.training.flops import peak_per_s, per_token
from jobs.training.held_out import answer_losses, answer_tokens, held_out_loss
from jobs.training.packing import deal, portions
from jobs.training.precision import compute_dtype, computing
from jobs.training.recipe import Recipe, schedule
from jobs.training.sharded import Sharded, SlicedParameters, Weights, passes
from jobs.training.work import Trained

HOPELESS = 2.0
"""Times the loss of a model that takes every token of its vocabulary for equally likely: who does worse is not learning."""


class NextTokens:
    """`jobs.training.work.Work` but for `save`: a model that learns rows."""

    def __init__(
        self, recipe: Recipe, model: Any, rows: Sequence[Row], held_out: Sequence[Row], device: torch.device, weights: Weights
    ) -> None:
        """``recipe``: with its defaults resolved. ``model``: in training mode. ``weights`` opens what is in it, for a model that is sharded."""
        self.recipe, self.rows, self.held_out, self.device = recipe, rows, held_out, device
        self.schedule = schedule(recipe, len(rows))
        self.limit_tokens = recipe.micro_batch_tokens
        self.sharded = Sharded(model, weights, compute_dtype(recipe), device) if recipe.sharding == "fsdp" else None
        self.model: Any = model if self.sharded else model.to(device)
        if self.slices is None:
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            self.flat: Trained = FlatParameters(trained, self.schedule.learning_rate, recipe.weight_decay)
        shape = model.config.get_text_config()
        self.hopeless = HOPELESS * math.log(shape.vocab_size)
        peak = peak_per_s(device, getattr(torch, recipe.precision), shape.hidden_size)
        self.ideal_s_per_token = per_token(model) / peak if peak else 0.0

    @property
    def slices(self) -> Sharded | None:
        """The model, if all weights are trained and each worker has only slices of them."""
        return None if self.recipe.lora else self.sharded

    def form(self, rank: int, world: int) -> None:
        """Prepare for a process group: a sharded model is cut anew, and all workers take as few tokens at a time as the one with the least memory."""
        if self.sharded is None:
            return
        self.model = None
        self.sharded.form(world)
        self.model = self.sharded.module
        if self.slices is None:
            self.sharded.fill(rank, world)
        else:
            self.flat = SlicedParameters(self.sharded.parameters, self.schedule.learning_rate, self.recipe.weight_decay)
        limits = [self.limit_tokens] * world
        dist.all_gather_object(limits, self.limit_tokens)
        self.limit_tokens = min(limits)

    def weights(self) -> dict[str, torch.Tensor]:
        """The whole model's weights by name, on rank 0. Those that were collected are given away once."""
        if self.slices is None:
            return self.model.state_dict()
        found, self.slices.collected = self.slices.collected, {}
        return found

    def gradients(self, batch: list[int], rank: int, world: int) -> tuple[torch.Tensor, int]:
        """Add this worker's part of the batch to the gradients. Returns its part of the loss, of shape (), and the tokens of the whole batch.

        The loss is the mean over the answer tokens of the whole batch, in nats per token. So it depends on neither the portions nor the number of
        workers. Example: a batch has answers of 10 and 30 tokens, one on each of two workers. Each divides its sum by 40, and the two parts
        add up to the mean over 40 tokens.
        """
        rows = [self.rows[i] for i in batch]
        answers = sum(answer_tokens(row) for row in rows)
        tokens = [len(row.input_ids) for row in rows]
        shares = deal(tokens, world)
        while True:
            try:
                mine = passes(self.model, [portions(share, tokens, self.limit_tokens) for share in shares], rank)
                return self._accumulate(rows, mine, answers), sum(tokens)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self._halve([rows[i] for i in shares[rank]], error)

    def _accumulate(self, rows: list[Row], mine: list[list[int]], answers: int) -> torch.Tensor:
        """Add the gradients of these portions of the rows, one after the other. An empty one adds nothing, in a pass as the others."""
        total, shortest = torch.zeros((), device=self.device), min(rows, key=lambda row: len(row.input_ids))
        for portion in mine:
            with computing(self.recipe, self.device):
                losses = answer_losses(self.model, [rows[i] for i in portion] or [shortest])
                loss = losses.sum() / answers if portion else losses.sum() * 0
            loss.backward()
            total += loss.detach()
        return total

    def _halve(self, rows: list[Row], error: Exception) -> None:
        """Take half as many tokens at a time from now on. Raises ``error`` where a single example is too much, and where the model is sharded:
        the other workers wait within a pass, so all have to begin anew, in the next process group."""
        longest = max(len(row.input_ids) for row in rows)
        if self.limit_tokens <= longest:
            raise error
        self.flat.clear()
        self.limit_tokens = max(longest, self.limit_tokens // 2)
        print(f"out of memory: {self.limit_tokens} tokens at a time from now on (micro_batch_tokens)", flush=True)
        if self.sharded:
            raise error

    @torch.no_grad()
    def measure(self, rank: int, world: int) -> dict[str, float]:
        """``{"eval_loss"}``: the held-out loss in nats per token. All workers of the process group call this together."""
        self.model.eval()
        with computing(self.recipe, self.device):
            loss = held_out_loss(self.model, self.held_out, self.limit_tokens, rank, world)
        self.model.train()
        return {"eval_loss": loss}


def is_out_of_memory(error: RuntimeError) -> bool:
    """PyTorch has a class for GPUs only; its allocator for processors says it in words."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
