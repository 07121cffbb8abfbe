"""Direct preference optimisation (Rafailov et al. 2023) on one worker: the model learns which of two answers is preferred.

With Δ = log π(chosen) − log π_ref(chosen) − (log π(rejected) − log π_ref(rejected)), the loss of a pair is −log σ(βΔ). π_ref is the base, so a
model that has learnt nothing has Δ = 0 and a loss of log 2. The log-probabilities are sums over the answers' tokens.

The base's log-probabilities never change, so they are computed once, before the first step, and kept with the run. Until then the model *is*
the base: a new adapter adds nothing (Hu et al. 2021: B = 0), and full weights are as they were loaded. So no second model is needed, and a step
costs as much as in fine-tuning. Who joins later reads what is kept, because by then the model is another.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch.nn.functional import logsigmoid

from cluster.config import parse
from cluster.errors import Conflict, JobFailed
from cluster.store.objects import Store
from jobs.data.pairs import PairRow
from jobs.training.objectives.finetune import Tuned, stored, tuned
from jobs.training.objectives.held_out import answer_losses, answer_tokens
from jobs.training.objectives.objective import Losses, Objective
from jobs.training.recipe import Preference, Recipe
from jobs.training.sharding.sharded import passes
from jobs.training.step.packing import deal, portions
from jobs.training.step.precision import computing

REFERENCE = "reference.safetensors"
"""The file of the run with the base's log-probabilities: ``train`` and ``held_out``, of shape (pairs, 2), chosen first, in nats."""


class Judged(NamedTuple):
    """A pair, and what the base makes of it."""

    rows: PairRow
    reference: float
    """log π_ref(chosen) − log π_ref(rejected), as `differences` counts it."""


class PreferenceOptimization(Objective[Judged]):
    """`jobs.training.work.Work` for the settings ``{"config", "recipe", "base", "train", "held_out", "run"}``.

    ``base`` is the id of a weights version; ``train`` and ``held_out`` are lists of `PairRow`. The loss is the mean over the batch's pairs.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        config, recipe = parse(settings["config"]), Recipe.model_validate(settings["recipe"])
        self.how = recipe.preference or Preference()
        self.train, self.held_out = list[PairRow](settings["train"]), list[PairRow](settings["held_out"])
        self.kept = Kept(Store(config.store), settings["run"])
        self.base: Tuned = tuned(config, recipe, settings["base"])
        weights = stored(self.base.folder, recipe)
        super().__init__(recipe, self.base.model, len(self.train), hopeless(self.how), self.base.device, weights)

    def examples(self, batch: Sequence[int]) -> list[Judged]:
        return judged([self.train[i] for i in batch], self.kept.read()["train"][batch], self.how)

    def tokens(self, example: Judged) -> int:
        return example.rows.tokens

    def weight(self, example: Judged) -> int:
        return 1

    def losses(self, portion: list[Judged]) -> Losses:
        loss = losses(self._deltas(portion), self.how).sum()
        return Losses(loss, loss)

    def _deltas(self, portion: list[Judged]) -> torch.Tensor:
        """Δ of each pair, of shape (pairs,)."""
        pairs = [one.rows for one in portion]
        ours = differences(log_probabilities(self.model, pairs), pairs, self.how)
        return ours - torch.tensor([one.reference for one in portion], device=ours.device)

    @torch.no_grad()
    def measure(self, rank: int, world: int) -> dict[str, float]:
        """On the held-out pairs: ``eval_loss``, the mean loss; ``preference_accuracy``, the share with Δ > 0 (Δ = 0 counts half);
        ``reward_margin``, the mean of βΔ. All workers of the process group call this together.

        Before the first step they are log 2, 0.5 and 0 by definition.
        """
        self.model.eval()
        self._refer(rank, world)
        deltas = torch.zeros(len(self.held_out))
        if not self.flat.untouched:  # an untouched model would differ from itself by rounding
            ours, its = self._log_probabilities(self.held_out, rank, world), self.kept.read()["held_out"]
            deltas = differences(ours, self.held_out, self.how) - differences(its, self.held_out, self.how)
        self.model.train()
        return averages(deltas, self.how)

    def _refer(self, rank: int, world: int) -> None:
        """Compute the base's log-probabilities and keep them, unless that is done. All workers call this together.

        They return once the store has them. So a worker that goes on, or one that joins later, finds them there. Where the group breaks
        meanwhile, the next one does it again. Raises `JobFailed` if they are missing though the run has begun.
        """
        missing = torch.tensor(float(not self.kept.present()), device=self.device)
        dist.all_reduce(missing)
        if not missing:
            return
        if not self.flat.untouched:
            raise self.kept.lost()
        every = [*self.train, *self.held_out]
        found = self._log_probabilities(every, rank, world)
        if rank == 0:
            self.kept.write({"train": found[: len(self.train)], "held_out": found[len(self.train) :]})
            print(f"kept the base's log-probabilities of {len(every)} pairs", flush=True)
        dist.barrier()

    def _log_probabilities(self, pairs: Sequence[PairRow], rank: int, world: int) -> torch.Tensor:
        """See `log_probabilities`. Each worker computes its share, and an all-reduce puts the shares together."""
        tokens = [pair.tokens for pair in pairs]
        shares = [portions(share, tokens, self.limit_tokens) for share in deal(tokens, world)]
        found = torch.zeros(len(pairs), 2, device=self.device)
        for portion in passes(self.model, shares, rank):
            with computing(self.recipe, self.device):
                each = log_probabilities(self.model, [pairs[i] for i in portion or [0]])
            found[portion] = each[: len(portion)]
        dist.all_reduce(found)
        return found.cpu()

    def save(self, target: Path) -> None:
        """See `Tuned.save`."""
        self.base.save(self.plain, self.weights, target)


# the loss


def log_probabilities(model: Any, pairs: Sequence[PairRow]) -> torch.Tensor:
    """log π of both answers of each pair: a tensor of shape (pairs, 2), chosen first, in nats, summed over the answer's tokens."""
    return -answer_losses(model, [side for pair in pairs for side in pair]).view(-1, 2)


