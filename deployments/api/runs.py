"""What optional elements in a row cost to compile, in a regular expression or in a rule of EBNF. Pure.

xgrammar tries every token of the vocabulary in every state of the automaton. Where ``[a-z]?`` stands fifty times in a row, a token may begin at
each of them, go on at every later one, and end anywhere: the work grows with the cube of their number. Where something that must be there
stands between them, it does not. A *block* is an element that a token may skip or leave at any time: ``x?``, ``x*``, ``x{1,20}``, ``(…)?``, ``(x|)``.
"""

import re
from functools import reduce
from typing import NamedTuple

from deployments.api.repetitions import MANY, OPAQUE, number

RUN_MS = 0.04
"""Of a run: times its states, the states that a token has under way at once, and the blocks that each leads to. Fitted to xgrammar 0.2.8 with
49,152 tokens, on the high side; `tests.contract.test_xgrammar` compiles what is just allowed."""
TOKEN_CHARACTERS = 10
"""How far into a block a token gets, so that many of its states are under way at once."""


class Run(NamedTuple):
    """Elements in a row with nothing between them that must be there."""

    states: int = 0
    blocks: int = 0


class Part(NamedTuple):
    """A part of an expression."""

    states: int = 0
    """All of them."""
    ms: float = 0.0
    """Of the runs that end within it."""
    head: Run = Run()
    """The run that it begins with."""
    tail: Run | None = None
    """The run that it ends with; none where it is one run from the first to the last."""
    wall: bool = False
    """Something must be there that no word has in it: a dot, a blank, a digit. It ends a run also where it is one of several."""


NOTHING = Part()
CLASS, WALL, LETTER, BLANK = "\1", "\2", "\3", "\4"
"""What stands for a class with letters, for what must be there and has no letter, for a literal with a letter, and for blanks and comments."""
ONES = {CLASS: Part(1, head=Run(1)), WALL: Part(1, tail=Run(), wall=True), LETTER: Part(1, tail=Run())}
WITHOUT_LETTERS = re.compile(r"\\(?:[dsntrfv]|\W)|\[-?(?:\\[dsntrfv]|\\\W|0-9|[^\\\-\]\^A-Za-z\x80-\U0010ffff])*+-?\]", re.DOTALL)
ANY_LETTER = re.compile(r"[A-Za-z\x80-\U0010ffff]")
MAY_SKIP = {"regex": re.compile(r"[?*+{]|\|[|)]|[(:>]\|"), "grammar": re.compile(r"[?*+{|]")}
"""What an expression has that holds a block: a repetition, or an alternative that is empty."""
BRACKETS = r"(?P<open>\((?:\?(?:P?<\w+>|<?[=!]|:))?+)|(?P<close>\))|(?P<bar>\|)|(?P<mark>[\1\2\3])"
TIMES = r"(?P<times>\{\s*+(?P<least>[0-9]*+)\s*+(?P<comma>,\s*+-?(?P<most>[0-9]*+)\s*+)?+\}|[*+?])"
TOKENS = {
    "regex": re.compile(rf"{BRACKETS}|{TIMES}|[\^$]|(?P<text>(?:[^()|*+?{{}}.\^$\1\2\3](?![*+?{{]))++|.)", re.DOTALL),
    "grammar": re.compile(rf"{BRACKETS}|{TIMES}|(?P<rule>::?=?)|(?P<blank>[\4])|(?P<name>[^()|*+?{{:\1\2\3\4]++|.)", re.DOTALL),
}
"""The last character before a repetition is a text of its own. A colon ends a rule's name in Lark, which vLLM takes too."""


def run_ms(text: str, kind: str = "regex", in_json: bool = False) -> float:
    r"""About how long the runs of optional elements take in an expression of this kind. ``in_json``: a regular expression for a JSON string.

    >>> run_ms("[a-z]?" * 100), run_ms("[a-z]?-" * 50) < 3, run_ms(r"(\w\w )?" * 10) < 400
    (40000.0, True, True)
    >>> run_ms("root ::= " + "[a-z]? " * 50 + "\n  a ::= [a-z]?", "grammar")
    5000.04
    >>> run_ms("([a-z]? ?){80}", in_json=True), run_ms("([a-z]? ?){80}")
    (163840.0, 0.32)
    >>> run_ms("([a-z]|)" * 50), run_ms("root ::= " + '([a-z] | "") ' * 50, "grammar"), run_ms("(a|b)" * 50)
    (5000.0, 5000.0, 0.0)
    """
    if not MAY_SKIP[kind].search(text):  # most have none
        return 0.0
    done, groups, last = 0.0, [[NOTHING]], NOTHING
    """Milliseconds of the rules that have ended, the alternatives of each group that is open, and what a repetition would repeat."""
    for token in TOKENS[kind].finditer(OPAQUE[kind].sub(_mark, text)):
        what = token.lastgroup
        if what == "times":
            least, most = _bounds(token)
            counted = token[0][0] == "{" and not in_json
            last = apart(last, least, most) if counted else repeated(last, least, most)
        elif what == "close" and len(groups) > 1:
            *others, end = groups.pop()
            last = either([*others, joined(end, last)])
        elif what != "blank":
            groups[-1][-1] = joined(groups[-1][-1], last)
            if what == "rule":
                done, groups = done + _total(groups), [[NOTHING]]
            last = _begun(token, groups)
    groups[-1][-1] = joined(groups[-1][-1], last)
    return done + _total(groups)


