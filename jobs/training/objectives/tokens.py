"""What objectives share that learn the next token: the loss on rows, and the held-out loss."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from jobs.data.rows import Row
from jobs.training.objectives.held_out import answer_losses, answer_tokens, held_out_loss
from jobs.training.objectives.objective import Losses, Objective
from jobs.training.recipe import Recipe
from jobs.training.sharding.sharded import Weights
from jobs.training.step.precision import computing

HOPELESS = 2.0
"""Times the loss of a model that takes every token of its vocabulary for equally likely: who does worse is not learning."""


class NextTokens(Objective[Row]):
    """`jobs.training.work.Work` but for `save`: a model that learns rows. The loss is the mean over all answer tokens, in nats per token."""

    def __init__(
        self,
        recipe: Recipe,
        model: Any,
        rows: Sequence[Row],
        held_out: Sequence[Row],
        device: torch.device,
        weights: Weights | None = None,
        part: int = 0,
    ) -> None:
        """See `Objective`."""
        self.rows, self.held_out = rows, held_out
        hopeless = HOPELESS * math.log(model.config.get_text_config().vocab_size)
        super().__init__(recipe, model, len(rows), hopeless, device, weights, part)

    def examples(self, batch: Sequence[int]) -> list[Row]:
        return [self.rows[i] for i in batch]

    def tokens(self, example: Row) -> int:
        return len(example.input_ids)

    def weight(self, example: Row) -> int:
        return answer_tokens(example)

    def losses(self, portion: list[Row]) -> Losses:
        loss = answer_losses(self.model, portion).sum()
        return Losses(loss, loss)

    @torch.no_grad()
    def measure(self, rank: int, world: int) -> dict[str, float]:
        """``{"eval_loss"}``: the held-out loss in nats per token. All workers of the process group call this together."""
        self.model.eval()
        with computing(self.recipe, self.device):
            loss = held_out_loss(self.model, self.held_out, self.limit_tokens, rank, world)
        self.model.train()
        return {"eval_loss": loss}
