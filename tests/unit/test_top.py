"""The picture of the slots: who is in which column, and what is said of it in words."""

import io
import time
from typing import Any

import pytest
from rich.console import Console

from cluster.capacity.allocator import GrantChange
from cluster.capacity.handover import Allocation, Handover, SlotSnapshot
from cluster.cli import top
from cluster.cli.patience import GONE_S
from cluster.cli.top import (
    IDLE,
    NOTHING,
    Cell,
    Seen,
    axis,
    chart,
    column,
    draw,
    duration,
    highest,
    in_force,
    news,
    span,
    times,
)
from cluster.client import Client
from cluster.endpoint import Endpoint
from cluster.errors import PoolUnavailable

NOW_S = 1_000_000.0
SERVING = Cell("serving")


def at(ago_s: float, serving: int, *jobs: Allocation, slots: int = 4) -> SlotSnapshot:
    return SlotSnapshot(NOW_S - ago_s, slots, serving, serving, serving, jobs)


def job(held: int, active: int, grant: int | None = None, name: str = "a") -> Allocation:
    return Allocation(name, held if grant is None else grant, held, active)


def rows(text: str) -> list[str]:
    """The chart's rows without their margins, the lowest slot first."""
    return [line.partition("┤")[2] for line in reversed(text.splitlines()) if "┤" in line]


def test_a_column_stacks_serving_the_jobs_and_what_is_idle() -> None:
    cells = column(at(0, 1, job(2, 1), slots=5), 6)
    assert cells == [SERVING, Cell("a"), Cell("a", False), Cell(IDLE), Cell(IDLE), Cell(NOTHING)]


def test_before_the_first_record_nothing_is_claimed() -> None:
    snapshots = [at(10, 1)]
    assert in_force(snapshots, NOW_S - 11) is None
    assert column(None, 2) == [Cell(NOTHING)] * 2


def test_a_snapshot_counts_from_its_own_time_until_the_next() -> None:
    first, second = at(10, 1), at(5, 2)
    assert in_force([first, second], first.at_s) == first
    assert in_force([first, second], second.at_s - 0.1) == first
    assert in_force([first, second], second.at_s) == second


def test_columns_stay_where_they_were_drawn_and_the_last_is_now() -> None:
    early, late = times(100.5, 2.0, 5), times(101.5, 2.0, 5)
    assert early == [94.0, 96.0, 98.0, 100.0, 100.5]
    assert late[:-1] == early[:-1]


def test_who_has_a_slot_is_in_its_row_and_in_the_columns_of_that_time() -> None:
    snapshots = [at(60, 1, job(3, 3)), at(30, 3, job(1, 1))]
    drawn = rows(chart(snapshots, NOW_S, 63, 8, 1).plain)
    assert drawn[0] == "█" * 60 and drawn[3] == "█" * 60
    assert [one.style for one in chart(snapshots, NOW_S, 63, 8, 1).spans if one.style in ("blue", "yellow")] == [
        *["yellow"],  # the uppermost slot is the job's all the time
        *["yellow", "blue"] * 2,
        *["blue"],
    ]


def test_a_snapshot_recorded_before_the_window_still_counts_at_its_left_edge() -> None:
    assert rows(chart([at(3600, 2)], NOW_S, 63, 8, 1).plain) == ["█" * 60, "█" * 60, " " * 60, " " * 60]


def test_the_part_of_the_window_before_the_first_record_is_dotted() -> None:
    drawn = rows(chart([at(30, 1, slots=1)], NOW_S, 63, 8, 1).plain)
    assert drawn == ["·" * 29 + "█" * 31]


def test_slots_that_are_held_without_training_look_different() -> None:
    drawn = rows(chart([at(60, 0, job(1, 0), slots=1), at(30, 0, job(1, 1), slots=1)], NOW_S, 63, 8, 1).plain)
    assert drawn == ["░" * 29 + "█" * 31]


def test_two_owners_of_a_slot_stand_above_the_others() -> None:
    crowded = at(10, 2, job(3, 3))
    assert highest([crowded]) == 5 and column(crowded, 5)[-1] == Cell("a")


def test_many_slots_share_rows() -> None:
    drawn = rows(chart([at(60, 32, slots=64)], NOW_S, 40, 8, 1).plain)
    assert [bool(row.strip()) for row in drawn] == [True] * 4 + [False] * 4


@pytest.mark.parametrize("width", [10, 80, 81, 200])
def test_nothing_is_wider_than_the_terminal(width: int) -> None:
    assert max(map(len, chart([at(60, 1)], NOW_S, width, 8, 5).plain.splitlines())) <= width


@pytest.mark.parametrize(("columns", "step_s"), [(2, 0.1), (60, 1.0), (137, 2.19), (20, 4000.0), (3, 1e6)])
def test_the_axis_ends_now_and_is_as_long_as_the_chart(columns: int, step_s: float) -> None:
    line, words = axis(columns, step_s, 4).splitlines()
    assert len(line) == len(words) == columns + 4
    assert words.endswith("now") and line.endswith("┴")


def test_ticks_are_where_their_times_are() -> None:
    line, words = axis(61, 1.0, 4).splitlines()
    assert [i - 4 for i, character in enumerate(line) if character == "┴"] == [0, 15, 30, 45, 60]
    assert words.split("s")[1].strip() == "30" and words[: 4 + 15 + 1].endswith("45 s")


