"""What the engine said, in our own family of errors, so that ``type`` and ``code`` are OpenAI's and not the engine's. No I/O.

vLLM answers ``{"error": {"message", "type": "BadRequestError", "param", "code": 400}}``, also inside a stream. A `BadRequest` is the sender's
alone; everything else is held against the replica.
"""

import re
from typing import NamedTuple

import orjson

from cluster.errors import BadRequest, BodyTooLarge, ContextExceeded, NotSupported, ReplicaLost, SpringtideError, WrongTask
from deployments.wire import EVENT_END

AGAIN = "Send the request again."
TOO_LONG = re.compile(
    r"This model's maximum context length is \d"
    r"|Input length \(\d+\) exceeds model's maximum context length"
    r"|max(_completion|_output)?_tokens=\d+ cannot be greater than max_model_len="
)
"""How vLLM 0.29 begins to say that prompt and answer exceed the context. Only the beginning counts: the rest may quote the client."""

NO_TOOL_PARSER = re.compile(
    r'"auto" tool choice requires --enable-auto-tool-choice|tool_choice=.* requires --tool-call-parser', re.DOTALL
)
"""How vLLM 0.29 says that it cannot read tool calls, in words about flags that nobody gave."""


DEAD = "EngineCore encountered an issue"
"""How vLLM 0.29 begins to say that its engine process has ended."""
NO_ANSWER = "Internal server error"
"""All that vLLM 0.29 says (``GenerationError``) where it could not compile a request's grammar, or the grammar allowed none of the tokens that
other parameters left. The engine is well: ``root ::= root`` is such a grammar."""
MOST_CHARACTERS = 2_000
"""Of the engine's words. They may quote all of what the client sent."""


class EngineFailed(ReplicaLost):
    """``words``: what the engine said, for the log and not for the client."""

    def __init__(self, message: str, do: str = "", param: str | None = None, words: str = "") -> None:
        super().__init__(message, do, param)
        self.words = words


class EngineDied(EngineFailed):
    """The replica answered that its engine process has ended, by this request or by another."""


class _Said(NamedTuple):
    """The engine's own error object, or the first bytes of whatever came in its place."""

    words: str
    param: str | None = None
    is_engines: bool = True


def engine_error(status: int, body: bytes, task: str = "", path: str = "") -> SpringtideError:
    """The engine's refusal of a request to ``path``, where its model is of ``task``."""
    said = _said(body)
    if status == 404 and not said.is_engines:  # its web server has no such route for this model
        words = f"This model, of the task {task or 'unknown'}, does not answer {path or 'that route'}."
        return WrongTask(words, "GET /v1/models says the task of each model.", "model")
    if status in (401, 403, 404):  # it was replaced, or does not hold the version any more
        return EngineFailed("The replica does not answer for the version any more.", AGAIN, words=said.words)
    if status == 501:
        return NotSupported(said.words, param=said.param)
    if status >= 500 and said.words.startswith(DEAD):
        return EngineDied("The engine ended while it answered.", AGAIN, words=said.words)
    if status == 500 and said == (NO_ANSWER, None, True):
        return BadRequest("The engine could not follow the request's grammar.", "See that some answer of it is possible.")
    if status >= 500:
        return EngineFailed(
            "The engine failed over the request.", "Send it again; the gateway's log has the reason.", words=said.words
        )
    if status == 413:
        return BodyTooLarge(said.words, param=said.param)
    if NO_TOOL_PARSER.match(said.words):
        return BadRequest(
            "The model has no parser for tool calls, so tools cannot be used.",
            "Whoever runs the pool sets fleets.NAME.engine.tool_call_parser, for example to hermes.",
            param="tools",
        )
    return (ContextExceeded if TOO_LONG.match(said.words) else BadRequest)(said.words, param=said.param)


def stream_error(events: bytes) -> SpringtideError:
    """The engine's error inside a stream, which it then ends as if all were well: ``data: {"error": {…, "code": 500}}``, or an event of the
    name ``error`` without a code."""
    event = events.split(EVENT_END, 1)[0].partition(b"data: ")[2]
    try:
        status = int(orjson.loads(event)["error"]["code"])
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        status = 500
    return engine_error(status, event)


def _said(body: bytes) -> _Said:
    try:
        error = orjson.loads(body)["error"]
        return _Said(str(error["message"])[:MOST_CHARACTERS], error.get("param"))
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return _Said(body[:200].decode(errors="replace") or "the engine gave no reason", is_engines=False)
