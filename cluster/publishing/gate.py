"""The gate: what a version must show before any replica is touched, and the verdict. Pure.

`jobs.evaluate` measures, this file judges. Losses are compared with a paired bootstrap over examples (Efron & Tibshirani 1993, ch. 6):
both versions answer for the same examples, so what an example costs any model cancels out, and the interval is over the difference. An
example weighs as many times as its answer has tokens, because the loss that is compared is a mean over tokens (`jobs.training.objectives.held_out`).
"""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from pydantic import Field

from cluster.types import Durable, Record, Version, VersionId

RESAMPLES = 2000


class GatePolicy(Durable):
    """How much worse than the incumbent a version may be."""

    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """A version fails where it is worse with this confidence; what chance explains passes."""
    loss_margin: float = Field(default=0.05, ge=0)
    """Nats per token by which the held-out loss may rise."""
    accuracy_margin: float = Field(default=0.02, ge=0, le=1)
    """Share of tasks by which the accuracy may fall."""
    golden: float = Field(default=1.0, ge=0, le=1)
    """Share of the golden prompts' assertions that must hold."""


class Check(Durable):
    """One part of a verdict."""

    name: str
    passed: bool
    words: str
    """What was found, with the numbers, for a person."""
    numbers: dict[str, float] = Field(default_factory=dict[str, float])


class Verdict(Record):
    """``versions/<name>/<n>/verdicts/<k>.json``: stored with the version; the highest ``k`` counts."""

    version: Version
    against: Version | None
    """The incumbent it was compared with."""
    checks: tuple[Check, ...]
    job: str | None
    time_s: float

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def words(self) -> str:
        """The failed checks, or all where none failed."""
        chosen = [check for check in self.checks if not check.passed] or self.checks
        return "; ".join(f"{check.name}: {check.words}" for check in chosen)


class ExampleLoss(NamedTuple):
    """One held-out example."""

    nats: float
    """Summed over its answer."""
    tokens: int
    """Of its answer."""


class Scores(NamedTuple):
    """What one version scored on the sets that were supplied, example by example in the same order for every version."""

    losses: tuple[ExampleLoss, ...] = ()
    correct: tuple[bool, ...] = ()
    """Of each task."""


class Golden(NamedTuple):
    """One golden prompt and how its assertion went."""

    prompt: str
    assertion: str
    answer: str
    held: bool


class Interval(NamedTuple):
    mean: float
    low: float
    high: float


def judge(policy: GatePolicy, candidate: Scores, incumbent: Scores | None, golden: Sequence[Golden]) -> tuple[Check, ...]:
    """The checks that the supplied sets allow. Without an incumbent there is nothing to be worse than; finite it must be."""
    checks: list[Check] = []
    if candidate.losses:
        checks.append(check_loss(policy, candidate.losses, incumbent.losses if incumbent else None))
    if candidate.correct:
        checks.append(check_accuracy(policy, candidate.correct, incumbent.correct if incumbent else None))
    if golden:
        checks.append(check_golden(policy, golden))
    return tuple(checks)


def token_mean(losses: Sequence[ExampleLoss]) -> float:
    """Nats per answer token.

    >>> token_mean([ExampleLoss(nats=3.0, tokens=1), ExampleLoss(nats=99.0, tokens=99)])
    1.02
    """
    return float(sum(one.nats for one in losses) / sum(one.tokens for one in losses))


