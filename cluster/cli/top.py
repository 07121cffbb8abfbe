"""`springtide top`: who holds which slots, why that changed, and what each hand-over took.

`draw` and what it calls are pure: snapshots of the slots go in, text comes out. In this chart the newest column is at the right. Serving has
slot 1. A job has slots 2 and 3, and trains on slot 3 only in the second half::

    3 ┤░░░░████
    2 ┤████████
    1 ┤████████
"""

import math
import time
from bisect import bisect_right
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from cluster.capacity.allocator import SNAPSHOTS, GrantChange
from cluster.capacity.arbiter import SERVING
from cluster.capacity.handover import Handover, SlotSnapshot, ended_since, handovers, parse
from cluster.cli.patience import GONE_S
from cluster.client import Client
from cluster.errors import PoolUnavailable

REDRAWN_S = 1.0
IDLE, NOTHING = "", "nothing"
"""Owners of a cell that is neither serving's nor a job's. `IDLE`: nobody has the slot. `NOTHING`: there is no such slot, or no record of it."""
BLOCKS = {True: "█", False: "░"}
"""Whether the owner works on the slot. A job may hold slots on which it does not train yet."""
COLOURS = ("yellow", "magenta", "green", "cyan", "red", "bright_yellow", "bright_magenta", "bright_green")
MOST_ROWS, LEAST_ROWS, AXIS_LINES = 32, 4, 2
DECISIONS, HANDOVERS = 8, 5
"""How many of the newest are shown."""
TICKS_S = (5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400)
TICK_COLUMNS = 14
"""The least distance between two ticks of the time axis."""


class Seen(NamedTuple):
    """What the pool has reported so far, oldest first."""

    snapshots: tuple[SlotSnapshot, ...] = ()
    changes: tuple[GrantChange, ...] = ()
    at_s: float = 0.0
    """When the pool last answered."""

    def told(self, document: dict[str, Any], now_s: float) -> "Seen":
        """Add an answer of `cluster.client.Client.slots`, which has the snapshots since the last one."""
        snapshots = (*self.snapshots, *parse(document["snapshots"]))[-SNAPSHOTS:]
        return Seen(snapshots, tuple(GrantChange(**change) for change in document["allocation"]["changes"]), now_s)


class Cell(NamedTuple):
    """One slot at one time."""

    owner: str
    working: bool = True


# which slot is whose


def in_force(snapshots: Sequence[SlotSnapshot], at_s: float) -> SlotSnapshot | None:
    """The snapshot in force at that time: the last one before it. None before the first record."""
    index = bisect_right(snapshots, at_s, key=lambda snapshot: snapshot.at_s)
    return snapshots[index - 1] if index else None


def times(now_s: float, step_s: float, columns: int) -> list[float]:
    """A time for each column. The last is now. The others are whole multiples of ``step_s``, so that a drawn column does not move."""
    whole = math.ceil(now_s / step_s) - 1
    return [*((whole - back) * step_s for back in range(columns - 2, -1, -1)), now_s]


def column(snapshot: SlotSnapshot | None, rows: int) -> list[Cell]:
    """The cells from the bottom: serving's slots, each job's slots, idle slots. If a slot has two owners there are more cells than slots."""
    if snapshot is None:
        return [Cell(NOTHING)] * rows
    cells = [Cell(SERVING)] * snapshot.serving
    for one in snapshot.jobs:
        cells += [Cell(one.job, place < one.active) for place in range(one.held)]
    cells += [Cell(IDLE)] * snapshot.idle
    return (cells + [Cell(NOTHING)] * rows)[:rows]


def highest(snapshots: Sequence[SlotSnapshot | None]) -> int:
    """How many rows it takes to show every slot."""
    return max((max(snapshot.slots, snapshot.slots - snapshot.idle) for snapshot in snapshots if snapshot), default=0)


def styles(snapshots: Sequence[SlotSnapshot]) -> dict[str, str]:
    """Owner → colour. A job keeps its colour as long as a snapshot has it."""
    jobs = dict.fromkeys(one.job for snapshot in snapshots for one in snapshot.jobs)
    return {SERVING: "blue", **{job: COLOURS[n % len(COLOURS)] for n, job in enumerate(jobs)}}


# what is drawn


