"""Shadow traffic: a sampled share of the stable version's requests is answered by the canary too, compared, and thrown away.

Nothing of it reaches a client, and no client waits for it.
"""

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import orjson

from cluster.errors import NoReplica, SpringtideError
from cluster.types import Generation, VersionId
from deployments.routing.answer import Answer
from deployments.routing.connection import ConnectionLost
from deployments.routing.engine_routes import EngineRoute
from deployments.routing.measure import Recorder, Trace
from deployments.routing.upstream import Call, Upstream

AT_ONCE = 4
"""Shadows in flight; what is sampled beyond them is left out, so that a slow canary costs the stable version nothing."""


class Shadow:
    """Asks the canary in the background."""

    def __init__(self, upstream: Upstream, recorder: Recorder) -> None:
        self.upstream = upstream
        self.recorder = recorder
        self.running: set[asyncio.Task[None]] = set()

    def chosen(self, route: EngineRoute, version: VersionId, move: Generation | None) -> bool:
        """Whether this request of ``version`` is to be shadowed. Only written text can be compared."""
        if move is None or move.canary is None or version != move.stable or len(self.running) >= AT_ONCE or not route.terminator:
            return False
        return random.random() * 100 < move.shadow_percent  # noqa: S311 (a sample, not a secret)

    def ask(self, call: Call, move: Generation, canary: VersionId, stable: Trace) -> None:
        """Send what ``call`` asked to the canary, and compare its answer with what ``stable`` saw."""
        if stable.failed or stable.text is None:
            return
        copy = Call(canary, call.route, call.payload, f"shadow-{call.request_id}", call.fleet)
        task = asyncio.create_task(self._compare(copy, move, canary, b"".join(stable.text)))
        self.running.add(task)
        task.add_done_callback(self.running.discard)

    async def _compare(self, call: Call, move: Generation, canary: VersionId, stable: bytes) -> None:
        trace = Trace(text=[])
        try:
            await self.upstream.forward(call, Answer(_nowhere, [], trace))
        except NoReplica:  # it is starting, or taking weights over; a client would have waited
            return
        except (SpringtideError, ConnectionLost):
            trace.failed = True
        failed = trace.failed or not trace.text
        agrees = not failed and text_of(b"".join(trace.text or [])) == text_of(stable)
        self.recorder.shadow(move, canary, agrees, failed)


async def _nowhere(_: Any) -> None:
    """Where a shadow's answer goes."""


def text_of(body: bytes) -> list[str]:
    """Each choice's text, of a whole answer or of a stream's events, whichever of the routes that write text it came from.

    >>> text_of(b'data: {"choices": [{"index": 0, "delta": {"content": "a"}}]}\\n\\ndata: [DONE]\\n\\n')
    ['a']
    >>> text_of(b'{"choices": [{"index": 0, "message": {"content": "a"}}]}')
    ['a']
    >>> text_of(b'{"content": [{"type": "text", "text": "a"}]}')
    ['a']
    >>> text_of(b'event: response.output_text.delta\\ndata: {"type": "response.output_text.delta", "delta": "a"}\\n\\n')
    ['a']
    """
    streamed = body.startswith((b"data: ", b"event: "))
    events = [event.partition(b"data: ")[2] for event in body.split(b"\n\n")] if streamed else [body]
    texts: dict[int, str] = {}
    for event in events:
        for index, said in _said(orjson.loads(event)) if event.startswith(b"{") else ():
            texts[index] = texts.get(index, "") + said
    return [text for _, text in sorted(texts.items())]


def _said(document: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """(choice, text) of one answer or event."""
    for choice in document.get("choices") or ():
        yield choice["index"], choice.get("text") or (choice.get("delta") or choice.get("message") or {}).get("content") or ""
    if document.get("type") == "response.output_text.delta":
        yield 0, document["delta"]
    if document.get("type") == "content_block_delta":
        yield 0, document["delta"].get("text") or ""
    for item in document.get("output") or (document,):  # a response has items with content, a message has content itself
        for part in item.get("content") or ():
            yield 0, part.get("text") or ""
