"""Who gets the canary, and when it counts as worse."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.publishing.canary import ALPHA, MIN_REQUESTS, Comparison, Margins, Tally, looks, merge, tail, takes_canary
from cluster.types import VersionId

TWO, THREE = VersionId("m", 2), VersionId("m", 3)
SESSIONS = [f"user-{n}" for n in range(4000)]
STEADY = Tally(requests=200, ttft_s=(0.05,) * 100, itl_s=(0.01,) * 100, finish={"stop": 180, "length": 20})


@given(st.text(max_size=40), st.floats(0, 100), st.floats(0, 100))
def test_a_higher_share_only_adds_sessions(session: str, a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert takes_canary("m", TWO, low, session) <= takes_canary("m", TWO, high, session)
    assert not takes_canary("m", TWO, 0, session) and takes_canary("m", TWO, 100, session)


@pytest.mark.parametrize("percent", [1, 5, 25, 50])
def test_the_share_is_the_share(percent: int) -> None:
    taken = sum(takes_canary("m", TWO, percent, session) for session in SESSIONS)
    assert abs(taken / len(SESSIONS) * 100 - percent) < 2.5


def test_the_next_canary_falls_on_other_sessions() -> None:
    both = sum(takes_canary("m", TWO, 25, s) and takes_canary("m", THREE, 25, s) for s in SESSIONS)
    assert abs(both / len(SESSIONS) - 1 / 16) < 0.02


def worse(canary: Tally, stable: Tally = STEADY, **margins: float) -> str:
    return Comparison(canary, stable).worse(Margins(**margins))


def test_the_same_is_not_worse() -> None:
    assert worse(STEADY) == "" and worse(Tally(), Tally()) == ""


def test_errors_above_the_margin_are_worse() -> None:
    assert "5.0% of its requests fail" in worse(STEADY._replace(errors=10))
    assert worse(STEADY._replace(errors=3)) == "" and worse(STEADY._replace(errors=10), STEADY._replace(errors=10)) == ""


def test_two_failures_are_no_evidence() -> None:
    assert worse(Tally(requests=2, errors=2)) == ""
    assert worse(Tally(requests=3, errors=3)) != ""


def test_slower_medians_are_worse_when_somebody_could_notice() -> None:
    assert "first token 80 ms against 50 ms" in worse(STEADY._replace(ttft_s=(0.08,) * 50))
    assert "between tokens" in worse(STEADY._replace(itl_s=(0.05,) * 50))
    assert worse(STEADY._replace(itl_s=(0.004,) * 50), STEADY._replace(itl_s=(0.002,) * 50)) == ""
    assert worse(STEADY._replace(ttft_s=(9.0,) * (MIN_REQUESTS - 1))) == ""


def test_answers_that_end_otherwise_are_worse() -> None:
    assert "length 100% against 10%" in worse(STEADY._replace(finish={"length": 30}))
    assert worse(STEADY._replace(finish={"stop": 30, "length": 10})) == ""


def test_shadowed_answers_may_differ_as_far_as_the_margin_says() -> None:
    shadow = STEADY._replace(shadowed=40, disagreed=30)
    assert worse(shadow) == "" and "75% of shadowed answers differ" in worse(shadow, disagreement=0.5)


@given(st.lists(st.builds(Tally, requests=st.integers(0, 9), errors=st.integers(0, 9), finish=st.just({"stop": 1})), max_size=5))
def test_what_several_gateways_saw_adds_up(tallies: list[Tally]) -> None:
    whole = merge(tallies)
    assert whole.requests == sum(t.requests for t in tallies) and whole.errors == sum(t.errors for t in tallies)
    assert whole.finish.get("stop", 0) == len(tallies)


def test_shadows_that_fail_count_over_all_shadows_and_not_among_answers() -> None:
    """Nobody saw them: three in four hundred are no outage, forty are."""
    few = STEADY._replace(shadowed=400, shadows_failed=3)
    many = STEADY._replace(shadowed=400, shadows_failed=40)
    assert worse(few) == "" and "10.0% of shadowed requests fail" in worse(many)


def test_a_canary_at_its_margin_is_seldom_rolled_back_however_often_it_is_looked_at() -> None:
    """Every half second it used to be compared anew, until chance made it look worse."""
    dice, runs, false = random.Random(1), 400, 0
    for _ in range(runs):
        errors = 0
        for answers in range(1, 1025):
            errors += dice.random() < 0.05
            due = looks(answers)
            if due > looks(answers - 1):
                seen = Comparison(Tally(requests=answers, errors=errors), Tally(requests=1000, errors=30))
                if seen.worse(Margins(error_rate=0.02), due):
                    false += 1
                    break
    assert false / runs <= ALPHA


def test_a_canary_that_fails_often_is_found_out_within_few_answers() -> None:
    for answers in (8, 16, 32):
        seen = Comparison(Tally(requests=answers, errors=answers // 2), Tally(requests=1000))
        assert "50.0% of its requests fail" in seen.worse(Margins(), looks(answers))


@given(st.integers(0, 60), st.integers(0, 60), st.floats(0, 1))
def test_a_tail_is_a_probability_and_falls(successes: int, more: int, p: float) -> None:
    trials = successes + more
    assert 0 <= tail(successes + 1, trials + 1, p) <= tail(successes, trials + 1, p) + 1e-9 <= 1 + 1e-9
