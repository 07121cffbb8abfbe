"""What the gateway reads of a request's body before a replica sees it, what it refuses, and what it leaves out. No I/O.

The bodies are vLLM's own request classes, and vLLM validates them. The gateway stops what would cost an engine more than any answer is worth,
and what would tie a client to one replica.
"""

from typing import Any

from cluster.config import Gateway
from cluster.errors import BadRequest
from deployments.http import Headers
from deployments.routing.engine_routes import EngineRoute
from deployments.wire import SESSION, header

OPERATORS = ("kv_transfer_params", "ec_transfer_params", "vllm_xargs", "request_id")
"""Keys by which engines and their operators speak with each other. What a client writes there is left out."""
PRIORITY = "priority"
"""Engines schedule by it, the lowest first (`deployments.replica.arguments.OURS`). A client may let others go first, as jobs do, with a number above
0. Any other is left out: with -1 it would go before all others."""
BOOLEANS: dict[bool, tuple[str | int, ...]] = {
    True: ("1", "on", "t", "true", "y", "yes", 1),
    False: ("0", "off", "f", "false", "n", "no", 0),
}
LAST = 1 << 30
"""The largest priority that is passed on."""
LISTS_OF_OBJECTS = ("messages", "input")
"""Keys whose objects may have nulls for what is absent."""


def model_name(body: dict[str, Any]) -> str:
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise BadRequest("`model` must be a non-empty string.", "GET /v1/models lists the models served here.", param="model")
    return model


def session_of(headers: Headers, body: dict[str, Any], route: EngineRoute) -> str:
    """What keeps a client on one side of a canary: ``x-session-id``, else the first of the route's `EngineRoute.session_keys` that is there.

    Empty where the client names none: each request is drawn by itself then. A bearer token is no session. Nothing here has verified it,
    and with one key for all clients a canary of 5 % would get none of the traffic, or all of it.

    >>> from deployments.routing.engine_routes import ENGINE_ROUTES
    >>> session_of([], {"metadata": {"user_id": "anna"}}, ENGINE_ROUTES["/v1/messages"])
    'anna'
    """
    named = (_at(body, key) for key in route.session_keys)
    return header(headers, SESSION) or next((one for one in named if isinstance(one, str) and one), "")


def _at(body: Any, key: str) -> Any:
    """``a.b`` → the value at the key b of the object at the key a; None where there is none."""
    for part in key.split("."):
        body = body.get(part) if isinstance(body, dict) else None
    return body


def check(body: dict[str, Any], route: EngineRoute, limits: Gateway) -> None:
    """Raise `BadRequest` for what no replica should be asked, naming the key at fault."""
    _check_state(body, route)
    _check_encoding(body)
    _check_template(body)
    choices = max((_count(body, key, limits.max_choices) for key in route.limits.choices), default=1)
    for key in route.limits.lists:
        _check_list(key, _pieces(body.get(key)), choices, route.limits.bound, getattr(limits, route.limits.bound))


def _check_state(body: dict[str, Any], route: EngineRoute) -> None:
    for key in route.needs_state:
        if body.get(key):
            raise BadRequest(
                f"`{key}` needs answers that are kept, and no replica keeps any: the next request may go to another one.",
                "Send every earlier item in `input`, and wait for the answer.",
                param=key,
            )


def _check_encoding(body: dict[str, Any]) -> None:
    """vLLM's other encodings are no JSON, with as many bytes in the headers as there are inputs."""
    if body.get("encoding_format") not in (None, "float", "base64"):
        raise BadRequest("`encoding_format` must be float or base64.", "Leave it out for float.", param="encoding_format")


def _check_template(body: dict[str, Any]) -> None:
    """A chat template is a program: ``{% for i in range(1000000000) %}`` would keep a replica from answering anybody."""
    for key in ("chat_template", "chat_template_kwargs.chat_template"):
        if _at(body, key) is not None:
            raise BadRequest(
                f"`{key}` is refused: a request cannot bring its own chat template.",
                "Whoever runs the pool sets fleets.NAME.engine.chat_template.",
                param=key,
            )