def differences(each: torch.Tensor, pairs: Sequence[PairRow], how: Preference) -> torch.Tensor:
    """How much more likely the chosen answers are: a tensor of shape (pairs,).

    ``each``: see `log_probabilities`. With IPO they are means over the answer's tokens, as its authors confirmed to TRL's; otherwise long answers
    would have to differ as little as short ones.
    """
    if how.loss == "ipo":
        each = each / torch.tensor([[answer_tokens(side) for side in pair] for pair in pairs], device=each.device)
    return each[:, 0] - each[:, 1]


def judged(pairs: Sequence[PairRow], kept: torch.Tensor, how: Preference) -> list[Judged]:
    """``kept``: the base's `log_probabilities` of these pairs."""
    return [Judged(pair, of) for pair, of in zip(pairs, differences(kept, pairs, how).tolist(), strict=True)]


def losses(deltas: torch.Tensor, how: Preference) -> torch.Tensor:
    """The loss of each pair, of the same shape as ``deltas``: how much more than the base the model prefers the chosen answer, in nats.

    - ``sigmoid``: −(1 − ε) log σ(βΔ) − ε log σ(−βΔ), where ε is the label smoothing: conservative DPO (Mitchell, "A note on DPO with noisy
      preferences", 2023). Chowdhury et al. (2024) divide by 1 − 2ε besides, which makes the loss unbiased, and negative.
    - ``ipo``: (Δ − 1/(2β))², equation 17 of Azar et al. (2023). The preference grows to 1/(2β) and no further.

    >>> losses(torch.tensor([0.0, 10.0]), Preference(beta=0.1)).tolist()
    [0.6931471824645996, 0.3132616877555847]
    >>> losses(torch.tensor([0.0, 5.0]), Preference(beta=0.1, loss="ipo")).tolist()
    [25.0, 0.0]
    """
    if how.loss == "ipo":
        return (deltas - 1 / (2 * how.beta)) ** 2
    rewards = how.beta * deltas
    return -(1 - how.label_smoothing) * logsigmoid(rewards) - how.label_smoothing * logsigmoid(-rewards)


def hopeless(how: Preference) -> float:
    """A batch's loss above which the run has diverged: that of a model which is as sure as can be of every wrong answer.

    For ``sigmoid`` that is a reward margin of −10, odds of 22,000 to one for the wrong one; for ``ipo`` the aim, on the wrong side.

    >>> round(hopeless(Preference()), 3), round(hopeless(Preference(loss="ipo")))
    (10.0, 100)
    """
    margin = -0.5 if how.loss == "ipo" else -10.0
    return losses(torch.tensor(margin / how.beta), how).item()


def averages(deltas: torch.Tensor, how: Preference) -> dict[str, float]:
    """What `PreferenceOptimization.measure` returns, of the Δ of each pair.

    >>> averages(torch.tensor([2.0, 0.0]), Preference(loss="ipo", beta=0.25))
    {'eval_loss': 2.0, 'preference_accuracy': 0.75, 'reward_margin': 0.25}
    """
    right = (deltas > 0).double() + (deltas == 0).double() / 2
    loss, accuracy, margin = (each.double().mean().item() for each in (losses(deltas, how), right, how.beta * deltas))
    return {"eval_loss": loss, "preference_accuracy": accuracy, "reward_margin": margin}


# what is kept


class Kept:
    """The base's log-probabilities in the run's folder of the store."""

    def __init__(self, store: Store, run: str) -> None:
        self.store, self.path = store, f"runs/{run}/{REFERENCE}"
        self.known: dict[str, torch.Tensor] = {}

    def present(self) -> bool:
        return bool(self.known) or self.store.size(self.path) is not None

    def write(self, tensors: dict[str, torch.Tensor]) -> None:
        """Keep the tensors. What is kept already stays: a group that broke may have done the same."""
        with contextlib.suppress(Conflict):
            self.store.put_new(self.path, save({name: tensor.contiguous() for name, tensor in tensors.items()}))

    def read(self) -> dict[str, torch.Tensor]:
        """Every worker reads what is kept, so all have the same numbers. Raises `JobFailed` if there is nothing."""
        if not self.known:
            data = self.store.get(self.path)
            if data is None:
                raise self.lost()
            self.known = load(data)
        return self.known

    def lost(self) -> JobFailed:
        return JobFailed(
            f"{self.path} is missing from the store: it has what the base made of the data, and the model is the base no more.",
            "Start the job again without --resume.",
        )
