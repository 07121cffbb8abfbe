"""The tables of `benchmarks.parity`."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.parity.answers import Difference
from benchmarks.parity.request import Request
from benchmarks.place import passed

ASPECTS = ("status class", "text", "usage")
"""What must be the same."""
MOST_CHARACTERS = 60


class Compared(NamedTuple):
    request: Request
    found: list[Difference]

    @property
    def unexpected(self) -> bool:
        return bool(self.found) and not self.request.differs

    @property
    def no_longer(self) -> bool:
        """Whether it was meant to differ and does not."""
        return bool(self.request.differs) and not self.found

    def same(self, aspect: str) -> bool:
        return not any(one.aspect in (aspect, "status class") for one in self.found)


def text(compared: Sequence[Compared]) -> str:
    return f"{totals(compared)}\n{listed(compared)}"


def totals(compared: Sequence[Compared]) -> str:
    """A row for each kind of request, and one for all."""
    head = ["Requests", "Sent", *(f"Same {aspect}" for aspect in ASPECTS), "Differ as meant", "Differ otherwise"]
    kinds = dict.fromkeys(one.request.kind for one in compared)
    rows = [_total(kind, [one for one in compared if one.request.kind == kind]) for kind in sorted(kinds)]
    return _table(head, [*rows, _total("all", compared)], numbers=True)


def _total(kind: str, compared: Sequence[Compared]) -> list[str]:
    same = [sum(one.same(aspect) for one in compared) for aspect in ASPECTS]
    meant = sum(bool(one.found) and not one.unexpected for one in compared)
    return [kind, *map(str, (len(compared), *same, meant, sum(one.unexpected for one in compared)))]


def listed(compared: Sequence[Compared]) -> str:
    """A row for each request whose answers differ, and for each that was meant to and does not."""
    rows = [_row(one) for one in compared if one.found or one.no_longer]
    return _table(["Request", "What differs", "Bare vLLM", "Springtide", "Why"], rows)


def _row(one: Compared) -> list[str]:
    if not one.found:
        return [one.request.name, "nothing", "", "", f"was meant to: {one.request.differs}"]
    first, more = one.found[0], len(one.found) - 1
    what = f"{first.aspect} {first.where}".strip() + (f", and {more} more" if more else "")
    return [one.request.name, what, short(first.bare), short(first.ours), one.request.differs or "**not meant**"]


def short(value: Any) -> str:
    """
    >>> short("a"), short(200), short("x" * 99)[-1], len(short("|"))
    ('"a"', '200', '…', 4)
    """
    written = json.dumps(value, ensure_ascii=False).replace("|", "\\|")
    return written if len(written) <= MOST_CHARACTERS else f"{written[:MOST_CHARACTERS]}…"


def _table(head: list[str], rows: list[list[str]], numbers: bool = False) -> str:
    rule = ["---", *(["---:"] if numbers else ["---"]) * (len(head) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, rule, *rows))


def verdicts(compared: Sequence[Compared]) -> list[str]:
    unexpected, stale = sum(one.unexpected for one in compared), sum(one.no_longer for one in compared)
    return [
        f"{unexpected} of {len(compared)} answers differ where they should not; {passed(not unexpected)} (0)",
        f"{stale} are the same where they were meant to differ; {passed(not stale)} (0)",
    ]