def test_everything_is_shown_and_fits() -> None:
    snapshots = (at(60, 1, job(3, 3)), at(20, 1, job(3, 3, grant=1)), at(18.8, 1, job(1, 0, grant=1)), at(17, 3, job(1, 1)))
    changes = (GrantChange(NOW_S - 20, "a", 3, 1, "serving has 3 slots [of 4]"),)
    screen = Console(width=90, height=24, file=io.StringIO(), record=True)
    screen.print(draw(Seen(snapshots, changes, NOW_S), NOW_S, 90, 24, 1))
    text = screen.export_text()
    for words in (" 20 s ", "3 → 1", "serving has 3 slots [of 4]", "slots free after 1.2 s, training again after 3.0 s", "idle"):
        assert words in text
    assert len(text.splitlines()) <= 24
    assert max(map(len, text.splitlines())) <= 90


def test_without_a_record_there_are_words() -> None:
    screen = Console(width=80, file=io.StringIO(), record=True)
    screen.print(draw(Seen(), NOW_S, 80, 24, 5))
    assert "nothing yet" in screen.export_text()


def test_durations_say_what_there_was() -> None:
    assert duration(Handover(0, "a", "yield", 3, 0, 1.0, None)) == "slots free after 1.0 s"
    assert duration(Handover(0, "a", "grow", 0, 2, None, 4.0)) == "training after 4.0 s"
    assert duration(Handover(0, "a", "grow", 1, 2, None, 4.0)) == "training again after 4.0 s"


@pytest.mark.parametrize(("seconds", "words"), [(-1, "0 s"), (59.4, "59 s"), (60, "1 min"), (75, "1:15 min"), (7260, "2:01 h")])
def test_spans(seconds: float, words: str) -> None:
    assert span(seconds) == words


# in words


def test_the_first_look_says_how_things_stand_and_the_next_what_changed() -> None:
    first = Seen((at(60, 1, job(3, 3)),), (GrantChange(NOW_S - 90, "a", 0, 3, "old"),), NOW_S)
    assert [line[9:] for line in news(Seen(), first)] == [
        "serving holds 1 of 1, a holds 3 of 3 and trains on 3; 0 of 4 slots idle"
    ]
    assert news(first, first) == []
    changes = (*first.changes, GrantChange(NOW_S - 20, "a", 3, 1, "serving has 3 slots"))
    later = Seen((*first.snapshots, at(20, 1, job(3, 3, grant=1)), at(18, 1, job(1, 1))), changes, NOW_S)
    assert [line[9:] for line in news(first, later)] == [
        "a 3 → 1: serving has 3 slots",
        "serving holds 1 of 1, a holds 3 of 1 and trains on 3; 0 of 4 slots idle",
        "serving holds 1 of 1, a holds 1 of 1 and trains on 1; 2 of 4 slots idle",
        "a 3 → 1: slots free after 2.0 s, training again after 2.0 s",
    ]
    assert news(later, later) == [], "a hand-over is told once"


def test_an_answer_adds_the_snapshots_since_the_last() -> None:
    snapshot = at(5, 1, job(1, 1))
    rows = [[*snapshot[:-1], [list(allocation) for allocation in snapshot.jobs]]]
    change = {"at_s": 1.0, "owner": "a", "before": 0, "after": 1, "reason": "why"}
    seen = Seen((at(9, 1),)).told({"snapshots": rows, "allocation": {"changes": [change]}, "slots": {}}, NOW_S)
    assert seen == Seen((at(9, 1), snapshot), (GrantChange(1.0, "a", 0, 1, "why"),), NOW_S)


# watching


def interrupted(_: float) -> None:
    raise KeyboardInterrupt


POOL = Client(Endpoint("http://127.0.0.1:1", ""))
"""Nothing answers there."""


def looked(pool: Client, seen: Seen) -> Seen:
    return Seen((SlotSnapshot(time.time(), 2, 1, 1, 1),), (), time.time())


def test_a_file_gets_lines_and_ctrl_c_ends_it(monkeypatch: Any) -> None:
    monkeypatch.setattr(top, "look", looked)
    monkeypatch.setattr(top.time, "sleep", interrupted)
    file = io.StringIO()
    top.watch(POOL, Console(file=file, force_terminal=False), 5)
    assert file.getvalue()[9:] == "serving holds 1 of 1; 1 of 2 slots idle\n"


def test_a_terminal_gets_the_picture_and_its_own_screen_back(monkeypatch: Any) -> None:
    monkeypatch.setattr(top, "look", looked)
    monkeypatch.setattr(top.time, "sleep", interrupted)
    monkeypatch.setenv("TERM", "xterm")
    file = io.StringIO()
    top.watch(POOL, Console(file=file, force_terminal=True, width=80, height=24), 5)
    first, _, left = file.getvalue().partition("\x1b[?1049l")
    assert "\x1b[?1049h" in first and "serving" in first
    assert "serving" in left, "what was seen last stays"


def test_a_gateway_that_is_silent_for_a_moment_is_asked_again() -> None:
    seen = Seen((at(5, 1),), (), time.time())
    assert top.look(POOL, seen) is seen
    for silent in (Seen(), seen._replace(at_s=time.time() - GONE_S - 1)):
        with pytest.raises(PoolUnavailable):
            top.look(POOL, silent)