def draw(seen: Seen, now_s: float, width: int, height: int, minutes: float) -> Group:
    """The tables and the chart, in ``width`` × ``height`` characters. The chart shows the last ``minutes``."""
    if not seen.snapshots:
        return Group(Text("Control has recorded nothing yet. It begins some seconds after its start."))
    last, colours = seen.snapshots[-1], styles(seen.snapshots)
    top = owners(last, colours)
    below = [table for table in (decisions(seen.changes, now_s), exchanges(handovers(seen.snapshots), now_s)) if table.row_count]
    others = 1 + top.row_count + sum(2 + table.row_count for table in below) + AXIS_LINES + 2  # those that are empty
    rows = min(MOST_ROWS, max(LEAST_ROWS, height - others))
    return Group(top, Text(), chart(seen.snapshots, now_s, width, rows, minutes), Text(), *below)


def owners(snapshot: SlotSnapshot, colours: dict[str, str]) -> Table:
    """Who has how many slots now."""
    table = Table(Column("owner", no_wrap=True), *("slots", "held", "active"), "", box=None, pad_edge=False)
    asks = f"asks for {snapshot.wanted}" if snapshot.wanted != snapshot.lease else ""
    table.add_row(_block(SERVING, colours), str(snapshot.lease), str(snapshot.serving), "", asks)
    for one in snapshot.jobs:
        words = "waits for slots" if one.held == one.grant == 0 else "is asked to yield" if one.held > one.grant else ""
        table.add_row(_block(one.job, colours), *map(str, one[1:]), words)
    crowded = f"[red]{-snapshot.idle} slots have two owners[/]" if snapshot.idle < 0 else ""
    table.add_row("  idle", "", str(max(0, snapshot.idle)), "", f"of {snapshot.slots} {crowded}".strip())
    return table


def _block(owner: str, colours: dict[str, str]) -> Text:
    return Text.assemble((BLOCKS[True], colours[owner]), " ", owner)


