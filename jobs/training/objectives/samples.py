"""Sampled answers with their rewards: what the driver of a reinforcement run and its workers tell each other through the store.

::

    runs/<run>/rollouts/<step>.json    the driver: the answers of one step
    runs/<run>/measured/<step>.json    the driver: how good the weights after so many steps are
    versions/interim--<run>/<n>/…      the first worker: an adapter after each step, its lineage says which

Whoever comes later finds all there is. Nothing is written twice: a run that goes on from an older checkpoint does the same steps on the same
answers again.
"""

import json
from collections.abc import Sequence
from statistics import fmean, pstdev
from typing import NamedTuple

from cluster.errors import Conflict
from cluster.store.objects import Store
from cluster.types import Manifest
from jobs.training.recipe import Scale

STEADY = 1e-4
"""Keeps what divides a group's advantages away from 0 (TRL has the same)."""


class Sample(NamedTuple):
    """One sampled answer."""

    answer_ids: list[int]
    """The tokens as the engine sampled them, the end of the turn included where it came that far."""
    logprobs: list[float]
    """Of each of them, by the engine, in nats."""
    cut: bool
    """Whether the answer was cut off at the recipe's ``answer_tokens``."""
    version: str
    """Which interim version has answered."""
    behind: int
    """How many steps that one is behind the step that learns from the answer."""
    reward: float
    advantage: float = 0.0


class Group(NamedTuple):
    """The answers to one prompt."""

    example: int
    """The prompt's number."""
    samples: list[Sample]


class Exchange:
    """The store, as the driver and the workers of one run use it."""

    def __init__(self, store: Store, run: str) -> None:
        self.store, self.root = store, f"runs/{run}"

    def rollouts(self, step: int) -> list[Group] | None:
        """The answers of a step; None until they are there."""
        raw = self.store.get(f"{self.root}/rollouts/{step:08d}.json")
        if raw is None:
            return None
        return [Group(one["example"], [Sample(**each) for each in one["samples"]]) for one in json.loads(raw)]

    def put_rollouts(self, step: int, groups: Sequence[Group]) -> None:
        plain = [{"example": one.example, "samples": [each._asdict() for each in one.samples]} for one in groups]
        self._put(f"rollouts/{step:08d}.json", plain)

    def forget_rollouts(self, before: int) -> None:
        """Remove the answers of the steps before a checkpoint: nobody does those again."""
        for name in self.store.children(f"{self.root}/rollouts"):
            if int(name.partition(".")[0]) < before:
                self.store.delete(f"{self.root}/rollouts/{name}")

    def measured(self, step: int) -> dict[str, float] | None:
        """What was measured of the weights after ``step`` steps; None until it is there."""
        raw = self.store.get(f"{self.root}/measured/{step:08d}.json")
        return None if raw is None else json.loads(raw)

    def put_measured(self, step: int, metrics: dict[str, float]) -> None:
        self._put(f"measured/{step:08d}.json", metrics)

    def _put(self, name: str, value: object) -> None:
        try:
            self.store.put_own(f"{self.root}/{name}", json.dumps(value).encode())
        except Conflict:  # a driver before this one was faster, and what is there counts
            return


def step_of(manifest: Manifest) -> int:
    """How many steps an interim version's weights have done."""
    return int(manifest.lineage.recipe["step"])


def with_advantages(group: Group, scale: Scale) -> Group:
    """The group, whose answers know how much better they are than its mean.

    Without answers of different rewards there is nothing to learn: all advantages are 0.
    """
    each = advantages([one.reward for one in group.samples], scale)
    return group._replace(samples=[one._replace(advantage=it) for one, it in zip(group.samples, each, strict=True)])


def advantages(rewards: Sequence[float], scale: Scale) -> list[float]:
    """How much better each reward is than the mean of all.

    ``group`` divides by the standard deviation (GRPO: Shao et al. 2024). ``none`` does not, so that a question nearly all of whose answers are
    right, or wrong, counts no more than others (Dr. GRPO: Liu et al. 2025).

    >>> advantages([1, 0, 0, 1], "none"), [round(one, 2) for one in advantages([1, 0, 0, 0], "group")], advantages([1, 1], "group")
    ([0.5, -0.5, -0.5, 0.5], [1.73, -0.58, -0.58, -0.58], [0.0, 0.0])
    """
    mean = fmean(rewards)
    over = pstdev(rewards) + STEADY if scale == "group" else 1.0
    return [(one - mean) / over for one in rewards]
