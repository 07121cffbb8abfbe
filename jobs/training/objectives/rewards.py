"""Rewards: how good an answer is, as a number. The higher, the better.

==========================  ==========================================================================================
``exact``                   1 where the answer is the reference, white space at both ends aside
``contains``                1 where the reference is somewhere in the answer
``numeric``                 1 where the last number in the answer equals the last one in the reference
``regex``                   1 where the reference, a regular expression, is found in the answer
``regex:PATTERN``           1 where the pattern is found in the answer
``package.module:name``     what the Python function returns for ``(prompt, answer, reference)``, three strings
``judge:MODEL``             how a model of the pool rates the answer, from 0 to 10, divided by 10
==========================  ==========================================================================================
"""

import math
import pkgutil
import re
from collections.abc import Callable
from typing import Any, cast

from cluster.client import Client
from cluster.errors import ConfigError

Reward = Callable[[str, str, str], float]
"""Prompt, answer and reference → the reward."""

NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
KNOWN = "exact, contains, numeric, regex, regex:PATTERN, judge:MODEL, package.module:function"
JUDGING = (
    "Rate the answer to the question from 0 (wrong or useless) to 10 (right and complete). A good answer is given as a reference. "
    "Reply with the number alone.\n\nQuestion: {prompt}\n\nReference: {reference}\n\nAnswer: {answer}"
)
BEST = 10
"""What a judge gives at most."""


def named(spec: str, pool: Client, remote: bool) -> Reward:
    """The reward that ``--reward`` names. ``remote``: whether the job came over HTTP. Raises `ConfigError` with what there is."""
    kind, colon, rest = spec.partition(":")
    if spec in SIMPLE:
        return SIMPLE[spec]
    if kind == "regex" and colon:
        return matching(rest)
    if kind == "judge" and rest:
        return judged_by(rest, pool)
    if colon and rest:
        return imported(kind, rest, remote)
    raise ConfigError(f"There is no reward {spec[:80]!r}.", f"Rewards are: {KNOWN}.", "reward")


class RewardFailed(Exception):
    """There is no reward for one answer. The words name the reward and say why."""


def checked(reward: Reward, name: str) -> Reward:
    """The reward; what it raises, and a result that is no finite number, becomes a `RewardFailed`."""

    def safe(prompt: str, answer: str, reference: str) -> float:
        try:
            value = float(reward(prompt, answer, reference))
        except Exception as error:  # somebody else's function raises what it likes
            raise RewardFailed(f"the reward {name} fails: {type(error).__name__}: {error}") from error
        if not math.isfinite(value):
            raise RewardFailed(f"the reward {name} is {value}, which is no finite number")
        return value

    return safe


# those that need nothing


def exact(prompt: str, answer: str, reference: str) -> float:
    """
    >>> exact("Tide?", " High.\\n", "High."), exact("Tide?", "high", "High.")
    (1.0, 0.0)
    """
    return float(answer.strip() == reference.strip())


def contains(prompt: str, answer: str, reference: str) -> float:
    return float(reference.strip() in answer)


def numeric(prompt: str, answer: str, reference: str) -> float:
    """
    >>> numeric("", "3 + 4 makes 7.", "7"), numeric("", "So #### 1,250.0", "#### 1250"), numeric("", "seven", "7"), numeric("", "7 or 8", "7")
    (1.0, 1.0, 0.0, 0.0)
    """
    said, right = last_number(answer), last_number(reference)
    return float(said is not None and said == right)


def last_number(text: str) -> float | None:
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def reference_found(prompt: str, answer: str, reference: str) -> float:
    return float(re.search(reference, answer) is not None)


SIMPLE: dict[str, Reward] = {"exact": exact, "contains": contains, "numeric": numeric, "regex": reference_found}


# the others


def matching(pattern: str) -> Reward:
    """
    >>> matching("^[A-Z]")("", "High.", "")
    1.0
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"The reward's pattern {pattern[:80]!r} is wrong: {error}.", "Correct it.", "reward") from error
    return lambda prompt, answer, reference: float(compiled.search(answer) is not None)


def imported(module: str, name: str, remote: bool) -> Reward:
    """A function of a package that the job brought with it."""
    if remote:
        raise ConfigError(
            f"A job that came over HTTP may not run {module}:{name}.",
            "Start it from a shell in the pool: python -m jobs.rl, or ray job submit with your package.",
            "reward",
        )
    try:
        found: Any = pkgutil.resolve_name(f"{module}:{name}")
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"The reward {module}:{name} cannot be imported: {error}.", f"Rewards are: {KNOWN}.", "reward"
        ) from error
    if not callable(found):
        raise ConfigError(f"{module}:{name} is no function.", "Name one that takes prompt, answer and reference.", "reward")
    return cast(Reward, found)


def judged_by(model: str, pool: Client) -> Reward:
    """Another model of the pool rates each answer; where it says no number, it has failed."""

    def judge(prompt: str, answer: str, reference: str) -> float:
        asked = JUDGING.format(prompt=prompt, reference=reference, answer=answer)
        body = {
            "model": model,
            "messages": [{"role": "user", "content": asked}],
            "temperature": 0,
            "max_tokens": 16,
            "priority": 1,
        }
        said = str(pool.chat(body).choice["message"]["content"] or "")
        found = NUMBER.search(said)
        if found is None:
            raise ValueError(f"{model} says no number but {said[:80]!r}")
        return min(max(float(found[0].replace(",", "")) / BEST, 0.0), 1.0)

    return judge
