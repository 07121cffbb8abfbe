"""What a run learns does not depend on how many workers it has, or on when that changes."""

from hypothesis import given
from hypothesis import strategies as st

from jobs.training.driver import Next, Now, decide
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


COUNTS = st.integers(0, 5)


@given(st.builds(Now, wanted=COUNTS, learning=COUNTS, ready=COUNTS, preparing=COUNTS, least=st.integers(1, 3)))
def test_a_driver_has_no_more_workers_than_it_may(now: Now) -> None:
    do = decide(now)
    there = now.learning + now.ready + now.preparing
    assert do.dismiss <= now.ready + now.preparing and not (do.start and do.dismiss)
    assert there + do.start - do.dismiss == max(now.wanted, now.learning)
    assert do.stop == (now.learning > now.wanted) or now.ready  # otherwise nobody stops for nothing


@given(st.lists(st.tuples(COUNTS, st.integers(1, 6)), max_size=8), st.integers(1, 4))
def test_whatever_a_driver_was_given_it_ends_up_training_on_what_it_has(life: list[tuple[int, int]], last: int) -> None:
    """The slots that it may have change at any turn; a worker loads for three turns, and a step takes one."""
    learning, ready, loading = 0, 0, list[int]()
    for wanted, turns in [*life, (last, 12)]:
        for _ in range(turns):
            do = decide(Now(wanted, learning, ready, len(loading)))
            loading += [3] * do.start
            for _ in range(do.dismiss):
                ready, loading = (ready, loading[:-1]) if loading else (ready - 1, loading)
            if do.learn:
                learning, ready = ready, 0
            elif do.stop:
                learning, ready = 0, ready + learning
            ready += loading.count(1)
            loading = [left - 1 for left in loading if left > 1]
            assert learning + ready + len(loading) >= 0
    assert (learning, ready, loading) == (last, 0, []) and decide(Now(last, last, 0, 0)) == Next()


def test_the_schedule_rises_and_then_falls_to_nothing() -> None:
    schedule = Schedule(examples=100, global_batch=10, epochs=10, seed=0, learning_rate=1.0, warmup_fraction=0.1)
    rates = [schedule.rate(step) for step in range(schedule.steps)]
    assert max(rates) == max(rates[:11]) and rates[0] < rates[9] and rates[-1] < 0.001
