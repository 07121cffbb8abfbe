"""The tide in a terminal: who holds which slots, why that changed, and what each hand-over took. `draw` and what it calls are pure."""

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

from cluster import client
from cluster.capacity.allocator import MOMENTS, GrantChange
from cluster.capacity.arbiter import SERVING
from cluster.capacity.handover import Handover, SlotSnapshot, ended_since, handovers, parse
from cluster.config import Config
from cluster.errors import PoolUnavailable
from cluster.pool import local

REDRAWN_S = 1.0
IDLE, NOTHING = "", "nothing"
"""Owners of a cell beside serving and the jobs: nobody, and no slot at all (or no record of it)."""
BLOCKS = {True: "█", False: "░"}
"""A slot that works; one that a job holds while it does not train on it."""
COLOURS = ("yellow", "magenta", "green", "cyan", "red", "bright_yellow", "bright_magenta", "bright_green")
MOST_ROWS, LEAST_ROWS, AXIS_LINES = 32, 4, 2
DECISIONS, HANDOVERS = 8, 5
"""How many of the last are shown."""
TICKS_S = (5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400)
TICK_COLUMNS = 14
"""Ticks of the time axis are at least as far apart."""


class Seen(NamedTuple):
    """What the pool has told so far, oldest first."""

    moments: tuple[SlotSnapshot, ...] = ()
    turns: tuple[GrantChange, ...] = ()
    at_s: float = 0.0
    """When it last answered."""

    def told(self, document: dict[str, Any], now_s: float) -> "Seen":
        """With an answer of `cluster.client.tide`, which has the moments since the last one."""
        moments = (*self.moments, *parse(document["moments"]))[-MOMENTS:]
        return Seen(moments, tuple(GrantChange(**turn) for turn in document["tide"]["turns"]), now_s)


class Cell(NamedTuple):
    """One slot at one time."""

    owner: str
    working: bool = True


# who is where


def in_force(moments: Sequence[SlotSnapshot], at_s: float) -> SlotSnapshot | None:
    """The moment that counted then: the last one before. None before the first record."""
    index = bisect_right(moments, at_s, key=lambda moment: moment.at_s)
    return moments[index - 1] if index else None


def times(now_s: float, step_s: float, columns: int) -> list[float]:
    """When to look, a time for each column. All but the last, which is now, are whole steps, so that a column once drawn stays."""
    whole = math.ceil(now_s / step_s) - 1
    return [*((whole - back) * step_s for back in range(columns - 2, -1, -1)), now_s]


def column(moment: SlotSnapshot | None, rows: int) -> list[Cell]:
    """The slots from the bottom: serving's, each job's, idle ones. More than there are show above the others: two owners of one."""
    if moment is None:
        return [Cell(NOTHING)] * rows
    cells = [Cell(SERVING)] * moment.serving
    for stake in moment.jobs:
        cells += [Cell(stake.job, place < stake.learning) for place in range(stake.held)]
    cells += [Cell(IDLE)] * moment.idle
    return (cells + [Cell(NOTHING)] * rows)[:rows]


def highest(moments: Sequence[SlotSnapshot | None]) -> int:
    """Rows that show every slot."""
    return max((max(moment.slots, moment.slots - moment.idle) for moment in moments if moment), default=0)


def styles(moments: Sequence[SlotSnapshot]) -> dict[str, str]:
    """Owner → colour. A job keeps its own as long as moments with it are kept."""
    jobs = dict.fromkeys(stake.job for moment in moments for stake in moment.jobs)
    return {SERVING: "blue", **{job: COLOURS[n % len(COLOURS)] for n, job in enumerate(jobs)}}


# what is drawn


def draw(seen: Seen, now_s: float, width: int, height: int, minutes: float) -> Group:
    """Everything that fits into ``width`` × ``height`` characters; the chart shows the last ``minutes``."""
    if not seen.moments:
        return Group(Text("Control has recorded nothing yet; it begins some seconds after it started."))
    last, colours = seen.moments[-1], styles(seen.moments)
    top = owners(last, colours)
    below = [table for table in (decisions(seen.turns, now_s), exchanges(handovers(seen.moments), now_s)) if table.row_count]
    others = 1 + top.row_count + sum(2 + table.row_count for table in below) + AXIS_LINES + 2  # those that are empty
    rows = min(MOST_ROWS, max(LEAST_ROWS, height - others))
    return Group(top, Text(), chart(seen.moments, now_s, width, rows, minutes), Text(), *below)


def owners(moment: SlotSnapshot, colours: dict[str, str]) -> Table:
    """Who has how many slots now."""
    table = Table(Column("owner", no_wrap=True), *("slots", "held", "learning"), "", box=None, pad_edge=False)
    asks = f"asks for {moment.wanted}" if moment.wanted != moment.lease else ""
    table.add_row(_block(SERVING, colours), str(moment.lease), str(moment.serving), "", asks)
    for stake in moment.jobs:
        words = "waits for slots" if stake.held == stake.share == 0 else "is asked to yield" if stake.held > stake.share else ""
        table.add_row(_block(stake.job, colours), *map(str, stake[1:]), words)
    crowded = f"[red]{-moment.idle} slots have two owners[/]" if moment.idle < 0 else ""
    table.add_row("  idle", "", str(max(0, moment.idle)), "", f"of {moment.slots} {crowded}".strip())
    return table


