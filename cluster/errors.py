"""One family of errors. Each knows its HTTP status, OpenAI's ``type`` and ``code``, and what the reader can do.

The wire form is OpenAI's ``{"error": {"message", "type", "param", "code"}}``
(https://platform.openai.com/docs/guides/error-codes). Only this file knows both sides.
Instances can be pickled, because they cross Ray's process boundaries.
"""

from collections.abc import Iterator
from typing import Any, cast


class SpringtideError(Exception):
    """The root. ``do`` is one sentence that tells the reader what to do next.

    ``param`` names the request field or the configuration key at fault, as in OpenAI's errors.
    """

    status: int = 500
    type: str = "server_error"
    code: str = "internal_error"
    retry_after_s: int | None = None
    """Seconds after which a retry may succeed; None if waiting does not help."""

    def __init__(self, message: str, do: str = "", param: str | None = None) -> None:
        super().__init__(message, do, param)
        self.message = message
        self.do = do
        self.param = param

    def __str__(self) -> str:
        ends = self.message.rstrip().endswith((".", "!", "?", ":", "…", ")", '"'))
        return f"{self.message}{'' if ends or not self.do else '.'} {self.do}".strip()

    def body(self) -> dict[str, Any]:
        """The JSON object to send: ``{"error": {...}}``."""
        return {"error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code}}


class BadRequest(SpringtideError):
    """The sender alone got it wrong: no replica is to blame, and no other would answer otherwise."""

    status, type, code = 400, "invalid_request_error", "invalid_request"


class BodyTooLarge(BadRequest):
    status, code = 413, "request_too_large"


class ContextExceeded(BadRequest):
    code = "context_length_exceeded"


class RouteNotFound(BadRequest):
    status, code = 404, "unknown_url"


class MethodNotAllowed(BadRequest):
    """``allow``: the methods that the path takes. They go into the header ``Allow``."""

    status, code = 405, "method_not_allowed"

    def __init__(self, message: str, do: str = "", param: str | None = None, allow: tuple[str, ...] = ()) -> None:
        super().__init__(message, do, param)
        self.allow = allow


class UnsupportedEncoding(BadRequest):
    """The gateway cannot decode the content encoding of the body."""

    status, code = 415, "unsupported_encoding"


class BodyTimeout(BadRequest):
    """The client took too long to send its body."""

    status, code = 408, "request_timeout"


class ModelNotFound(BadRequest):
    status, code = 404, "model_not_found"


class WrongTask(BadRequest):
    """The model is for another task than the route: one that makes vectors does not chat."""

    status, code = 404, "model_not_supported"


class NotSupported(BadRequest):
    """The engine knows what is asked for and cannot do it with this model."""

    status, code = 501, "not_supported"


class ResponseNotFound(BadRequest):
    status, code = 404, "response_not_found"


class FleetNotFound(BadRequest):
    status, code = 404, "fleet_not_found"


class JobNotFound(BadRequest):
    status, code = 404, "job_not_found"


class ConfigError(BadRequest):
    code = "invalid_config"


class DataError(BadRequest):
    code = "invalid_training_data"


class VersionRefused(BadRequest):
    """The artefact must not be registered or served: its layout, base, rank or file type is wrong."""

    code = "version_refused"


class DigestMismatch(VersionRefused):
    code = "digest_mismatch"


class DoesNotFit(BadRequest):
    """A model needs more than one slot has. The message has the numbers, and ``do`` the keys to change."""

    code = "does_not_fit"


class Conflict(BadRequest):
    """Another writer took the number or the generation first."""

    status, code = 409, "conflict"


class StoreUnavailable(SpringtideError):
    status, code, retry_after_s = 503, "store_unavailable", 5


class RecordDamaged(SpringtideError):
    """A document in the store cannot be read: it is incomplete, overwritten or missing. Only what depends on it stops."""

    code = "record_damaged"


class PoolUnavailable(SpringtideError):
    """No pool answers. It is not running, or it is still starting."""

    status, code, retry_after_s = 503, "pool_unavailable", 5


class NoReplica(SpringtideError):
    """No replica holds the version now."""

    status, code, retry_after_s = 503, "no_replica", 5


class Overloaded(SpringtideError):
    """Too many requests are waiting already."""

    status, code, retry_after_s = 503, "overloaded", 15


class EngineFailed(SpringtideError):
    """vLLM did not start. The message has its own last words."""

    status, code, retry_after_s = 503, "engine_failed", 60


FINAL = (ConfigError, DoesNotFit, EngineFailed)
"""Why an engine did not start, where the next attempt would end the same way. Anything else may pass by itself: a store that is away, a machine
that was lost."""


class AnswerTimeout(SpringtideError):
    """The replica took too long. The gateway asks no other replica, because the same work would take as long there."""

    status, code = 504, "timeout"


class ReplicaLost(SpringtideError):
    """The replica died while it was answering."""

    status, code = 502, "replica_lost"


class Quarantined(SpringtideError):
    """Requests of this shape have ended engines lately (`deployments.routing.query_of_death`). ``retry_after_s``: when the next is tried."""

    status, code = 503, "request_quarantined"

    def __init__(self, message: str, do: str = "", param: str | None = None, retry_after_s: int | None = None) -> None:
        super().__init__(message, do, param)
        self.retry_after_s = retry_after_s


class JobFailed(SpringtideError):
    code = "job_failed"


class Unauthorized(BadRequest):
    status, code = 401, "invalid_api_key"


class Refused(SpringtideError):
    """An error of another server or another release. It has the sender's status and code, and no class of its own here."""

    def __init__(
        self,
        message: str,
        do: str = "",
        param: str | None = None,
        status: int = 500,
        type: str = SpringtideError.type,
        code: str = SpringtideError.code,
    ) -> None:
        super().__init__(message, do, param)
        self.status, self.type, self.code = status, type, code


def received(status: int, document: Any) -> SpringtideError:
    """The error that a server sent with HTTP ``status``, with its class, code, param and message.

    >>> received(409, {"error": {"message": "seedling was moved.", "code": "conflict", "param": None}})
    Conflict('seedling was moved.', '', None)
    >>> received(418, {"error": {"message": "I am a teapot.", "code": "teapot"}}).code
    'teapot'
    """
    error = _section(_section(document).get("error"))
    message = str(error.get("message") or f"The gateway answered {status} without a reason.")
    code, param = str(error.get("code") or SpringtideError.code), error.get("param")
    param = None if param is None else str(param)
    for kind in _family(SpringtideError):
        if (kind.status, kind.code) == (status, code) and kind is not Refused:
            return kind(message, param=param)
    return Refused(message, "", param, status, str(error.get("type") or SpringtideError.type), code)


def _section(value: Any) -> dict[str, Any]:
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}


def _family(kind: type[SpringtideError]) -> Iterator[type[SpringtideError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _family(child)
