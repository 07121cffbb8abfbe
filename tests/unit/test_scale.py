"""Allocator and table at the full size, for a small part of a day; `python -m tests.scale` measures whole ones."""

from tests.scale import LIMIT_MS, TICKS, TURNS, Days, Row

NODES = 1000


def part(nodes: int) -> tuple[Days, Row]:
    days = Days(nodes, TURNS, seed=1)
    return days, days.live(160)


def test_a_tick_at_a_thousand_nodes_takes_no_longer_than_it_may_and_breaks_nothing() -> None:
    """Processor time, but neighbours still slow it by what they take of the caches: of so few ticks a p99 is the worst, and that may be
    three times the limit."""
    days, row = part(NODES)
    assert not days.broken
    assert {what: row[f"{what}_p50_ms"] for what in TICKS if row[f"{what}_p50_ms"] > LIMIT_MS} == {}
    assert {what: row[f"{what}_p99_ms"] for what in TICKS if row[f"{what}_p99_ms"] > 3 * LIMIT_MS} == {}
    assert row["choice_p50_us"] <= 500, "a choice among 4,000 is not one over 4,000"


def test_memory_grows_with_the_pool_and_not_faster() -> None:
    (_, small), (_, large) = part(NODES // 10), part(NODES // 2)
    assert {what: large[what] / small[what] for what in ("allocator_mb", "table_mb") if large[what] > 5 * 1.3 * small[what]} == {}
