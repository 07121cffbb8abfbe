"""The engine's routes as clients see them (`deployments.routing.engine_routes`): check what a gateway can check, name the version, pass the
bytes on.

The body is read as JSON to replace ``model`` by the immutable version (`deployments.api.bodies`).
"""

import asyncio
import re
import secrets
import time
from contextlib import ExitStack
from typing import NamedTuple

from cluster.config import Gateway
from cluster.errors import BadRequest, EngineFailed, NoReplica, Quarantined, SpringtideError
from cluster.types import FleetState
from deployments.api import engine_limits
from deployments.api.bodies import as_sent, check, model_name, session_of
from deployments.api.early import EarlyStream
from deployments.http import Headers, Receive, Scope, Send, parse_json, read_body, send_error
from deployments.routing.answer import Answer
from deployments.routing.budget import Budget
from deployments.routing.engine_routes import EngineRoute
from deployments.routing.measure import Recorder, Trace
from deployments.routing.payload import Payload
from deployments.routing.refresh import Refresh
from deployments.routing.router import Router
from deployments.routing.shadow import Shadow
from deployments.routing.table import Target
from deployments.routing.upstream import Call, Upstream
from deployments.uvicorn_patches import ClientConnection, connection_of
from deployments.wire import MODEL_GENERATION, MODEL_VERSION, REQUEST_ID, header

LOOK_AGAIN_S = 0.2
"""How long a request without a replica waits for a newer view before it looks again."""
MAX_ID_CHARACTERS = 64
UNSAFE = re.compile(r"[^A-Za-z0-9._:-]")


class Routing(NamedTuple):
    """The parts of a gateway that answer a request to an engine."""

    router: Router
    refresh: Refresh
    upstream: Upstream
    recorder: Recorder
    shadow: Shadow
    budget: Budget


class Asked(NamedTuple):
    """One request, as far as the gateway reads it."""

    model: str
    session: str
    payload: Payload
    id: str
    connection: ClientConnection | None
    """What a stream is written to."""


class Inference:
    """The handler of one of the engine's routes."""

    def __init__(self, route: EngineRoute, limits: Gateway, routing: Routing) -> None:
        self.route = route
        self.limits = limits
        self.routing = routing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.routing.budget.admit() as held:
            raw = await read_body(scope, receive, self.limits.max_body_bytes, held.take)
            asked = self._read(scope, raw)
            held.take(len(asked.payload) - len(raw))
            del raw  # a request may wait for minutes
            after_s = self.limits.early_comment_s
            if after_s is None or not asked.payload.streams:
                return await Waiting(self, asked, send).answer()
            async with EarlyStream(send, after_s, self.route.form) as early:
                await Waiting(self, asked, early).answer()

    def _read(self, scope: Scope, raw: bytes) -> Asked:
        headers: Headers = scope["headers"]
        body, id = parse_json(raw), request_id(headers)
        check(body, self.route, self.limits)
        engine_limits.check(body)
        payload = Payload(as_sent(body, self.route, unique(id)))
        return Asked(model_name(body), session_of(headers, body, self.route), payload, id, connection_of(scope))

    async def send_error(self, send: Send, error: SpringtideError, target: Target) -> None:
        """An error too says which version it came from."""
        await send_error(send, error, answer_headers(target), self.route.form.body)

    async def forward(self, asked: Asked, target: Target, send: Send) -> None:
        """Answer the request by the version that was chosen. Raises `NoReplica` where a newer view may help."""
        version, move, fleet = target
        call = Call(version, self.route, asked.payload, asked.id, fleet)
        shadowed = self.routing.shadow.chosen(self.route, version, move)
        trace = self._trace(target, keep_text=shadowed)
        try:
            await self.routing.upstream.forward(call, Answer(send, answer_headers(target), trace, asked.connection))
        except NoReplica:
            raise
        except asyncio.CancelledError:
            self._note_impatience(target, trace)
            raise
        except SpringtideError as error:  # nothing was sent yet
            await self.send_error(send, error, target)
            return (
                None if isinstance(error, BadRequest | Quarantined) else self.note_failure(target)
            )  # no engine was asked, or none failed
        if trace is not None and move is not None:
            self.routing.recorder.record(move, version, trace)
            if shadowed and move.canary is not None:
                self.routing.shadow.ask(call, move, move.canary, trace)

    def _trace(self, target: Target, keep_text: bool) -> Trace | None:
        """What the tokenizer alone answers says nothing about a version."""
        return self.routing.recorder.trace(target.move, keep_text) if self.route.runs_model else None

    def _note_impatience(self, target: Target, trace: Trace | None) -> None:
        """The client left. Where it left before the first byte, the first byte took at least so long."""
        if trace is not None and target.move is not None and not trace.first_s:
            trace.first_s = trace.end_s = time.monotonic()
            self.routing.recorder.record(target.move, target.version, trace)

    def note_failure(self, target: Target) -> None:
        """A request that failed by no fault of its client counts against the version; a refused one counts for nothing."""
        trace = self._trace(target, keep_text=False)
        if trace is not None and target.move is not None:
            trace.failed = True
            self.routing.recorder.record(target.move, target.version, trace)


