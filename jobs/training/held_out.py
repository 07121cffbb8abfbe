"""The loss on answers: what training minimises, what a job reports before and after, and what the gate compares. Defined here only.

The held-out loss is a token mean: the cross entropy of all answer tokens, divided by their number. Training minimises the same number, its
exponential is the perplexity, and it depends on neither the batches nor the number of workers. A mean over the means of examples would let
one hard token of a short answer outweigh a whole long answer: with answers of 1 and 99 tokens at 3 and 1 nats per token it says 2.0, the token
mean 1.02.
"""

from collections.abc import Iterator, Sequence

import torch
from torch.nn.functional import cross_entropy

from cluster.publishing.gate import ExampleLoss
from jobs.data import Row


def answer_tokens(row: Row) -> int:
    """Tokens that carry loss: all but the prompt's. No token comes before the first, so nothing predicts it."""
    return len(row.input_ids) - max(1, row.prompt_tokens)


def answer_losses(model: torch.nn.Module, rows: Sequence[Row]) -> torch.Tensor:
    """The summed cross entropy of each row's answer, in nats, end of turn included. Padding is on the right and carries no loss."""
    device = next(model.parameters()).device
    width = max(len(row.input_ids) for row in rows)
    ids = torch.tensor([row.input_ids + [0] * (width - len(row.input_ids)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row.input_ids) + [0] * (width - len(row.input_ids)) for row in rows], device=device)
    asked = torch.tensor(
        [[row.prompt_tokens <= at < len(row.input_ids) for at in range(1, width)] for row in rows], device=device
    )
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    # The vocabulary's softmax in full precision, for the tokens that carry loss alone: it is the largest tensor of a step.
    each = cross_entropy(logits[asked].float(), ids[:, 1:][asked], reduction="none")
    return each.new_zeros(len(rows)).index_add(0, asked.nonzero()[:, 0], each)


def measured(model: torch.nn.Module, rows: Sequence[Row], micro_batch: int) -> Iterator[ExampleLoss]:
    """The loss of each row, in order. `cluster.publishing.gate.token_mean` makes one number of them."""
    for at in range(0, len(rows), micro_batch):
        portion = rows[at : at + micro_batch]
        for row, nats in zip(portion, answer_losses(model, portion).tolist(), strict=True):
            yield ExampleLoss(nats, answer_tokens(row))


def held_out_loss(model: torch.nn.Module, rows: Sequence[Row], micro_batch: int, rank: int, world: int) -> float:
    """The token mean over all rows. The workers of a process group call it together, and each measures its share."""
    losses = list(measured(model, rows[rank::world], micro_batch))
    # In double precision: the same examples give the same loss, however they are shared out.
    sums = torch.tensor([sum(one.nats for one in losses), sum(one.tokens for one in losses)], dtype=torch.float64)
    sums = sums.to(next(model.parameters()).device)
    torch.distributed.all_reduce(sums)
    return (sums[0] / sums[1]).item()
