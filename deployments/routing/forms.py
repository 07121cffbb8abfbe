"""The forms in which clients expect an error: as a whole answer, and as the last event of a stream that broke. No I/O.

OpenAI's whole form is `SpringtideError.body`. Anthropic's clients read ``{"type": "error", "error": {"type", "message"}}``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import orjson

from cluster.errors import SpringtideError
from deployments.wire import EVENT_END

ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""HTTP status → Anthropic's ``type`` (https://docs.anthropic.com/en/api/errors); of the others those below 500 are the client's."""


class Form(NamedTuple):
    body: Callable[[SpringtideError], dict[str, Any]]
    """The JSON document of an answer that is an error."""
    event: Callable[[dict[str, Any]], bytes]
    """The server-sent event for such a document."""
    mark: bytes
    """What an error event of the engine begins with. Elsewhere in a stream it cannot occur: JSON escapes the quotes, or the line's end, of
    what the model says."""


def anthropic_body(error: SpringtideError) -> dict[str, Any]:
    """
    >>> from cluster.errors import ModelNotFound
    >>> anthropic_body(ModelNotFound("No such model."))["error"]["type"]
    'not_found_error'
    """
    kind = ANTHROPIC_TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": str(error)}}


def _plain_event(body: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(body) + EVENT_END


def _named_event(body: dict[str, Any]) -> bytes:
    return b"event: error\ndata: " + orjson.dumps(body) + EVENT_END


def _responses_event(body: dict[str, Any]) -> bytes:
    """As OpenAI documents it, and with the object ``error``, by which its own clients know an error."""
    error = body["error"]
    return _named_event({"type": "error", "code": error["code"], "message": error["message"], "param": error["param"], **body})


OPENAI = Form(SpringtideError.body, _plain_event, b'data: {"error"')
RESPONSES = Form(SpringtideError.body, _responses_event, b"event: error\n")
ANTHROPIC = Form(anthropic_body, _named_event, b"event: error\n")
