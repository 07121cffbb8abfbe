"""What an answer says, whole or streamed, without what differs from one request to the next; and what differs between two. No I/O.

A stream is put together into the document that a whole answer would be, so that both are compared in the same way.
"""

import base64
import json
import re
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

TOLERANCE = 1e-3
"""Of log-probabilities and vectors."""
CHANGING = {
    "id",
    "created",
    "created_at",
    "completed_at",
    "request_id",
    "system_fingerprint",
    "item_id",
    "sequence_number",
    "call_id",
    "tool_use_id",
}
"""Keys whose values are another one in each answer."""
MODEL = "model"
DATA = "data: "
TEXT = re.compile(r"content|text|tool_calls|arguments|finish_reason|stop_reason|output|embedding|input\b")


class Answer(NamedTuple):
    status: int
    document: Any
    """JSON. Text where it is none."""
    ended: bool = True
    """Whether a stream ended as its route's streams do."""


class Difference(NamedTuple):
    aspect: str
    """``status class``, ``status``, ``text``, ``usage``, ``end of the stream``, or ``fields``."""
    where: str
    bare: Any
    ours: Any


def read(status: int, content_type: str, body: bytes) -> Answer:
    text = body.decode(errors="replace")
    if content_type.startswith("text/event-stream"):
        return _streamed(status, text)
    try:
        return Answer(status, plain(json.loads(text)))
    except ValueError:
        return Answer(status, text)


def plain(value: Any) -> Any:
    """A document without `CHANGING`, without nulls, and with vectors as numbers."""
    if isinstance(value, list):
        return [plain(one) for one in value]
    if not isinstance(value, dict):
        return value
    kept = {key: plain(one) for key, one in value.items() if key not in CHANGING and one is not None}
    if isinstance(kept.get("embedding"), str):
        packed = base64.b64decode(kept["embedding"])
        kept["embedding"] = list(struct.unpack(f"<{len(packed) // 4}f", packed))
    return kept


# streams


def _streamed(status: int, text: str) -> Answer:
    data = [line.removeprefix(DATA) for line in text.splitlines() if line.startswith(DATA)]
    events: list[dict[str, Any]] = [json.loads(one) for one in data if one != "[DONE]"]
    last = events[-1] if events else {}
    ended = data[-1:] == ["[DONE]"] or last.get("type") in ("message_stop", "response.completed")
    errors = [event for event in events if "error" in event]
    return Answer(status, plain(errors[0] if errors else _together(events)), ended)


def _together(events: list[dict[str, Any]]) -> dict[str, Any]:
    """
    >>> _together([{"choices": [{"index": 0, "delta": {"content": "a"}}]}, {"choices": [{"index": 0, "delta": {"content": "b"}}]}])
    {'choices': [{'index': 0, 'content': 'ab'}]}
    """
    if (last := events[-1] if events else {}).get("type") == "response.completed":
        return last["response"]
    if events and "type" in events[0]:
        return {"events": _messages(events)}
    whole: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        for choice in event.get("choices", ()):
            _add(choices.setdefault(choice["index"], {}), _flat(choice, "delta"))
        whole |= {key: value for key, value in event.items() if key != "choices" and value is not None}
    return {**whole, "choices": [choices[index] for index in sorted(choices)]}


def _flat(value: dict[str, Any], key: str) -> dict[str, Any]:
    """With what is under ``key`` in its place."""
    return {**{name: one for name, one in value.items() if name != key}, **value.get(key, {})}


def _add(to: dict[str, Any], more: dict[str, Any]) -> None:
    """Add what a chunk brings: texts and lists grow, and of what remains the last counts."""
    for key, value in more.items():
        if key == "tool_calls":
            for call in value or ():
                _add(to.setdefault(key, {}).setdefault(call["index"], {}), _flat(call, "function"))
        elif isinstance(value, dict):
            _add(to.setdefault(key, {}), value)
        elif isinstance(value, list):
            to.setdefault(key, []).extend(value)
        elif isinstance(value, str) and key in ("content", "text", "arguments", "reasoning"):
            to[key] = to.get(key, "") + value
        elif value is not None:
            to[key] = value


def _messages(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Anthropic's events, those that go on with one block as one: how many there are depends on when the tokens came."""
    whole: list[dict[str, Any]] = []
    for event in events:
        delta, last = event.get("delta", {}), whole[-1] if whole else {}
        if event["type"] == "content_block_delta" == last.get("type") and delta["type"] == last["delta"]["type"]:
            for key in ("text", "partial_json"):
                if key in delta:
                    last["delta"][key] += delta[key]
        elif event["type"] != "ping":
            whole.append(json.loads(json.dumps(event)))
    return whole


# two answers


def differences(bare: Answer, ours: Answer) -> list[Difference]:
    """What differs, worst first. Where both are refused, their words may."""
    if bare.status // 100 != ours.status // 100:
        return [Difference("status class", "", bare.status, ours.status)]
    found = [Difference("status", "", bare.status, ours.status)] if bare.status != ours.status else []
    if bare.ended != ours.ended:
        found.append(Difference("end of the stream", "", bare.ended, ours.ended))
    if bare.status == 200:
        found += [Difference(aspect(where), where, one, other) for where, one, other in unlike(bare.document, ours.document)]
    return found


def unlike(one: Any, other: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Each place where two documents differ, with both values.

    >>> list(unlike({"a": [1, {"b": "x"}]}, {"a": [1, {"b": "y", "c": 0.5}]}))
    [('a[1].b', 'x', 'y'), ('a[1].c', None, 0.5)]
    """
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other}, key=str):
            yield from unlike(one.get(key), other.get(key), f"{where}.{key}" if where else str(key))
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for at, pair in enumerate(zip(one, other, strict=True)):
            yield from unlike(*pair, f"{where}[{at}]")
    elif not (one == other or close(one, other) or named(where, one, other)):
        yield where, one, other


def close(one: Any, other: Any) -> bool:
    numbers = isinstance(one, float | int) and isinstance(other, float | int)
    return numbers and float in (type(one), type(other)) and abs(one - other) <= TOLERANCE


def named(where: str, one: Any, other: Any) -> bool:
    """Whether they are the model's name, and the version that it means.

    >>> named("model", "smollm2", "smollm2@1"), named("text", "a", "a@1")
    (True, False)
    """
    return where.split(".")[-1] == MODEL and str(other).partition("@")[0] == one


def aspect(where: str) -> str:
    if "usage" in where:
        return "usage"
    return "text" if TEXT.search(where) else "fields"
