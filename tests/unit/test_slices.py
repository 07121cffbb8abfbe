"""Whoever had which rows before, each worker gets its own, once and in order."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from jobs.training.sharding.slices import pieces, rows_of

ROWS, WORKERS = st.integers(1, 200), st.integers(1, 12)


@given(ROWS, WORKERS)
def test_rows_are_cut_as_torch_cuts_them(rows: int, world: int) -> None:
    chunks = torch.arange(rows).chunk(world)
    cut = [chunk.tolist() for chunk in chunks] + [[]] * (world - len(chunks))
    assert [list(rows_of(rows, rank, world)) for rank in range(world)] == cut


@given(ROWS, WORKERS, WORKERS)
def test_every_row_arrives_exactly_once_and_from_who_has_it(rows: int, before: int, after: int) -> None:
    arrived: list[int] = []
    for rank in range(after):
        got = pieces(rows, rank, after, before)
        assert all(set(piece.rows) <= set(rows_of(rows, piece.rank, before)) for piece in got)
        mine = [row for piece in got for row in piece.rows]
        assert mine == list(rows_of(rows, rank, after))  # so no worker takes in more than it keeps
        arrived += mine
    assert arrived == list(range(rows))
