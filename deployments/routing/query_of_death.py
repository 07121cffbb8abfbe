"""Queries of death: requests that end the engine which answers them. Once they have cost enough, those of their shape are refused for a while.

A *shape* is what is left of a request without its text: the route, the unusual parameters with their values, and sizes in coarse classes.

Example: a request with ``echo`` and ``logprobs`` ends an engine. The gateway tries it once more, and it ends a second one. The client gets a
502 and, as clients do, sends it again. From now on this gateway answers 503 to requests of that shape and asks no engine. After a minute it
lets one through, and refuses the others until that one has its answer. Five answers clear the shape. Another loss, and the shape is refused
for two minutes, then for four.

Two losses are needed because a request may be there by chance when a machine fails. One is enough where the engine itself said that it had
ended and answered nothing else. A request without unusual parameters is never refused: what may have ended an engine is in its text, and its
shape is everybody's. No I/O; time is passed in.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import orjson

from cluster.errors import Quarantined

ENOUGH = 2
"""Points at which a shape is refused."""
REFUSE_S = 60.0
"""How long a shape is refused at first. Each further loss doubles it."""
LONGEST_S = 3_600.0
PROBE_S = 60.0
"""How long the others of a refused shape wait for the one that was let through. Its client may have left."""
FORGET_S = 600.0
"""How long a loss counts, and how long after its refusal a shape is remembered."""
CLEARED_BY = 5
"""Answers after which a shape is innocent. One is too few: some faults need other requests in the same batch."""
MOST_SHAPES = 256
"""Shapes that one gateway remembers."""

PLAIN = frozenset((
    "model", "messages", "prompt", "input", "instructions", "system", "stream", "stream_options", "max_tokens", "max_completion_tokens",
    "max_output_tokens", "temperature", "top_p", "n", "stop", "stop_sequences", "seed", "user", "safety_identifier", "prompt_cache_key",
    "metadata", "store", "frequency_penalty", "presence_penalty", "query", "documents", "encoding_format",
))  # fmt: skip
"""Parameters that say nothing: nearly every request has some of them."""
UNUSUAL = frozenset((
    "echo", "logprobs", "top_logprobs", "prompt_logprobs", "best_of", "suffix", "logit_bias", "response_format", "structured_outputs",
    "tools", "tool_choice", "parallel_tool_calls", "reasoning", "reasoning_effort", "include_reasoning", "use_beam_search", "top_k",
    "min_p", "repetition_penalty", "length_penalty", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens",
    "skip_special_tokens", "spaces_between_special_tokens", "truncate_prompt_tokens", "truncation_side", "allowed_token_ids",
    "bad_words", "add_special_tokens", "add_generation_prompt", "continue_final_message", "chat_template_kwargs", "mm_processor_kwargs",
    "priority", "return_tokens_as_token_ids", "return_token_ids", "return_prompt_text", "cache_salt", "repetition_detection",
    "thinking_token_budget", "stream_interval", "dimensions",
))  # fmt: skip
"""The engine's other parameters. Any name beside these is the client's own word, and is counted but not kept."""
PARTS = {
    "structured_outputs": frozenset({"json", "regex", "choice", "grammar", "json_object", "structural_tag"}),
    "response_format": frozenset({"type", "json_schema", "format"}),
}
"""Parameters whose parts tell one shape from another."""
WORDS = frozenset((
    "text", "json_object", "json_schema", "structural_tag", "none", "auto", "required", "low", "medium", "high", "left", "right",
))  # fmt: skip
"""Values that are the interface's own words. Of any other text only the size is kept: it is the client's."""

Parameters = tuple[tuple[str, str], ...]
"""(name, value or size), sorted."""


class Shape(NamedTuple):
    """What two requests have in common when both may end an engine."""

    path: str
    unusual: Parameters
    body: str
    """The class of the body's size."""

    def __str__(self) -> str:
        return (
            f"{self.path} with {', '.join(' '.join(one) for one in self.unusual) or 'plain parameters'}, body {self.body} bytes"
        )


def unusual(body: Mapping[str, Any]) -> Parameters:
    """The parameters of a request that not every request has. What is null or false is absent.

    >>> unusual({"model": "m", "prompt": "Who are you?", "echo": True, "logprobs": 10, "suffix": None})
    (('echo', 'true'), ('logprobs', '10'))
    """
    named = {name: value for name, value in body.items() if name not in PLAIN and value is not None and value is not False}
    if not named:
        return ()
    found = [pair for name, value in named.items() if name in UNUSUAL for pair in _described(name, value)]
    others = len(named.keys() - UNUSUAL)
    return tuple(sorted([*found, ("other parameters", str(others))] if others else found))


def _described(name: str, value: Any) -> list[tuple[str, str]]:
    parts = PARTS.get(name)
    if parts is None or not isinstance(value, dict):
        return [(name, _value(value))]
    return [(f"{name}.{part}", _value(value[part])) for part in value.keys() & parts if value[part] is not None]


