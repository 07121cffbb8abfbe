"""How large a regular expression or an EBNF grammar is, with its repetitions written out and without them. Pure."""

import re

MANY = 10**9
"""All sizes above are one: nobody needs their digits."""
ESCAPE = re.compile(r"\\.", re.DOTALL)
OPAQUE = {
    "regex": re.compile(r"(?P<one>\\.|\[(?:[^\]\\]++|\\.)*+\]?)", re.DOTALL),
    "grammar": re.compile(
        r"""
        "(?P<literal>(?:[^"\\\r\n]++|\\.)*+)"?
        | (?P<one>\[(?:[^\]\\\r\n]++|\\.)*+\]?)
        | (?:\#[^\r\n]*+ | \s++)++
        """,
        re.VERBOSE,
    ),
}
"""What a compiler reads as one, from left to right: of a regular expression escapes and classes; of EBNF literals, classes, comments and blanks.
As xgrammar has it: ``]`` ends a class, also as its first character, and in EBNF a line ends a literal and a class. One that is never closed
reaches as far as it can: if each were given up, and tried again from the next bracket, the time would grow with the square of the length."""
PART = re.compile(r"\{\s*+([0-9]*+)\s*+(?:,\s*+-?([0-9]*+)\s*+)?+\}|[^(){|*+?]++|.", re.DOTALL)
"""A repetition, a run of characters, or another character."""


REPETITION = re.compile(r"\{\s*+[0-9]*+\s*+(?:,\s*+-?[0-9]*+\s*+)?+\}")
REPEATED = re.compile(r"([^{])\{\s*+([0-9]*+)\s*+(?:,\s*+-?([0-9]*+)\s*+)?+\}", re.DOTALL)
UNROLLED = 128
"""Repetitions of xgrammar 0.2.8 that become a state each. Of more it counts them."""


def plain(text: str, kind: str = "regex") -> str:
    r"""The expression with ``x`` for each character or class that is written otherwise: every bracket left is one.

    >>> plain(r"\[([(]a\))"), plain('root ::= ("[" [a-z] {3} "abc" )  # (', "grammar")
    ('x(xax)', 'root::=(xx{3}x{3})')
    """
    return OPAQUE[kind].sub(_plain, text)


def _plain(found: re.Match[str]) -> str:
    size = _size(found)
    return "x" * size if size < 2 else f"x{{{size}}}"  # what repeats a literal repeats all of it


def _size(found: re.Match[str]) -> int:
    if found["one"] is not None:
        return 1
    literal = found.groupdict().get("literal")
    return 0 if literal is None else max(1, len(ESCAPE.sub("x", literal)))


def written_out(simple: str) -> int:
    """How many characters and classes a plain expression has once its repetitions are written out; at most `MANY`.

    >>> written_out("a{3}b"), written_out("(a{10}b){10}"), written_out("x+"), written_out("(a|bc){3,}")
    (4, 110, 1, 9)
    >>> written_out("a" + "{999999999}" * 500) == MANY
    True
    """
    groups, last = [0], 0
    """Sizes of the groups that are open, and of what a repetition would repeat."""
    for part in PART.finditer(simple):
        one = part[0]
        if part[1] is not None:
            last = min(MANY, last * max(1, number(part[1]), number(part[2] or "")))
        elif one == ")" and len(groups) > 1:
            last += groups.pop()
        elif one not in "*+?":
            groups[-1] += last + len(one) - 1
            last = int(one not in "(|")
            groups += [0] if one == "(" else []
    return min(MANY, sum(groups) + last)


def once(text: str, kind: str) -> int:
    """How many characters and classes an expression has with its repetitions taken out. Comments and blanks are none.

    >>> once("a{3}b", "regex"), once('root ::= "abc"{3} # {9}', "grammar")
    (2, 10)
    """
    return written_out(REPETITION.sub("", OPAQUE[kind].sub(lambda found: "x" * _size(found), text)))


def distinct(text: str, kind: str) -> int:
    """How many states the repetitions have that differ: xgrammar compiles those that are alike once, and above `UNROLLED` it counts.

    >>> distinct("[a-z]{1,9}-[a-z]{1,9}-[0-9]{1,9}", "regex"), distinct("root ::= [a-z]{0,70} [a-z]{4000}", "grammar")
    (18, 198)
    """
    if "{" not in text:  # most have none
        return 0
    classes: dict[str, str] = {}
    """A character of Unicode's private area for each class."""

    def mark(found: re.Match[str]) -> str:
        one = found["one"]
        return "x" * min(1, _size(found)) if one is None else classes.setdefault(one, chr(0xE000 + len(classes) % 6_400))

    seen = {(one[1], one[2], one[3]) for one in REPEATED.finditer(OPAQUE[kind].sub(mark, text))}
    return sum(min(UNROLLED, max(number(least), number(most or ""))) for _, least, most in seen)


def number(digits: str) -> int:
    """
    >>> number("0004000"), number(""), number("9" * 5_000)
    (4000, 0, 1000000000)
    """
    digits = digits.lstrip("0")
    return int(digits or 0) if len(digits) < 10 else MANY
