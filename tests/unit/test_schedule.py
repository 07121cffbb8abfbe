"""What a run learns does not depend on how many workers it has, or on when that changes."""

from hypothesis import given
from hypothesis import strategies as st

from jobs.training.schedule import Schedule, share_out

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


@given(st.lists(st.integers(0, 1000), max_size=40), st.integers(1, 9), st.integers(1, 7))
def test_workers_share_a_batch_without_rest_or_repeat(batch: list[int], world: int, micro_batch: int) -> None:
    shares = [share_out(batch, rank, world, micro_batch) for rank in range(world)]
    assert sorted(example for share in shares for portion in share for example in portion) == sorted(batch)
    assert all(len(portion) <= micro_batch for share in shares for portion in share)


def test_the_schedule_rises_and_then_falls_to_nothing() -> None:
    schedule = Schedule(examples=100, global_batch=10, epochs=10, seed=0, learning_rate=1.0, warmup_fraction=0.1)
    rates = [schedule.rate(step) for step in range(schedule.steps)]
    assert max(rates) == max(rates[:11]) and rates[0] < rates[9] and rates[-1] < 0.001
