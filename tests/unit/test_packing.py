"""Workers share a batch by its tokens, and have it in memory in portions."""

from hypothesis import given
from hypothesis import strategies as st

from jobs.training.step.packing import deal, portions

TOKENS = st.lists(st.integers(1, 500), max_size=40)


@given(TOKENS, st.integers(1, 9))
def test_workers_share_a_batch_without_rest_or_repeat(tokens: list[int], world: int) -> None:
    shares = deal(tokens, world)
    assert len(shares) == world
    assert sorted(index for share in shares for index in share) == list(range(len(tokens)))


@given(TOKENS, st.integers(1, 9))
def test_no_worker_has_more_than_the_longest_example_above_another(tokens: list[int], world: int) -> None:
    sums = [sum(tokens[index] for index in share) for share in deal(tokens, world)]
    assert max(sums) - min(sums) <= max(tokens, default=0)


@given(TOKENS, st.integers(1, 600))
def test_a_portion_is_within_the_limit_or_one_long_example(tokens: list[int], limit_tokens: int) -> None:
    made = portions(range(len(tokens)), tokens, limit_tokens)
    assert sorted(index for portion in made for index in portion) == list(range(len(tokens)))
    assert all(len(portion) == 1 or sum(tokens[index] for index in portion) <= limit_tokens for portion in made)


@given(TOKENS.filter(bool), st.integers(500, 2000))
def test_portions_are_as_few_as_if_all_but_one_were_half_full(tokens: list[int], limit_tokens: int) -> None:
    made = portions(range(len(tokens)), tokens, limit_tokens)
    assert all(made) and (len(made) - 1) * limit_tokens / 2 < sum(tokens)


def test_portions_are_even_where_that_fits() -> None:
    assert [sum(portion) for portion in portions(range(20), range(20), limit_tokens=160)] == [95, 95]
    assert [len(portion) for portion in portions(range(3), [9, 9, 2], limit_tokens=11)] == [2, 1]
