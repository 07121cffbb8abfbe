"""Members come and go, and what is learnt stays the same: real processes and process groups, no Ray."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.members import Group

EPOCHS = 600
STEPS = EPOCHS * 5


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Group]:
    group = Group(tmp_path, EPOCHS)
    yield group
    group.leave()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> float:
    """The loss at the end of a run that nobody disturbs."""
    group = Group(tmp_path_factory.mktemp("alone"), EPOCHS)
    group.come(0)
    group.learn(0)
    [end] = group.hear(0)
    group.leave()
    assert end.ended and end.step == STEPS
    return end.metrics["eval_loss"]


def test_three_then_one_then_two_then_three_learn_what_one_alone_does(group: Group, alone: float) -> None:
    group.come(0, 1, 2)
    first = 0
    for members, told in (((0, 1, 2), 1), ((0,), 0), ((0, 2), 2)):
        group.learn(*members)
        time.sleep(0.5)
        group.stop(told)
        outcomes = group.hear(*members)
        assert {one.first for one in outcomes} == {first} and len({one.step for one in outcomes}) == 1
        first = outcomes[0].step
        assert 0 < first < STEPS
    group.leave(1)
    group.come(1)  # it knows nothing, and takes over what the others know
    group.learn(0, 1, 2)
    ends = group.hear(0, 1, 2)
    assert {one.first for one in ends} == {first} and [one.ended for one in ends] == [True, False, False]
    assert {one.metrics["eval_loss"] for one in ends} == {ends[0].metrics["eval_loss"]}
    assert ends[0].metrics["eval_loss"] == pytest.approx(alone, rel=1e-3)


def test_a_member_that_is_killed_within_a_step_costs_no_step(group: Group, alone: float) -> None:
    group.come(0, 1, 2)
    group.learn(0, 1, 2)
    time.sleep(0.7)
    group.kill(2)
    broken = group.hear(0, 1)
    assert all(one.broken for one in broken) and max(one.step for one in broken) > 0
    group.learn(0, 1)
    ends = group.hear(0, 1)
    assert ends[0].first == max(one.step for one in broken)
    assert ends[0].metrics["eval_loss"] == pytest.approx(alone, rel=1e-3)


def test_everybody_leaves_and_others_go_on_from_what_was_kept(group: Group, alone: float) -> None:
    group.come(0, 1)
    group.learn(0, 1)
    time.sleep(0.5)
    group.stop(1)
    stopped = group.hear(0, 1)
    assert group.settle(0) == stopped[0].step
    group.leave(0, 1)
    group.come(2)
    group.learn(2)
    [end] = group.hear(2)
    assert end.first == stopped[0].step and end.metrics["eval_loss"] == pytest.approx(alone, rel=1e-3)


def test_who_comes_back_alone_goes_on_from_what_others_did_meanwhile(group: Group, alone: float) -> None:
    group.come(0, 1)
    group.learn(0, 1)
    time.sleep(0.2)
    group.stop(1)
    left = group.hear(0, 1)[1].step
    group.learn(0)
    time.sleep(0.3)
    group.stop(0)
    [kept] = group.hear(0)
    assert group.settle(0) == kept.step > left
    group.leave(0)
    group.learn(1)
    [end] = group.hear(1)
    assert end.first == kept.step and end.metrics["eval_loss"] == pytest.approx(alone, rel=1e-3)