def _value(value: Any) -> str:
    """A number, a switch or one of `WORDS` as it is; of anything else its kind and the class of its size.

    >>> [_value(value) for value in (0.5, True, "auto", "a secret", [1, 2, 3])]
    ['0.5', 'true', 'auto', 'text ≤16', 'list ≤16']
    """
    if isinstance(value, bool | int | float):
        return str(value).lower()[:24]
    if isinstance(value, str):
        return value if value in WORDS else f"text {size_class(len(value))}"
    return f"{'list' if isinstance(value, list) else 'object'} {size_class(len(orjson.dumps(value)))}"


def size_class(size: int) -> str:
    """
    >>> size_class(16), size_class(17), size_class(5_000)
    ('≤16', '≤256', '≤65536')
    """
    limit = 16
    while limit < size:
        limit *= 16
    return f"≤{limit}"


class Loss(NamedTuple):
    """One engine that failed over a request."""

    replica: str
    said: bool
    """Whether the engine itself said that it had ended. A broken connection may also be a machine that was switched off."""
    alone: bool
    """Whether it answered nothing else for this gateway."""

    @property
    def points(self) -> int:
        return ENOUGH if self.said and self.alone else 1


@dataclass(frozen=True)
class Suspicion:
    """What is held against one shape."""

    replicas: frozenset[str] = frozenset()
    """Those that it has cost. One that failed over several of its requests counts once."""
    points: int = 0
    lost_s: float = 0.0
    """When the last was lost."""
    answers: int = 0
    """Since then."""
    refuse_s: float = 0.0
    """How long the shape was refused for the last time."""
    refused_until_s: float = 0.0
    probed_until_s: float = 0.0
    """While one that was let through has no answer, the others are refused until then."""

    @property
    def until_s(self) -> float:
        """When the next request of the shape is let through."""
        return max(self.refused_until_s, self.probed_until_s)

    def admits(self, now_s: float) -> bool:
        return self.points < ENOUGH or now_s >= self.until_s

    def stale(self, now_s: float) -> bool:
        return now_s - max(self.lost_s, self.refused_until_s) > FORGET_S


def after_loss(before: Suspicion | None, loss: Loss, now_s: float) -> Suspicion:
    """One more engine was lost over the shape."""
    if before is None or before.stale(now_s):
        before = Suspicion()
    if loss.replica in before.replicas:
        return before
    points, replicas = before.points + loss.points, before.replicas | {loss.replica}
    after = replace(before, points=points, replicas=replicas, lost_s=now_s, answers=0, probed_until_s=0.0)
    if points < ENOUGH:
        return after
    refuse_s = min(2 * before.refuse_s, LONGEST_S) or REFUSE_S
    return replace(after, refuse_s=refuse_s, refused_until_s=now_s + refuse_s)


def after_admission(before: Suspicion, now_s: float) -> Suspicion:
    """One was let through. Where the shape was refused, the others wait for its answer."""
    return before if before.points < ENOUGH else replace(before, probed_until_s=now_s + PROBE_S)


def after_answer(before: Suspicion) -> Suspicion | None:
    """One was answered. None where that clears the shape."""
    answers = before.answers + 1
    return None if answers >= CLEARED_BY else replace(before, answers=answers, probed_until_s=0.0)


class Quarantine:
    """The shapes that have cost engines. While there are none, a request costs no more than a look whether there are."""

    def __init__(self) -> None:
        self.suspicions: dict[Shape, Suspicion] = {}

    def admit(self, shape: Shape, request_id: str, now_s: float) -> None:
        """Raises `Quarantined` where requests of this shape are refused now."""
        suspicion = self.suspicions.get(shape) if self.suspicions else None
        if suspicion is None:
            return
        if suspicion.stale(now_s):
            del self.suspicions[shape]
        elif suspicion.admits(now_s):
            self.suspicions[shape] = after_admission(suspicion, now_s)
        else:
            raise refused(shape, suspicion, request_id, now_s)

    def lost(self, shape: Shape, loss: Loss, now_s: float) -> None:
        """A replica failed over a request of this shape."""
        if not shape.unusual:
            return
        self.suspicions[shape] = after_loss(self.suspicions.get(shape), loss, now_s)
        if len(self.suspicions) > MOST_SHAPES:
            del self.suspicions[min(self.suspicions, key=lambda one: self.suspicions[one].lost_s)]

    def answered(self, shape: Shape) -> None:
        suspicion = self.suspicions.pop(shape, None) if self.suspicions else None
        after = after_answer(suspicion) if suspicion is not None else None
        if after is not None:
            self.suspicions[shape] = after


def refused(shape: Shape, suspicion: Suspicion, request_id: str, now_s: float) -> Quarantined:
    count = len(suspicion.replicas)
    engines = "an engine" if count == 1 else f"{count} engines"
    return Quarantined(
        f"Requests like this one ended {engines} and are refused for now: {shape}.",
        f"Leave out what is unusual, or tell your operator the request id {request_id}.",
        retry_after_s=max(1, round(suspicion.until_s - now_s)),
    )
