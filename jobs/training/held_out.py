"""The loss on answers. Training minimises it, a job reports it before and after, and the gate compares it. It is defined here only.

The held-out loss is a token mean: the cross entropy of all answer tokens, divided by their number, in nats per token. Its exponential is the
perplexity. It depends on neither the batches nor the number of workers.

A mean over the means of examples would let one hard token of a short answer outweigh a whole long answer. Example: an answer of 1 token costs 3
nats per token, and an answer of 99 tokens costs 1 nat per token. The mean of the means is 2.0; the token mean is 1.02.
"""

from collections.abc import Iterator, Sequence

import torch
from torch.nn.functional import cross_entropy

from cluster.publishing.gate import ExampleLoss
from jobs.data import Row


def answer_tokens(row: Row) -> int:
    """The number of tokens that carry loss: all but the prompt's.

    Nothing predicts the first token of a row, so it never counts. Example: a row of 10 tokens has 7 answer tokens after a prompt of 3, and 9
    without a prompt.
    """
    return len(row.input_ids) - max(1, row.prompt_tokens)


def answer_losses(model: torch.nn.Module, rows: Sequence[Row]) -> torch.Tensor:
    """The summed cross entropy of each row's answer, the end of the turn included: a tensor of shape (rows,), in nats.

    Padding stands on the right and carries no loss. The gradient flows through the result.
    """
    device = next(model.parameters()).device
    width = max(len(row.input_ids) for row in rows)
    ids = torch.tensor([row.input_ids + [0] * (width - len(row.input_ids)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row.input_ids) + [0] * (width - len(row.input_ids)) for row in rows], device=device)
    asked = torch.tensor(
        [[row.prompt_tokens <= at < len(row.input_ids) for at in range(1, width)] for row in rows], device=device
    )
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    # The softmax over the vocabulary is the largest tensor of a step. Full precision is for the tokens that carry loss only.
    each = cross_entropy(logits[asked].float(), ids[:, 1:][asked], reduction="none")
    return each.new_zeros(len(rows)).index_add(0, asked.nonzero()[:, 0], each)


def measured(model: torch.nn.Module, rows: Sequence[Row], micro_batch: int) -> Iterator[ExampleLoss]:
    """Yield the loss of each row, in order, ``micro_batch`` rows at a time. `cluster.publishing.gate.token_mean` makes one number of them."""
    for at in range(0, len(rows), micro_batch):
        portion = rows[at : at + micro_batch]
        for row, nats in zip(portion, answer_losses(model, portion).tolist(), strict=True):
            yield ExampleLoss(nats, answer_tokens(row))


def held_out_loss(model: torch.nn.Module, rows: Sequence[Row], micro_batch: int, rank: int, world: int) -> float:
    """The token mean over all rows, in nats per token, the same on every worker.

    All workers of a process group call this together. Each measures its share, and an all-reduce adds the shares up. Example: one worker finds
    30 nats on 10 tokens, the other 10 nats on 10 tokens; both return 2.0. Raises `RuntimeError` if another worker dies meanwhile.
    """
    losses = list(measured(model, rows[rank::world], micro_batch))
    # Double precision: the loss must not depend on how the workers share the rows.
    sums = torch.tensor([sum(one.nats for one in losses), sum(one.tokens for one in losses)], dtype=torch.float64)
    sums = sums.to(next(model.parameters()).device)
    torch.distributed.all_reduce(sums)
    return (sums[0] / sums[1]).item()
