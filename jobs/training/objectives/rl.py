"""Reinforcement learning on one worker: an adapter that makes answers with good rewards more likely, and those with bad ones less.

GRPO (Shao et al. 2024) without a critic: an answer's advantage is how much better its reward is than those of other answers to the same prompt.
Every token of the answer has that advantage. With the ratio ρ = π / μ of its probabilities by the weights that learn, π, and by the engine that
sampled it, μ, its loss is −min(ρ·A, clip(ρ, 1 − ε_low, 1 + ε_high)·A). The loss of a step is the mean over all answer tokens of the global batch
(DAPO: Yu et al. 2025), so it depends on neither the workers nor the portions.

μ is the engine's own log-probability. So the ratio corrects at once what older weights and another implementation of the model make of a token.
Tokens whose ratio is outside `TRUSTED` carry no gradient: there the two disagree about the model, and not about the policy.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from cluster.config import parse
from cluster.errors import SpringtideError
from cluster.store.registry import registry_of
from cluster.store.versions import Versions
from cluster.types import Lineage, VersionId, interim_name
from jobs.data.rows import Row
from jobs.training.objectives.finetune import Tuned, save_adapter, tuned
from jobs.training.objectives.held_out import answers_of, summed
from jobs.training.objectives.objective import Losses, Objective
from jobs.training.objectives.samples import Exchange, Sample, step_of
from jobs.training.recipe import Recipe, Reinforcement
from jobs.training.work import HELD_OUT

TRUSTED = 0.5, 2.0
"""Ratios within which a token counts."""
LOOK_S = 0.1
AGAIN_S = 1.0
"""How long a worker waits before it tries again to write a version."""


class Learnt(NamedTuple):
    """One answer to learn from."""

    row: Row
    """Prompt and answer."""
    sample: Sample


class Seen(NamedTuple):
    """What a worker has seen of answers since it was last measured; sums."""

    tokens: float = 0.0
    drift: float = 0.0
    """|log π − log μ| of all tokens, in nats."""
    masked: float = 0.0
    """Tokens outside `TRUSTED`."""
    clipped: float = 0.0
    """Tokens whose ratio was clipped, so that they carry no gradient."""


class Reinforcing(Objective[Learnt]):
    """`jobs.training.work.Work` for the settings ``{"config", "recipe", "run", "base", "prompts"}``.

    ``base`` is the id of a weights version, and ``prompts`` the token ids of every prompt. Making one reads the base from the store. The recipe has
    ``lora`` and ``reinforcement``.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        config, recipe = parse(settings["config"]), Recipe.model_validate(settings["recipe"])
        self.how, self.prompts = recipe.reinforcement or Reinforcement(), settings["prompts"]
        registry = registry_of(config)
        self.base: Tuned = tuned(config, recipe, settings["base"])
        super().__init__(recipe, self.base.model, len(self.prompts), hopeless=torch.inf, device=self.base.device)
        self.exchange = Exchange(registry.store, settings["run"])
        self.publisher = Publisher(registry.catalog, settings["run"], self.base.id)
        self.answers: tuple[int, list[Learnt]] = -1, []
        """A step, and what it learns from."""
        self.seen = Seen()

    # data

    def ready(self, rank: int) -> bool:
        """See `jobs.training.work.Awaits`. The first worker also publishes its weights, which others answer with."""
        if rank == 0:
            self.publisher.offer(self.flat.steps, self.copied)
        if self.answers[0] != self.flat.steps and (found := self._rollouts()) is not None:
            self.answers = self.flat.steps, found
        return self.answers[0] == self.flat.steps

    def _rollouts(self) -> list[Learnt] | None:
        try:
            groups = self.exchange.rollouts(self.flat.steps)
        except SpringtideError as error:
            print(f"the answers cannot be read, trying again: {error}", flush=True)
            return None
        if groups is None:
            return None
        return [learnt(self.prompts[group.example], sample) for group in groups for sample in group.samples]

    def examples(self, batch: Sequence[int]) -> list[Learnt]:
        """The answers to the batch's prompts; all of them, because those without an advantage count in the mean."""
        return self.answers[1]

    def tokens(self, example: Learnt) -> int:
        return len(example.row.input_ids) if example.sample.advantage or self.how.kl else 0

    def weight(self, example: Learnt) -> int:
        return len(example.sample.answer_ids)

    # learning

    def losses(self, portion: list[Learnt]) -> Losses:
        """The told one is the minimised one: it is near 0 whatever the model has learnt, and the rewards say more."""
        portion = [one for one in portion if self.tokens(one)]
        if not portion:
            nothing = torch.zeros((), device=self.device, requires_grad=True)
            return Losses(nothing, nothing)
        rows, device = [one.row for one in portion], self.device
        log_pi = self.log_probabilities(rows)
        log_mu = torch.tensor([each for one in portion for each in one.sample.logprobs], device=device)
        advantage = torch.tensor([one.sample.advantage for one in portion for _ in one.sample.answer_ids], device=device)
        loss, seen = policy_losses(log_pi, log_mu, advantage, self.how)
        self.seen = Seen(*(a + b for a, b in zip(self.seen, seen, strict=True)))
        if self.how.kl:
            loss = loss + self.how.kl * from_base(log_pi, self.log_probabilities_of_base(rows))
        return Losses(loss.sum(), loss.sum())

    def log_probabilities(self, rows: Sequence[Row]) -> torch.Tensor:
        """Of every answer token, row after row, in nats; with the gradient. Shape (tokens,)."""
        return -answers_of(self.model, rows).losses()

    @torch.no_grad()
    def log_probabilities_of_base(self, rows: Sequence[Row]) -> torch.Tensor:
        """The same by the base without the adapter."""
        model: Any = self.model
        with model.disable_adapter():
            return self.log_probabilities(rows)

    # measuring and saving

    @torch.no_grad()
    def measure(self, rank: int, world: int) -> dict[str, float]:
        """How good the weights are. The driver asks the fleet, which holds them; see `jobs.rollouts` for what it measures.

        ``eval_loss`` is minus the reward, so that the weights with the best reward are the run's result. ``drift`` is the mean |log π − log μ|
        since the last measurement, in nats per token. All workers of the process group call this together.
        """
        if rank == 0:
            self.publisher.offer(self.flat.steps, self.copied)
        while (found := self._measured()) is None:
            time.sleep(LOOK_S)
        tokens, drift, masked, clipped = summed(self.seen, self.device)
        self.seen = Seen()
        of_training = {"drift": drift, "masked": masked, "clipped": clipped} if tokens else {}
        return {HELD_OUT: -found["reward"], **found, **{name: value / tokens for name, value in of_training.items()}}

    def _measured(self) -> dict[str, float] | None:
        try:
            return self.exchange.measured(self.flat.steps)
        except SpringtideError as error:
            print(f"the measurement cannot be read, trying again: {error}", flush=True)
            return None

    def save(self, target: Path) -> None:
        """Write the adapter to the folder ``target``."""
        save_adapter(self.model, self.base.id, target)

    def copied(self) -> Callable[[Path], None]:
        """`save` for the adapter as it is now, whatever becomes of it. Only the training thread may call this."""
        model: Any = self.model
        state = {name: one.detach().to("cpu", copy=True) for name, one in model.state_dict().items() if "lora_" in name}
        return lambda target: save_adapter(model, self.base.id, target, state)