def chart(snapshots: Sequence[SlotSnapshot], now_s: float, width: int, most_rows: int, minutes: float) -> Text:
    """Slots over time: a column for each time step, a row for each slot, or for several where there are more than ``most_rows``."""
    colours = styles(snapshots)
    margin = len(str(highest(snapshots))) + 2
    count = max(2, width - margin)
    step_s = minutes * 60 / count
    shown = [in_force(snapshots, at_s) for at_s in times(now_s, step_s, count)]
    slots = highest(shown)
    columns = [column(snapshot, slots) for snapshot in shown]
    per_row = max(1, math.ceil(slots / most_rows))
    text = Text(no_wrap=True, overflow="crop")
    for first in reversed(range(0, slots, per_row)):
        text.append(f"{first + 1:>{margin - 2}} ┤")
        row = min(first + per_row // 2, slots - 1)
        for cell, same in groupby(cells[row] for cells in columns):
            text.append(_character(cell) * len(list(same)), colours.get(cell.owner, "dim"))
        text.append("\n")
    return text.append(axis(count, step_s, margin))


def _character(cell: Cell) -> str:
    return {IDLE: " ", NOTHING: "·"}.get(cell.owner, BLOCKS[cell.working])


def axis(columns: int, step_s: float, margin: int) -> str:
    """Two lines: the ticks, and their ages. Now is at the right."""
    apart_s = next((tick for tick in TICKS_S if tick >= TICK_COLUMNS * step_s), TICK_COLUMNS * step_s)
    line, words = ["─"] * columns, [" "] * (margin + columns)
    for age in range(int(columns * step_s // apart_s) + 1):
        at = columns - 1 - round(age * apart_s / step_s)
        label = span(age * apart_s) if age else "now"
        begins = margin + at - len(label) + 1
        if at >= 0:
            line[at] = "┴"
        if at >= 0 and begins >= 0:
            words[begins : margin + at + 1] = label
    return f"{' ' * (margin - 1)}└{''.join(line)}\n{''.join(words)}"


def decisions(changes: Sequence[GrantChange], now_s: float) -> Table:
    """The last changes of a grant, the newest first."""
    table = _table("decisions", "owner", "why")
    for change in reversed(changes[-DECISIONS:]):
        table.add_row(span(now_s - change.at_s), escape(change.owner), f"{change.before} → {change.after}", escape(change.reason))
    return table


def exchanges(done: Sequence[Handover], now_s: float) -> Table:
    """The last hand-overs, the newest first."""
    table = _table("hand-overs", "job", "took")
    for one in reversed(done[-HANDOVERS:]):
        table.add_row(span(now_s - one.at_s), escape(one.job), f"{one.before} → {one.after}", duration(one))
    return table


def _table(title: str, who: str, words: str) -> Table:
    """A table with one line for each row at any width, because the chart gets the rest of the height."""
    columns = [Column(name, no_wrap=True) for name in ("ago", who, "slots")]
    return Table(*columns, Column(words, no_wrap=True), box=None, pad_edge=False, title=title, title_justify="left")


def duration(one: Handover) -> str:
    """``slots free after 1.2 s, training again after 3.4 s``"""
    free = [] if one.slots_free_s is None else [f"slots free after {one.slots_free_s:.1f} s"]
    again = "training again" if one.before else "training"
    trains = [] if one.training_s is None else [f"{again} after {one.training_s:.1f} s"]
    return ", ".join(free + trains)


def span(seconds: float) -> str:
    """``75`` → ``1:15 min``, ``60`` → ``1 min``, ``7200`` → ``2:00 h``"""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min" if whole % 60 else f"{whole // 60} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02} h"


# in words, where there is no terminal


def news(before: Seen, now: Seen) -> list[str]:
    """What happened between two answers, one line each, the oldest first. The first answer gives one line: who has the slots now."""
    if not before.snapshots:
        return [_line(now.snapshots[-1].at_s, stands(now.snapshots[-1]))] if now.snapshots else []
    since_s, known = before.snapshots[-1].at_s, {(change.at_s, change.owner) for change in before.changes}
    told = [(one.at_s, 1, stands(one)) for one in now.snapshots if one.at_s > since_s]
    told += [
        (change.at_s, 0, f"{change.owner} {change.before} → {change.after}: {change.reason}")
        for change in now.changes
        if (change.at_s, change.owner) not in known
    ]
    told += [
        (one.ended_s, 2, f"{one.job} {one.before} → {one.after}: {duration(one)}") for one in ended_since(now.snapshots, since_s)
    ]
    return [_line(at_s, words) for at_s, _, words in sorted(told)]


def stands(snapshot: SlotSnapshot) -> str:
    """``serving holds 1 of 2, support holds 2 of 1 and trains on 0; 1 of 4 slots idle``"""
    jobs = [f"{one.job} holds {one.held} of {one.grant} and trains on {one.active}" for one in snapshot.jobs]
    return f"{', '.join([f'serving holds {snapshot.serving} of {snapshot.lease}', *jobs])}; {snapshot.idle} of {snapshot.slots} slots idle"


def _line(at_s: float, words: str) -> str:
    return f"{time.strftime('%H:%M:%S', time.localtime(at_s))} {words}"


# watching


def watch(pool: Client, console: Console, minutes: float) -> None:
    """Redraw once a second until Ctrl-C. If ``console`` is no terminal, print each change. Raises `PoolUnavailable` if the gateway does not
    answer at first, or is silent for `GONE_S`."""
    try:
        if console.is_terminal and not console.is_dumb_terminal:
            _redraw(pool, console, minutes)
        else:
            _print(pool, console)
    except KeyboardInterrupt:
        return


def _redraw(pool: Client, console: Console, minutes: float) -> None:
    seen = look(pool, Seen())
    try:
        # The drawing has a screen of its own and overwrites it in place. Erasing lines before drawing them again would flicker.
        with Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live:
            while True:
                live.update(picture(seen, console, minutes), refresh=True)
                time.sleep(REDRAWN_S)
                seen = look(pool, seen)
    finally:
        console.print(picture(seen, console, minutes))  # that screen is gone, so leave the last picture here


def picture(seen: Seen, console: Console, minutes: float) -> Group:
    now_s, (width, height) = time.time(), console.size
    silent_s = now_s - seen.at_s
    words = f" · the gateway has not answered for {span(silent_s)}" if silent_s > 3 * REDRAWN_S else " · Ctrl-C ends this"
    clock = time.strftime("%H:%M:%S", time.localtime(now_s))
    title = Text(f"slots at {clock}, last {span(minutes * 60)}{words}", style="dim", no_wrap=True)
    return Group(title, draw(seen, now_s, width, height - 1, minutes))


def _print(pool: Client, console: Console) -> None:
    seen = Seen()
    while True:
        before, seen = seen, look(pool, seen)
        for line in news(before, seen):
            console.print(escape(line), soft_wrap=True, highlight=False)
        time.sleep(REDRAWN_S)


def look(pool: Client, seen: Seen) -> Seen:
    """Ask once. While the gateway is silent, return what is known. Raises `PoolUnavailable` after `GONE_S`."""
    since_s = seen.snapshots[-1].at_s if seen.snapshots else 0.0
    try:
        return seen.told(pool.slots(since_s), time.time())
    except PoolUnavailable:
        if time.time() - seen.at_s > GONE_S:
            raise
        return seen