def _block(owner: str, colours: dict[str, str]) -> Text:
    return Text.assemble((BLOCKS[True], colours[owner]), " ", owner)


def chart(moments: Sequence[SlotSnapshot], now_s: float, width: int, most_rows: int, minutes: float) -> Text:
    """Slots over time: a column for each time step, a row for each slot, or for several where there are more than ``most_rows``."""
    colours = styles(moments)
    margin = len(str(highest(moments))) + 2
    count = max(2, width - margin)
    step_s = minutes * 60 / count
    shown = [in_force(moments, at_s) for at_s in times(now_s, step_s, count)]
    slots = highest(shown)
    columns = [column(moment, slots) for moment in shown]
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
    """Two lines: ticks, and what they stand for. Now is at the right."""
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


def decisions(turns: Sequence[GrantChange], now_s: float) -> Table:
    """The last changes of somebody's share, newest first."""
    table = _table("decisions", "owner", "why")
    for turn in reversed(turns[-DECISIONS:]):
        table.add_row(span(now_s - turn.at_s), escape(turn.owner), f"{turn.before} → {turn.after}", escape(turn.reason))
    return table


def exchanges(done: Sequence[Handover], now_s: float) -> Table:
    """The last hand-overs, newest first."""
    table = _table("hand-overs", "job", "took")
    for one in reversed(done[-HANDOVERS:]):
        table.add_row(span(now_s - one.at_s), escape(one.job), f"{one.before} → {one.after}", duration(one))
    return table


def _table(title: str, who: str, words: str) -> Table:
    """A line each, whatever the width: the chart has what is left of the height."""
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


def changes(before: Seen, now: Seen) -> list[str]:
    """What happened between two looks, a line each, oldest first; at the first look how things stand."""
    if not before.moments:
        return [_line(now.moments[-1].at_s, stands(now.moments[-1]))] if now.moments else []
    since_s, known = before.moments[-1].at_s, {(turn.at_s, turn.owner) for turn in before.turns}
    told = [(one.at_s, 1, stands(one)) for one in now.moments if one.at_s > since_s]
    told += [
        (turn.at_s, 0, f"{turn.owner} {turn.before} → {turn.after}: {turn.reason}")
        for turn in now.turns
        if (turn.at_s, turn.owner) not in known
    ]
    told += [
        (one.ended_s, 2, f"{one.job} {one.before} → {one.after}: {duration(one)}") for one in ended_since(now.moments, since_s)
    ]
    return [_line(at_s, words) for at_s, _, words in sorted(told)]


def stands(moment: SlotSnapshot) -> str:
    """``serving holds 1 of 2, support holds 2 of 1 and trains on 0; 1 of 4 slots idle``"""
    jobs = [f"{stake.job} holds {stake.held} of {stake.share} and trains on {stake.learning}" for stake in moment.jobs]
    return (
        f"{', '.join([f'serving holds {moment.serving} of {moment.lease}', *jobs])}; {moment.idle} of {moment.slots} slots idle"
    )


def _line(at_s: float, words: str) -> str:
    return f"{time.strftime('%H:%M:%S', time.localtime(at_s))} {words}"


# watching


def watch(config: Config, console: Console, minutes: float) -> None:
    """Redraw once a second until Ctrl-C, or print changes where ``console`` is no terminal. Raises `PoolUnavailable` once the pool is
    gone; a gateway that is silent for a moment is asked again."""
    try:
        if console.is_terminal and not console.is_dumb_terminal:
            _redraw(config, console, minutes)
        else:
            _print(config, console)
    except KeyboardInterrupt:
        return


def _redraw(config: Config, console: Console, minutes: float) -> None:
    seen = look(config, Seen())
    try:
        # On a screen of its own, which is overwritten in place: erasing lines before they are drawn anew would flicker.
        with Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live:
            while True:
                live.update(picture(seen, console, minutes), refresh=True)
                time.sleep(REDRAWN_S)
                seen = look(config, seen)
    finally:
        console.print(picture(seen, console, minutes))  # that screen is gone: leave what was seen last


def picture(seen: Seen, console: Console, minutes: float) -> Group:
    now_s, (width, height) = time.time(), console.size
    silent_s = now_s - seen.at_s
    words = f" · the gateway has not answered for {span(silent_s)}" if silent_s > 3 * REDRAWN_S else " · Ctrl-C ends this"
    clock = time.strftime("%H:%M:%S", time.localtime(now_s))
    title = Text(f"the tide at {clock}, last {span(minutes * 60)}{words}", style="dim", no_wrap=True)
    return Group(title, draw(seen, now_s, width, height - 1, minutes))


def _print(config: Config, console: Console) -> None:
    seen = Seen()
    while True:
        before, seen = seen, look(config, seen)
        for line in changes(before, seen):
            console.print(escape(line), soft_wrap=True, highlight=False)
        time.sleep(REDRAWN_S)


def look(config: Config, seen: Seen) -> Seen:
    """Ask once; where the gateway does not answer but the pool lives, what was seen before."""
    since_s = seen.moments[-1].at_s if seen.moments else 0.0
    try:
        return seen.told(client.tide(config, since_s), time.time())
    except PoolUnavailable:
        if not seen.at_s or local.find(config) is None:
            raise
        return seen