def learnt(prompt_ids: list[int], sample: Sample) -> Learnt:
    """
    >>> learnt([5, 6], Sample([7], [-0.1], False, "m@1", 0, 1.0)).row
    Row(input_ids=[5, 6, 7], prompt_tokens=2)
    """
    return Learnt(Row([*prompt_ids, *sample.answer_ids], len(prompt_ids)), sample)


def policy_losses(
    log_pi: torch.Tensor, log_mu: torch.Tensor, advantage: torch.Tensor, how: Reinforcement
) -> tuple[torch.Tensor, Seen]:
    """The loss of each token, and what was seen of all. All tensors have the shape (tokens,).

    Example: the weights have made two tokens 1.5 times as likely as they were when they were sampled. The one with a good answer gains nothing
    more from that (1.28 is the most), the one with a bad answer loses all of it.

    >>> tokens = torch.tensor([0.2, 0.2]).log()
    >>> policy_losses((1.5 * tokens.exp()).log(), tokens, torch.tensor([1.0, -1.0]), Reinforcement())[0]
    tensor([-1.2800,  1.5000])
    """
    ratio = (log_pi - log_mu).exp()
    trusted = (ratio >= TRUSTED[0]) & (ratio <= TRUSTED[1])
    clipped = ratio.clamp(1 - how.clip_low, 1 + how.clip_high)
    loss = torch.where(trusted, -torch.minimum(ratio * advantage, clipped * advantage), 0.0)
    bounded = trusted & (clipped * advantage < ratio * advantage)
    drift = (log_pi - log_mu).detach().abs().sum()
    return loss, Seen(*torch.stack([ratio.new_tensor(len(ratio)), drift, (~trusted).sum(), bounded.sum()]).tolist())


def from_base(log_pi: torch.Tensor, log_base: torch.Tensor) -> torch.Tensor:
    """An estimate of KL(π ‖ base) from each token, never below 0 (k3: Schulman 2020, as in GRPO). Shape (tokens,), in nats.

    >>> from_base(torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -2.0]))
    tensor([0.0000, 0.3679])
    """
    difference = log_base - log_pi
    return difference.exp() - difference - 1


class Publisher:
    """Registers a run's adapters as its interim versions, in a thread: the training goes on meanwhile."""

    def __init__(self, versions: Versions, run: str, base: VersionId) -> None:
        self.versions, self.run, self.base = versions, run, base
        self.offered = -1
        """The newest step whose weights were offered."""
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="publisher")

    def offer(self, step: int, copied: Callable[[], Callable[[Path], None]]) -> Future[None] | None:
        """Register the weights after ``step`` steps, once. ``copied()`` copies them now, and what it returns writes the copy to a folder."""
        if step == self.offered:
            return None
        self.offered = step
        return self.thread.submit(self._register, step, copied(), time.time())

    def _register(self, step: int, save: Callable[[Path], None], updated_s: float) -> None:
        while True:
            try:
                if step != self._newest():
                    self._put(step, save, updated_s)
                return
            except SpringtideError as error:
                print(f"the weights of step {step} cannot be published, trying again: {error}", flush=True)
                time.sleep(AGAIN_S)

    def _newest(self) -> int:
        """The step of the newest interim version; -1 where there is none. Another worker may have been the first one before."""
        found = self.versions.recent(interim_name(self.run), 1)
        return step_of(found[0]) if found else -1

    def _put(self, step: int, save: Callable[[Path], None], updated_s: float) -> None:
        lineage = Lineage(parent=self.base, job=self.run, recipe={"step": step}, metrics={"updated_s": updated_s})
        with TemporaryDirectory() as folder:
            save(Path(folder))
            self.versions.register_interim(self.run, self.base, Path(folder), lineage)
