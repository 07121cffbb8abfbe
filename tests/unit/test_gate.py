"""The gate judges by numbers that it states."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from cluster.config import parse
from cluster.jobspec import Evaluate
from cluster.publishing.gate import ExampleLoss, GatePolicy, Golden, Scores, Verdict, judge, latest, paired_bootstrap, token_mean
from cluster.store.jobs import JobStore
from cluster.store.objects import Store
from cluster.store.registry import Registry
from cluster.types import Lineage, VersionId
from jobs.evaluate import Sets, evaluate
from jobs.record import JobRecord, spec

POLICY = GatePolicy()
ONE, TWO, THREE = VersionId("m", 1), VersionId("m", 2), VersionId("m", 3)
RANDOM = np.random.default_rng(1)
HARD = tuple(float(x) for x in RANDOM.gamma(2, 1, 200))
"""Losses that differ far more between examples than between versions."""


def shifted(by: float, noise: float = 0.1) -> tuple[float, ...]:
    return tuple(loss + by + float(e) for loss, e in zip(HARD, RANDOM.normal(0, noise, len(HARD)), strict=True))


def passed(candidate: Scores, incumbent: Scores | None = None, golden: tuple[Golden, ...] = ()) -> bool:
    return all(check.passed for check in judge(POLICY, candidate, incumbent, golden))


def scores(per_token: Sequence[float], tokens: Sequence[int] = (10,) * 1000) -> Scores:
    """Of examples whose answers have so many tokens."""
    return Scores(tuple(ExampleLoss(loss * count, count) for loss, count in zip(per_token, tokens, strict=False)))


def test_what_chance_explains_passes_and_what_it_does_not_fails() -> None:
    assert passed(scores(shifted(0)), scores(HARD))
    assert passed(scores(shifted(-0.5)), scores(HARD))
    assert not passed(scores(shifted(0.1)), scores(HARD)), "pairing shows a rise far below the spread between examples"


def test_a_token_weighs_as_much_in_a_long_answer_as_in_a_short_one() -> None:
    """The gate used to compare means of examples' means: it passed a version that was worse on most of the tokens."""
    tokens = (2,) * 150 + (200,) * 50
    worse_on_long = tuple(loss + (-0.1 if count == 2 else 0.2) for loss, count in zip(HARD, tokens, strict=True))
    before, after = scores(HARD, tokens), scores(worse_on_long, tokens)
    assert np.mean(worse_on_long) < np.mean(HARD) and token_mean(after.losses) > token_mean(before.losses) + 0.15
    (check,) = judge(POLICY, after, before, ())
    assert not check.passed and check.numbers["loss"] == pytest.approx(token_mean(after.losses))
    rise = check.numbers["difference"]
    assert rise == pytest.approx(token_mean(after.losses) - token_mean(before.losses))


def test_a_loss_that_is_no_number_fails_even_without_an_incumbent() -> None:
    assert passed(scores(HARD))
    for bad in (math.nan, math.inf):
        assert not passed(scores((*HARD, bad)))


def test_a_fall_in_accuracy_fails() -> None:
    right = Scores(correct=(True,) * 95 + (False,) * 5)
    assert passed(right, right)
    assert not passed(Scores(correct=(True,) * 60 + (False,) * 40), right)


def test_golden_prompts_must_hold_and_the_first_broken_one_is_shown() -> None:
    (check,) = judge(
        POLICY, Scores(), None, (Golden("hi", "contain 'hello'", "hello", True), Golden("2+2", "equal '4'", "5", False))
    )
    assert not check.passed and "'2+2' should equal '4', got '5'" in check.words


def test_the_bootstrap_is_paired_and_repeatable() -> None:
    with pytest.raises(ValueError, match="same ones"):
        paired_bootstrap([1.0], [1.0, 2.0], 0.95)
    again = shifted(0.2)
    assert paired_bootstrap(again, HARD, 0.95) == paired_bootstrap(again, HARD, 0.95)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    trials = 200
    covered = 0
    for _ in range(trials):
        sample = random.normal(0.3, 1, 40)
        interval = paired_bootstrap([float(x) for x in sample], [0.0] * 40, 0.9, resamples=400)
        covered += interval.low <= 0.3 <= interval.high
    assert 0.8 < covered / trials < 0.97


@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(1, 500)), min_size=1, max_size=30))
def test_the_mean_lies_within_its_interval(weighted: list[tuple[float, int]]) -> None:
    values, weights = [value for value, _ in weighted], [weight for _, weight in weighted]
    interval = paired_bootstrap(values, [0.0] * len(values), 0.95, resamples=50, weights=weights)
    assert (
        interval.low - 1e-9 <= max(interval.mean, interval.low)
        and min(values) - 1e-9 <= interval.low <= interval.high <= max(values) + 1e-9
    )


def test_a_gate_that_measured_nothing_says_no(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    save_file({"weight": np.ones((2, 2), np.float32)}, tmp_path / "model" / "model.safetensors")
    config = parse({"home": str(tmp_path)})
    registry = Registry(Store(config.store))
    manifest = registry.register("m", "weights", None, tmp_path / "model", Lineage())
    job = JobRecord(JobStore(registry.store), spec(Evaluate(version=manifest.id)))
    verdict = evaluate(config, registry, manifest, None, Sets([], [], []), 0, job)
    assert not verdict.passed and "publishing.held_out" in verdict.words
    assert registry.verdicts(manifest.id) == [verdict]


def test_a_verdict_counts_only_against_the_version_that_is_live() -> None:
    old = Verdict(version=THREE, against=ONE, checks=(), job=None, time_s=0)
    new = Verdict(version=THREE, against=TWO, checks=(), job=None, time_s=1)
    assert latest([old, new], TWO) == new and latest([new, old], TWO) == new
    assert latest([old], TWO) is None
    alone = Verdict(version=THREE, against=None, checks=(), job=None, time_s=2)
    assert latest([alone], TWO) is None, "compared with nobody, it says nothing about the live one"
    assert latest([alone], None) == alone
