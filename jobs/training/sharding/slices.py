"""Which rows of a parameter each worker of a sharded run has. Pure.

A parameter is cut along its first dimension as `torch.chunk` cuts it, because FSDP2 does: all workers have equally many rows, but for the last ones,
which may have fewer or none. Example: 10 rows on 4 workers.

>>> [rows_of(10, rank, 4) for rank in range(4)]
[range(0, 3), range(3, 6), range(6, 9), range(9, 10)]
>>> pieces(10, rank=1, world=2, before=4)
[Piece(rank=1, rows=range(5, 6)), Piece(rank=2, rows=range(6, 9)), Piece(rank=3, rows=range(9, 10))]
"""

import math
from typing import NamedTuple


class Piece(NamedTuple):
    """Rows that one worker of an earlier group has."""

    rank: int
    rows: range
    """As rows of the whole parameter."""


def rows_of(rows: int, rank: int, world: int) -> range:
    """The rows of the worker ``rank`` of ``world``, of a parameter that has so many ``rows``."""
    each = math.ceil(rows / world)
    return range(min(rows, rank * each), min(rows, (rank + 1) * each))


def pieces(rows: int, rank: int, world: int, before: int) -> list[Piece]:
    """What the rows of a worker consist of, in order, if ``before`` workers had them. Every row comes once."""
    mine = rows_of(rows, rank, world)
    owned = (Piece(owner, _overlap(mine, rows_of(rows, owner, before))) for owner in range(before))
    return [piece for piece in owned if piece.rows]


def _overlap(one: range, other: range) -> range:
    return range(max(one.start, other.start), min(one.stop, other.stop))