class Waiting:
    """One request until a replica answers it, or until it has waited for too long.

    A request waits while its version's holder takes other weights over or starts. What the model means may change meanwhile, so it is
    resolved again each time. Nothing has been sent yet.
    """

    def __init__(self, inference: Inference, asked: Asked, send: Send) -> None:
        self.inference = inference
        self.asked = asked
        self.send = send
        self.routing = inference.routing
        self.began_s = time.monotonic()
        self.patience_s = inference.limits.hold_timeout_s
        self.target: Target | None = None
        self.fleet: FleetState | None = None
        """The fleet that must wake first."""

    async def answer(self) -> None:
        with ExitStack() as place:  # kept until the answer is complete: a later request does not take it
            while (error := await self._try()) is not None:
                self._take_place(place)
                left_s = self.began_s + self.patience_s - time.monotonic()
                if left_s <= 0 or (self.fleet is not None and self.fleet.failed):
                    return await self._give_up(error)
                await self.routing.router.wait_for_change(min(left_s, LOOK_AGAIN_S))

    async def _try(self) -> NoReplica | None:
        """None where the request was answered."""
        try:
            self.target = await self.routing.router.resolve(self.asked.model, self.asked.session, self.inference.route)
            await self.inference.forward(self.asked, self.target, self.send)
        except NoReplica as error:
            return error
        return None

    def _take_place(self, place: ExitStack) -> None:
        """Wake the fleet that is needed, and become one of the requests that wait for it. Raises `Overloaded` where too many do."""
        self.fleet = self.routing.router.wake(self.target) if self.target else None
        if self.fleet is None and self.target is not None and not self.routing.router.table.unplaced(self.target):
            return  # a replica runs and is about to hold the version
        if self.patience_s < self.inference.limits.cold_start_timeout_s:
            self.patience_s = self.inference.limits.cold_start_timeout_s
            place.enter_context(self.routing.budget.wait(self.fleet.name if self.fleet else ""))

    async def _give_up(self, error: SpringtideError) -> None:
        if self.fleet is not None and self.fleet.failed:
            error = EngineFailed(self.fleet.failed)
        elif self.fleet is not None:
            _, words = await self.routing.refresh.stage(self.fleet.name)
            error = NoReplica(f"{error.message} {words}".strip(), error.do)
        if self.target is None:
            raise error
        self.inference.note_failure(self.target)
        await self.inference.send_error(self.send, error, self.target)


def answer_headers(target: Target) -> Headers:
    version, move, _ = target
    generation = [(MODEL_GENERATION.encode(), str(move.generation).encode())] if move else []
    return [(MODEL_VERSION.encode(), str(version).encode()), *generation]


def request_id(headers: Headers) -> str:
    """The id that Serve's own middleware took from the client or made, and puts on every answer; here only what is safe in a log."""
    return UNSAFE.sub("", header(headers, REQUEST_ID))[:MAX_ID_CHARACTERS]


def unique(id: str) -> str:
    """The request's id with something that no other request has: two may come under the same id."""
    return f"{id}-{secrets.token_hex(4)}"
