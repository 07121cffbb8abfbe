"""The loss on answers. Training minimises it, a job reports it before and after, and the gate compares it. It is defined here only.

The held-out loss is a token mean: the cross entropy of all answer tokens, divided by their number, in nats per token. Its exponential is the
perplexity. It depends on neither the batches nor the number of workers.

A mean over the means of examples would let one hard token of a short answer outweigh a whole long answer. Example: an answer of 1 token costs 3
nats per token, and an answer of 99 tokens costs 1 nat per token. The mean of the means is 2.0; the token mean is 1.02.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy

from cluster.publishing.gate import ExampleLoss
from jobs.data.rows import Row
from jobs.training.sharding.sharded import passes
from jobs.training.step.packed import Segments, is_packed
from jobs.training.step.packing import portions
from jobs.training.step.vocabulary import by_chunks, chunk_tokens, states_of


def answer_tokens(row: Row) -> int:
    """The number of tokens that carry loss: all but the prompt's.

    Nothing predicts the first token of a row, so it never counts. Example: a row of 10 tokens has 7 answer tokens after a prompt of 3, and 9
    without a prompt.
    """
    return len(row.input_ids) - max(1, row.prompt_tokens)


class Answers(NamedTuple):
    """What a model makes of rows where the next token is one of an answer: row after row, and within a row from left to right."""

    states: torch.Tensor
    """Shape (tokens, width)."""
    head: Callable[[torch.Tensor], torch.Tensor]
    """Makes logits of states."""
    targets: torch.Tensor
    """The tokens that come next. Shape (tokens,)."""
    rows: torch.Tensor
    """The number of each token's row. Shape (tokens,)."""
    chunk_tokens: int
    """How many of the tokens may have logits at a time."""

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Of a chunk of the states. Shape (tokens, vocabulary), in float32: the softmax over the vocabulary needs it."""
        return self.head(states).float()

    def losses(self) -> torch.Tensor:
        """The cross entropy of each token, in nats. Shape (tokens,)."""

        def compute(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return cross_entropy(self.logits(states), targets, reduction="none")

        return by_chunks(compute, self.chunk_tokens, self.states, self.targets)


def answer_losses(model: Any, rows: Sequence[Row]) -> torch.Tensor:
    """The summed cross entropy of each row's answer, the end of the turn included: a tensor of shape (rows,), in nats.

    The gradient flows through the result. Without the output layer it is zero.
    """
    answers = answers_of(model, rows)
    if not has_output(model):
        return answers.states.new_zeros(len(rows)) + answers.states.sum()
    each = answers.losses()
    return each.new_zeros(len(rows)).index_add(0, answers.rows, each)


def has_output(model: Any) -> bool:
    """Whether this process has the output layer: of a pipeline only the last stage has it (`jobs.training.sharding.pipeline_parallel`)."""
    return not isinstance(model.get_output_embeddings(), torch.nn.Identity)


def answers_of(model: Any, rows: Sequence[Row]) -> Answers:
    """Where `jobs.training.step.packed.pack` has prepared the model, the rows stand one after the other. Otherwise they are padded to the longest, on
    the right. The answers are the same in both, in the same order, so two models need not take the rows in the same way."""
    return (_packed if is_packed(model) else _padded)(model, rows)


def _packed(model: Any, rows: Sequence[Row]) -> Answers:
    row = Segments.of([row.input_ids for row in rows], next(model.parameters()).device)
    # The model's last layer is the widest: it runs only where the next token is one of an answer.
    asked = [
        (first + at - 1, number)
        for number, (first, one) in enumerate(zip(row.bounds[:-1].tolist(), rows, strict=True))
        for at in range(max(1, one.prompt_tokens), len(one.input_ids))
    ]
    at, owner = torch.tensor(asked, device=row.input_ids.device).T
    found = states_of(
        model,
        input_ids=row.input_ids,
        position_ids=row.position_ids,
        use_cache=False,  # with a cache transformers would take the row for one text
        logits_to_keep=at,
        segment_bounds=row.bounds,
    )
    return Answers(found.states[0], found.head, row.input_ids[0, at + 1], owner, chunk_tokens(model))


def _padded(model: Any, rows: Sequence[Row]) -> Answers:
    device = next(model.parameters()).device
    width = max(len(row.input_ids) for row in rows)
    ids = torch.tensor([row.input_ids + [0] * (width - len(row.input_ids)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row.input_ids) + [0] * (width - len(row.input_ids)) for row in rows], device=device)
    asked = torch.tensor(
        [[row.prompt_tokens <= at < len(row.input_ids) for at in range(1, width)] for row in rows], device=device
    )
    found = states_of(model, input_ids=ids, attention_mask=mask, use_cache=False)
    return Answers(found.states[:, :-1][asked], found.head, ids[:, 1:][asked], asked.nonzero()[:, 0], chunk_tokens(model))


def measured(model: Any, rows: Sequence[Row], micro_batch_tokens: int) -> list[ExampleLoss]:
    """The loss of each row, in order. `cluster.publishing.gate.token_mean` makes one number of them."""
    found = _measured(model, rows, portions(range(len(rows)), [len(row.input_ids) for row in rows], micro_batch_tokens))
    return [found[i] for i in range(len(rows))]


def _measured(model: Any, rows: Sequence[Row], portions: list[list[int]]) -> dict[int, ExampleLoss]:
    """The losses of the rows in these portions. An empty portion is a pass whose result does not count, and so is one without the output layer."""
    found: dict[int, ExampleLoss] = {}
    for portion in portions:
        losses = answer_losses(model, [rows[i] for i in portion or [0]]).tolist()
        if has_output(model):
            found |= {i: ExampleLoss(nats, answer_tokens(rows[i])) for i, nats in zip(portion, losses, strict=bool(portion))}
    return found


def held_out_loss(model: Any, rows: Sequence[Row], micro_batch_tokens: int, rank: int, world: int) -> float:
    """The token mean over all rows, in nats per token, the same on every worker.

    All workers of a process group call this together. Each measures its share, and an all-reduce adds the shares up. Example: one worker finds
    30 nats on 10 tokens, the other 10 nats on 10 tokens; both return 2.0. All processes of a worker count, which does not change the mean.
    Raises `RuntimeError` if another worker dies meanwhile.
    """
    tokens = [len(row.input_ids) for row in rows]
    shares = [portions(range(len(rows))[first::world], tokens, micro_batch_tokens) for first in range(world)]
    losses = _measured(model, rows, passes(model, shares, rank)).values()
    nats, answers = summed([sum(one.nats for one in losses), sum(one.tokens for one in losses)], next(model.parameters()).device)
    return nats / answers


def summed(own: Sequence[float], device: torch.device) -> list[float]:
    """Each number's sum over all workers of the process group, who call this together. In double precision: what is measured must not depend on
    how the workers share the rows. Raises `RuntimeError` if another worker dies meanwhile."""
    sums = torch.tensor(own, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(sums)
    return sums.tolist()