def check_loss(policy: GatePolicy, candidate: Sequence[ExampleLoss], incumbent: Sequence[ExampleLoss] | None) -> Check:
    loss = token_mean(candidate)
    numbers = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "examples": float(len(candidate))}
    if not math.isfinite(loss):
        return Check(
            name="held-out loss", passed=False, words="the loss is not a number", numbers={"examples": float(len(candidate))}
        )
    words = f"{loss:.3f} nats per token (perplexity {numbers['perplexity']:.4g}) over {len(candidate)} examples"
    if incumbent is None:
        return Check(name="held-out loss", passed=True, words=f"{words}, nothing to compare with", numbers=numbers)
    rise = paired_bootstrap(
        [one.nats / one.tokens for one in candidate],
        [one.nats / one.tokens for one in incumbent],
        policy.confidence,
        weights=[one.tokens for one in candidate],
    )
    return Check(
        name="held-out loss",
        passed=rise.low <= policy.loss_margin,
        words=f"{words}, {_against(rise, policy.confidence)}; at most {policy.loss_margin:+.3f} allowed",
        numbers={**numbers, "difference": rise.mean, "difference_low": rise.low, "difference_high": rise.high},
    )


def check_accuracy(policy: GatePolicy, candidate: Sequence[bool], incumbent: Sequence[bool] | None) -> Check:
    share = fmean(candidate)
    words, numbers = f"{share:.1%} of {len(candidate)} tasks", {"accuracy": share, "tasks": float(len(candidate))}
    if incumbent is None:
        return Check(name="task accuracy", passed=True, words=f"{words}, nothing to compare with", numbers=numbers)
    gain = paired_bootstrap([float(c) for c in candidate], [float(i) for i in incumbent], policy.confidence)
    return Check(
        name="task accuracy",
        passed=gain.high >= -policy.accuracy_margin,
        words=f"{words}, {_against(gain, policy.confidence)}; at least {-policy.accuracy_margin:+.3f} wanted",
        numbers={**numbers, "difference": gain.mean, "difference_low": gain.low, "difference_high": gain.high},
    )


def check_golden(policy: GatePolicy, golden: Sequence[Golden]) -> Check:
    held = sum(one.held for one in golden)
    broken = next((one for one in golden if not one.held), None)
    example = f"; {broken.prompt[:60]!r} should {broken.assertion}, got {broken.answer[:80]!r}" if broken else ""
    return Check(
        name="golden prompts",
        passed=held >= policy.golden * len(golden),
        words=f"{held} of {len(golden)} hold{example}",
        numbers={"held": float(held), "prompts": float(len(golden))},
    )


def paired_bootstrap(
    candidate: Sequence[float],
    incumbent: Sequence[float],
    confidence: float,
    resamples: int = RESAMPLES,
    seed: int = 0,
    weights: Sequence[float] | None = None,
) -> Interval:
    """Mean of ``candidate - incumbent`` over examples, with the percentile interval that holds it with ``confidence``.

    ``weights``: of the examples in the mean, the same for both; all equal by default. Examples are drawn with equal chance, and a resample's
    mean is weighted by what was drawn: the examples are the sample, and their tokens are not independent of each other.

    Raises `ValueError` where the two were not measured on the same examples. Deterministic: ``seed`` is fixed.
    """
    if len(candidate) != len(incumbent) or not candidate:
        raise ValueError(f"{len(candidate)} examples against {len(incumbent)}: a paired comparison needs the same ones")
    import numpy as np  # a tenth of a second, which every command would take that reads the configuration

    differences = np.asarray(candidate, dtype=np.float64) - np.asarray(incumbent, dtype=np.float64)
    heavy = np.ones(len(differences)) if weights is None else np.asarray(weights, dtype=np.float64)
    random = np.random.default_rng(seed)
    drawn = (random.integers(0, len(differences), len(differences)) for _ in range(resamples))
    means = [float(np.average(differences[chosen], weights=heavy[chosen])) for chosen in drawn]
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(np.average(differences, weights=heavy)), float(low), float(high))


def _against(interval: Interval, confidence: float) -> str:
    return f"{interval.mean:+.3f} against the incumbent ({interval.low:+.3f} to {interval.high:+.3f} with {confidence:.0%} confidence)"


def latest(verdicts: Sequence[Verdict], against: VersionId | None) -> Verdict | None:
    """The verdict that counts: the newest one that compares with the version that is live now, or with nobody where nobody is."""
    fitting = [verdict for verdict in verdicts if verdict.against == against]
    return fitting[-1] if fitting else None
