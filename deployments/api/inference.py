"""``POST /v1/chat/completions`` and ``POST /v1/completions``: check what a gateway can check, name the version, pass the bytes on.

The bodies are vLLM's own request classes and are validated by vLLM. Here the body is only read as JSON to replace ``model`` by the
immutable version, and to stop what would cost an engine more than any answer is worth.
"""

import asyncio
import re
import time
from typing import Any, Protocol

import orjson

from cluster.config import Gateway
from cluster.errors import BadRequest, NoReplica, Overloaded, SpringtideError
from cluster.types import ColdStart, Generation, VersionId
from deployments.http import Headers, Receive, Scope, Send, parse_json, read_body, send_error
from deployments.routing.measure import Recorder, Trace
from deployments.routing.shadow import Shadow
from deployments.routing.upstream import Answer, Call, Upstream

ASK_AGAIN_S = 0.2
"""How long a request without a replica waits for a newer view before it looks again."""
MAX_ID_CHARACTERS = 64
UNSAFE = re.compile(r"[^A-Za-z0-9._:-]")


class Router(Protocol):
    """What a generating route needs of its gateway."""

    upstream: Upstream
    recorder: Recorder
    shadow: Shadow

    held: int
    """Requests that wait for a replica."""

    async def resolve(self, model: str, session: str) -> tuple[VersionId, Generation | None]: ...
    def wake(self) -> bool: ...
    async def stage(self) -> ColdStart: ...
    async def change(self, timeout_s: float) -> None: ...


class Inference:
    """An ASGI application for one generating route."""

    def __init__(self, path: str, limits: Gateway, router: Router) -> None:
        self.path = path
        self.limits = limits
        self.router = router

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = parse_json(await read_body(scope, receive, self.limits.max_body_bytes))
        check_choices(body, self.limits.max_choices)
        model, session = model_name(body), session_of(scope["headers"], body)
        began_s, patience_s = time.monotonic(), self.limits.hold_timeout_s
        meant: tuple[VersionId, Generation | None] | None = None
        waits = False
        while True:
            try:
                version, move = meant = await self.router.resolve(model, session)
                call = Call(version, self.path, dump({**body, "model": str(version)}), request_id(scope["headers"]))
                return await self._forward(call, body, move, send)
            except NoReplica as error:
                # Its holder is taking other weights over, or starting: what comes next may be another version, so ask again what
                # the model means. Nothing has been sent yet.
                cold = self.router.wake()
                patience_s = max(patience_s, self.limits.cold_start_timeout_s if cold else 0)
                left_s = began_s + patience_s - time.monotonic()
                if left_s <= 0:
                    return await self._give_up(error, meant, cold, send)
                await self._hold(min(left_s, ASK_AGAIN_S), limited=cold and not waits)
                waits = waits or cold  # nobody who came later takes its place

    async def _give_up(self, error: NoReplica, meant: tuple[VersionId, Generation | None] | None, cold: bool, send: Send) -> None:
        told = NoReplica(f"{error.message} {(await self.router.stage()).words}".strip(), error.do) if cold else error
        if meant is None:
            raise told
        self._note_failure(*meant)
        await send_error(send, told, answer_headers(*meant))

    async def _hold(self, timeout_s: float, limited: bool) -> None:
        """Wait for another view; while no replica runs at all, as one of few enough."""
        if limited and self.router.held >= self.limits.max_held:
            _, stage = await self.router.stage()
            raise Overloaded(f"{self.router.held} requests wait for a replica already. {stage}".strip(), "Try again later.")
        self.router.held += 1
        try:
            await self.router.change(timeout_s)
        finally:
            self.router.held -= 1

    async def _forward(self, call: Call, body: dict[str, Any], move: Generation | None, send: Send) -> None:
        shadowed = self.router.shadow.chosen(call.version, move)
        trace = self.router.recorder.trace(move, keep_text=shadowed)
        try:
            await self.router.upstream.forward(call, Answer(send, answer_headers(call.version, move), trace))
        except NoReplica:
            raise
        except asyncio.CancelledError:
            self._note_patience(call.version, move, trace)
            raise
        except SpringtideError as error:  # nothing was sent yet; an error too says which version it came from
            await send_error(send, error, answer_headers(call.version, move))
            return self._note_failure(call.version, move) if error.status >= 500 else None
        if trace is not None and move is not None:
            self.router.recorder.record(move, call.version, trace)
            if shadowed and move.canary is not None:
                self.router.shadow.ask(call, body, move, move.canary, trace)

    def _note_patience(self, version: VersionId, move: Generation | None, trace: Trace | None) -> None:
        """The client left. Where it left before the first byte, that would have come no sooner: so long at least it took."""
        if trace is not None and move is not None and not trace.first_s:
            trace.first_s = trace.end_s = time.monotonic()
            self.router.recorder.record(move, version, trace)

    def _note_failure(self, version: VersionId, move: Generation | None) -> None:
        """A request that failed by no fault of its client counts against the version; a refused one counts for nothing."""
        trace = self.router.recorder.trace(move, keep_text=False)
        if trace is not None and move is not None:
            trace.failed = True
            self.router.recorder.record(move, version, trace)


def session_of(headers: Headers, body: dict[str, Any]) -> str:
    """What keeps a client on one side of a canary: ``x-session-id``, the user that the body names, or the API key; else nothing."""
    named = dict(headers)
    user = body.get("safety_identifier") or body.get("user")
    return (
        named.get(b"x-session-id", b"").decode("latin-1")
        or (user if isinstance(user, str) else "")
        or named.get(b"authorization", b"").decode("latin-1")
    )


def dump(body: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(body)
    except orjson.JSONEncodeError as error:  # it reads deeper than it writes
        raise BadRequest(f"The body is nested too deeply: {error}.", "Send one flat JSON object.") from None


def model_name(body: dict[str, Any]) -> str:
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise BadRequest("`model` must be a non-empty string.", "GET /v1/models lists the models served here.", param="model")
    return model


def check_choices(body: dict[str, Any], limit: int) -> None:
    """``n`` multiplies the work of a request; vLLM's own cap is 16,384 (CVE-2026-34756)."""
    for key in ("n", "best_of"):
        value = body.get(key)
        if value is not None and (type(value) is not int or value > limit):  # the engine would read "16000" as a number too
            raise BadRequest(f"`{key}` is {str(value)[:40]}; at most {limit} are allowed.", "Ask for fewer choices.", param=key)
    prompts = body.get("prompt")
    if isinstance(prompts, list) and len(prompts) > limit and not all(isinstance(token, int) for token in prompts):
        raise BadRequest(
            f"`prompt` holds {len(prompts)} prompts; at most {limit} are allowed.", "Send several requests.", param="prompt"
        )


def answer_headers(version: VersionId, move: Generation | None) -> Headers:
    generation = [(b"x-model-generation", str(move.generation).encode())] if move else []
    return [(b"x-model-version", str(version).encode()), *generation]


def request_id(headers: Headers) -> str:
    """The id that Serve's own middleware took from the client or made, and puts on every answer; here only what is safe in a log."""
    offered = next((value for name, value in headers if name == b"x-request-id"), b"").decode("latin-1")
    return UNSAFE.sub("", offered)[:MAX_ID_CHARACTERS]