def _begun(token: re.Match[str], groups: list[list[Part]]) -> Part:
    """What a repetition after the token would repeat. The name of a rule has no states, as xgrammar compiles each by itself, and ends no run."""
    match token.lastgroup:
        case "open":
            groups.append([NOTHING])
        case "bar":
            groups[-1].append(NOTHING)
        case "mark":
            return ONES[token[0]]
        case "text":
            return _characters(token[0])
        case "name":
            return Part()  # not `NOTHING`: an alternative that has only a name is none that is empty
        case _:
            pass
    return NOTHING


def _mark(found: re.Match[str]) -> str:
    if (one := found["one"]) is not None:
        return WALL if WITHOUT_LETTERS.fullmatch(one) else CLASS
    if (literal := found.groupdict().get("literal")) is None:
        return BLANK
    return (LETTER if ANY_LETTER.search(literal) else WALL) if literal else BLANK


def _characters(text: str) -> Part:
    """Characters of a regular expression that stand for themselves, and the dot."""
    if text == ".":
        return ONES[CLASS]
    return Part(len(text), tail=Run(), wall=re.search(r"[^A-Za-z\x80-\U0010ffff]", text) is not None)


def _bounds(token: re.Match[str]) -> tuple[int, int | None]:
    """How often at least and at most; none for no bound."""
    if token["least"] is None:
        return {"?": (0, 1), "*": (0, None), "+": (1, None)}[token[0]]
    least = number(token["least"])
    return least, least if token["comma"] is None else number(token["most"]) if token["most"] else None


def _total(groups: list[list[Part]]) -> float:
    """Of what is open, which a bracket may have left so."""
    parts = [one for group in groups for one in group]
    return sum(one.ms + _ms(one.head) + _ms(one.tail or Run()) for one in parts)


def _ms(run: Run) -> float:
    """
    >>> _ms(Run(50, 50)), _ms(Run(300, 1))
    (5000.0, 120.0)
    """
    return RUN_MS * run.states * min(run.states, TOKEN_CHARACTERS * run.blocks) * run.blocks


def _and(one: Run, other: Run) -> Run:
    return Run(min(MANY, one.states + other.states), min(MANY, one.blocks + other.blocks))


def joined(one: Part, other: Part) -> Part:
    """One after the other. Where each is more than one run, the run between them has ended."""
    if other is NOTHING:
        return one
    states, ms, wall = min(MANY, one.states + other.states), one.ms + other.ms, one.wall or other.wall
    if one.tail is None:
        return Part(states, ms, _and(one.head, other.head), other.tail, wall)
    between = _and(one.tail, other.head)
    if other.tail is None:
        return Part(states, ms, one.head, between, wall)
    return Part(states, ms + _ms(between), one.head, other.tail, wall)


def repeated(part: Part, least: int, most: int | None) -> Part:
    """``part{least,most}`` with each repetition written out. Of ``x{1,20}`` a token may leave all twenty states: it is a block as ``x{0,20}`` is."""
    times, varies = max(1, least, most or 0), least != most
    states = min(MANY, part.states * times)
    if part.tail is None:
        blocks = max(int(varies), min(MANY, part.head.blocks * times))
        return Part(states, part.ms * times, Run(min(MANY, part.head.states * times), blocks))
    ms = part.ms * times + (times if most is None else times - 1) * _ms(_and(part.tail, part.head))
    return part._replace(states=states, ms=ms) if least else Part(states, ms, Run(states, 1))


def apart(part: Part, least: int, most: int | None) -> Part:
    """``part{least,most}`` where xgrammar makes a rule of its own of it, which it compiles once: everywhere but in a JSON string."""
    ms = _total([[part]])
    if part.tail is not None and least:
        return Part(0, ms, Run(), Run(), part.wall)
    return Part(0, ms, Run(0, int(least != most)))


def either(parts: list[Part]) -> Part:
    """One of several. It ends a run where each of them has a wall: ``(a|e|i)`` is a class in other words. An empty one makes the others
    optional."""
    if len(parts) == 1:
        return parts[0]
    if len(some := [one for one in parts if one is not NOTHING]) < len(parts):
        return repeated(either(some), 0, 1) if some else NOTHING
    states, ms = min(MANY, sum(one.states for one in parts)), sum(one.ms for one in parts)
    heads, tails = [one.head for one in parts], [one.tail or Run() for one in parts]
    if all(one.wall for one in parts):
        return Part(states, ms, _widest(heads), _widest(tails), True)
    return Part(states, ms, _widest([reduce(_and, pair) for pair in zip(heads, tails, strict=True)]))


def _widest(runs: list[Run]) -> Run:
    return Run(min(MANY, sum(one.states for one in runs) or 1), max(one.blocks for one in runs))
