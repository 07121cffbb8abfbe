"""What a run learns does not depend on how many workers it has, or on when that changes."""

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.training.schedule import Schedule, Shape

SMALL = st.builds(
    Schedule,
    examples=st.integers(1, 60),
    global_batch=st.integers(1, 20),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 5),
    learning_rate=st.just(1.0),
    warmup_fraction=st.floats(0, 0.5),
)


@given(SMALL)
def test_every_example_comes_once_an_epoch(schedule: Schedule) -> None:
    seen = [example for batch in schedule.batches() for example in batch]
    for epoch in range(int(schedule.epochs)):
        part = seen[epoch * schedule.examples : (epoch + 1) * schedule.examples]
        assert sorted(part) == list(range(schedule.examples))
    assert len(seen) == schedule.examples * schedule.epochs


@given(SMALL, st.integers(0, 100))
def test_going_on_from_a_step_sees_what_is_left_and_nothing_twice(schedule: Schedule, step: int) -> None:
    step = min(step, schedule.steps)
    whole = list(schedule.batches())
    assert list(schedule.batches(step)) == whole[step:] and len(whole) == schedule.steps


@pytest.mark.parametrize("shape", get_args(Shape))
def test_the_rate_rises_and_then_does_as_its_shape_says(shape: Shape) -> None:
    schedule = Schedule(100, 10, 10, 0, 1.0, 0.1, shape)
    rates = [schedule.rate(step) for step in range(schedule.steps)]
    assert rates[:9] == sorted(rates[:9]) and 0 < rates[0] < 0.11
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[50] == pytest.approx({"cosine": 0.5, "linear": 0.5, "constant": 1, "wsd": 1}[shape])
    assert rates[-1] == 1 if shape == "constant" else rates[-1] < 0.06