def _check_list(key: str, pieces: int, choices: int, bound: str, limit: int) -> None:
    """Refuse what multiplies a request's work beyond the limit.

    Example: with 128, 32 prompts with ``n: 4`` pass; 32 prompts with ``n: 5`` are 160 answers. One prompt is bounded by its choices alone.
    """
    if pieces <= 1 or pieces * choices <= limit:
        return
    each = f" with {choices} answers each" if choices > 1 else ""
    raise BadRequest(
        f"`{key}` holds {pieces} entries{each}; at most {limit} in all are allowed.",
        f"Send several requests, or raise gateway.{bound}.",
        param=key,
    )


def _pieces(value: Any) -> int:
    """How many pieces of work a value is: a text, a list of tokens and a conversation are one.

    >>> _pieces(["a", "b"]), _pieces([[1, 2], [3]]), _pieces([1, 2]), _pieces([{"role": "user", "content": "Hi"}])
    (2, 2, 1, 1)
    """
    if not isinstance(value, list) or not value or isinstance(value[0], int | float):
        return 1
    return 1 if isinstance(value[0], dict) and "role" in value[0] else len(value)


def _count(body: dict[str, Any], key: str, limit: int) -> int:
    """A whole number of the body, 1 where it is absent. 4.0 is a whole number; "4" is not, although the engine would read it as one.

    vLLM's own limit is 16,384 (CVE-2026-34756).
    """
    value = body.get(key)
    if value is None:
        return 1
    if not isinstance(value, int | float) or value != value // 1:
        raise BadRequest(f"`{key}` is {str(value)[:40]!r} and must be a whole number.", "Send a number.", param=key)
    if value > limit:
        raise BadRequest(
            f"`{key}` is {str(value)[:40]}; at most {limit} are allowed.",
            "Ask for fewer choices, or raise gateway.max_choices.",
            param=key,
        )
    return int(value)


def as_sent(body: dict[str, Any], route: EngineRoute, id: str) -> dict[str, Any]:
    """The body as the engine gets it, but for ``model``. ``id``: what the engine is to call the request, where it takes that from the body.

    A null means the same as an absent key, and vLLM takes it for a value at some keys: it is left out. A schema's nulls stay as they are.

    >>> from deployments.routing.engine_routes import ENGINE_ROUTES
    >>> as_sent({"input": "Hi", "tools": None, "vllm_xargs": {}}, ENGINE_ROUTES["/v1/responses"], "7")
    {'input': 'Hi', 'store': False, 'request_id': 'resp_7'}
    """
    dropped = (*OPERATORS, *(() if route.terminator else ("stream",)), *(() if lets_others_go(body) else (PRIORITY,)))
    sent = {key: value for key, value in body.items() if value is not None and key not in dropped}
    if "stream" in sent:
        sent["stream"] = as_boolean(sent["stream"])
    for key in LISTS_OF_OBJECTS:
        if isinstance(value := sent.get(key), list):
            sent[key] = [_without_nulls(one) if isinstance(one, dict) else one for one in value]
    return {**sent, **dict(route.overrides), **({"request_id": f"{route.own_id}{id}"} if route.own_id else {})}


def lets_others_go(body: dict[str, Any]) -> bool:
    """
    >>> [lets_others_go({"priority": value}) for value in (1, 0, -1, 1.5, "1", True, None)]
    [True, False, False, False, False, False, False]
    """
    value = body.get(PRIORITY)
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LAST


def as_boolean(value: Any) -> Any:
    """A boolean as vLLM's classes read it (pydantic's lax mode); anything else as it is, which vLLM refuses. What the gateway takes for a stream
    must be one to the engine as well.

    >>> as_boolean("false"), as_boolean(1.0), as_boolean("maybe")
    (False, True, 'maybe')
    """
    word = value.lower() if isinstance(value, str) else value
    return (
        next((truth for truth, words in BOOLEANS.items() if word in words), value)
        if isinstance(word, str | int | float)
        else value
    )


def _without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
