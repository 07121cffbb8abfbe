"""Which examples a worker has in memory together. Pure.

Examples of different lengths stand one after the other in one row of tokens, without padding between them. No token attends to another example's
(`jobs.training.step.packed`), so it does not matter to the loss which ones share a row.

>>> deal([9, 5, 4, 4, 1], world=2)
[[0, 3], [1, 2, 4]]
>>> portions([0, 1, 2, 3, 4], [9, 5, 4, 4, 1], limit_tokens=10)
[[0], [1, 4], [2, 3]]
"""

import heapq
from collections.abc import Sequence


def deal(tokens: Sequence[int], world: int) -> list[list[int]]:
    """Divide a batch among ``world`` workers: each one's examples, as indices into ``tokens``, the examples' lengths.

    The longest example goes first, to whoever has the fewest tokens (Graham 1969). All workers wait for the slowest, so equal shares of tokens
    make a step short. The result depends on nothing but the arguments, so every worker computes the same one.
    """
    shares: list[list[int]] = [[] for _ in range(world)]
    least = [(0, at) for at in range(world)]  # a heap: the tokens of each share
    for index in _longest_first(range(len(tokens)), tokens):
        total, at = least[0]
        shares[at].append(index)
        heapq.heapreplace(least, (total + tokens[index], at))
    return shares


def portions(indices: Sequence[int], tokens: Sequence[int], limit_tokens: int) -> list[list[int]]:
    """Group examples into portions of at most ``limit_tokens``: as few as first-fit finds, and of about equal size where that fits. Every pass has a
    cost of its own, and the largest decides how much memory a step takes and how well it fits a processor's cache.

    ``tokens[i]`` is the length of the example ``i``. An example that is longer than the limit is a portion by itself.
    """
    packed = _first_fit(indices, tokens, limit_tokens)
    if not packed:
        return []
    even = [[indices[at] for at in share] for share in deal([tokens[index] for index in indices], len(packed))]
    fits = all(len(portion) == 1 or sum(tokens[index] for index in portion) <= limit_tokens for portion in even)
    return even if fits else packed


def _first_fit(indices: Sequence[int], tokens: Sequence[int], limit_tokens: int) -> list[list[int]]:
    """The longest first, each into the first portion with room for it."""
    made: list[list[int]] = []
    sums: list[int] = []
    for index in _longest_first(indices, tokens):
        at = next((at for at, total in enumerate(sums) if total + tokens[index] <= limit_tokens), len(made))
        if at == len(made):
            made.append([])
            sums.append(0)
        made[at].append(index)
        sums[at] += tokens[index]
    return made


def _longest_first(indices: Sequence[int], tokens: Sequence[int]) -> list[int]:
    return sorted(indices, key=lambda index: (-tokens[index], index))
