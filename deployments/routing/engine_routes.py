"""The engine's routes that a client may call, one row each. The gateway answers no other: the rest of the engine's HTTP API is 404.

A row is an `EngineRoute`: for which models it is, how its streams end, which form its errors have, what its body may ask for.
"""

from typing import NamedTuple

from cluster.types import TASKS, Task
from deployments.routing.forms import ANTHROPIC, OPENAI, RESPONSES, Form

DONE = b"data: [DONE]\n\n"


class Limits(NamedTuple):
    """What multiplies one request's work, and the key under ``gateway`` that bounds it.

    Example: ``prompt`` holds 32 prompts and ``n`` is 4: 128 answers, which ``gateway.max_prompts`` bounds.
    """

    lists: tuple[str, ...] = ()
    """Keys of the body whose lists hold one piece of work each."""
    choices: tuple[str, ...] = ()
    """Keys with a number of answers to each. Each is bounded by ``gateway.max_choices`` as well."""
    bound: str = "max_inputs"


class EngineRoute(NamedTuple):
    path: str
    """The same at the gateway and at the engine."""
    tasks: tuple[Task, ...]
    """The tasks of the models that it is for."""
    limits: Limits = Limits()
    terminator: bytes = b""
    """What is in the last event of a stream that ended well, and nowhere before. Empty: the route has no streams."""
    form: Form = OPENAI
    session_keys: tuple[str, ...] = ("safety_identifier", "user", "prompt_cache_key")
    """Where a body names its session; the first that is there counts. ``a.b`` is the key b of the object a."""
    needs_state: tuple[str, ...] = ()
    """Keys that ask for what a single replica would have to keep."""
    overrides: tuple[tuple[str, object], ...] = ()
    """Keys of the body with the values that the engine gets, whatever the client sent."""
    own_id: str = ""
    """The beginning of the id under which the engine knows the request, where it takes the id from the body and not from a header."""
    runs_model: bool = True
    """False: the tokenizer answers alone, which says nothing about a canary."""


_MESSAGES = EngineRoute("/v1/messages", ("generate",), form=ANTHROPIC, session_keys=("metadata.user_id",))
_SCORING: tuple[Task, ...] = ("embed", "classify", "score")
_RERANK = Limits(("documents",))
_SCORE = Limits(("queries", "documents", "items", "text_1", "text_2", "data_1", "data_2"))

_ROWS = (
    EngineRoute("/v1/chat/completions", ("generate",), Limits(choices=("n",)), DONE),
    EngineRoute("/v1/completions", ("generate",), Limits(("prompt",), ("n", "best_of"), "max_prompts"), DONE),
    EngineRoute(
        "/v1/responses",
        ("generate",),
        terminator=b"event: response.completed\n",
        form=RESPONSES,
        needs_state=("previous_response_id", "conversation", "background"),
        overrides=(("store", False),),
        own_id="resp_",
    ),
    _MESSAGES._replace(terminator=b"event: message_stop\n"),
    _MESSAGES._replace(path="/v1/messages/count_tokens", runs_model=False),
    EngineRoute("/v1/embeddings", ("embed",), Limits(("input", "messages"))),
    EngineRoute("/score", _SCORING, _SCORE),
    EngineRoute("/v1/score", _SCORING, _SCORE),
    EngineRoute("/rerank", _SCORING, _RERANK),
    EngineRoute("/v1/rerank", _SCORING, _RERANK),
    EngineRoute("/v2/rerank", _SCORING, _RERANK),
    EngineRoute("/classify", ("classify",), Limits(("input",))),
    EngineRoute("/tokenize", TASKS, runs_model=False),
    EngineRoute("/detokenize", TASKS, runs_model=False),
)

ENGINE_ROUTES = {row.path: row for row in _ROWS}


def paths_of(task: str) -> tuple[str, ...]:
    """The routes of a model of this task.

    >>> paths_of("classify")
    ('/score', '/v1/score', '/rerank', '/v1/rerank', '/v2/rerank', '/classify', '/tokenize', '/detokenize')
    """
    return tuple(route.path for route in _ROWS if task in route.tasks)
