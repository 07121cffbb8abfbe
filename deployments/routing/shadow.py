"""Shadow traffic: a sampled share of the stable version's requests is answered by the canary too, compared, and thrown away.

Nothing of it reaches a client, and no client waits for it.
"""

import asyncio
import random
from typing import Any

import orjson

from cluster.errors import NoReplica, SpringtideError
from cluster.types import Generation, VersionId
from deployments.routing.measure import Recorder, Trace
from deployments.routing.upstream import LOST, Answer, Call, Upstream

AT_ONCE = 4
"""Shadows in flight; what is sampled beyond them is left out, so that a slow canary costs the stable version nothing."""


class Shadow:
    """Asks the canary in the background."""

    def __init__(self, upstream: Upstream, recorder: Recorder) -> None:
        self.upstream = upstream
        self.recorder = recorder
        self.running: set[asyncio.Task[None]] = set()

    def chosen(self, version: VersionId, move: Generation | None) -> bool:
        """Whether this request of ``version`` is to be shadowed."""
        if move is None or move.canary is None or version != move.stable or len(self.running) >= AT_ONCE:
            return False
        return random.random() * 100 < move.shadow_percent  # noqa: S311 (a sample, not a secret)

    def ask(self, call: Call, move: Generation, canary: VersionId, stable: Trace) -> None:
        """Send what ``call`` asked to the canary, and compare its answer with what ``stable`` saw."""
        if stable.failed or stable.text is None:
            return
        copy = Call(canary, call.path, call.payload, f"shadow-{call.request_id}", call.fleet)
        task = asyncio.create_task(self._compare(copy, move, canary, b"".join(stable.text)))
        self.running.add(task)
        task.add_done_callback(self.running.discard)

    async def _compare(self, call: Call, move: Generation, canary: VersionId, stable: bytes) -> None:
        trace = Trace(text=[])
        try:
            await self.upstream.forward(call, Answer(_nowhere, [], trace))
        except NoReplica:  # it is starting, or taking weights over; a client would have waited
            return
        except (SpringtideError, *LOST):
            trace.failed = True
        failed = trace.failed or not trace.text
        agrees = not failed and text_of(b"".join(trace.text or [])) == text_of(stable)
        self.recorder.shadow(move, canary, agrees, failed)


async def _nowhere(_: Any) -> None:
    """Where a shadow's answer goes."""


def text_of(body: bytes) -> list[str]:
    """Each choice's text, of a whole answer or of a stream's events.

    >>> text_of(b'data: {"choices": [{"index": 0, "delta": {"content": "a"}}]}\\n\\ndata: [DONE]\\n\\n')
    ['a']
    >>> text_of(b'{"choices": [{"index": 0, "message": {"content": "a"}}]}')
    ['a']
    """
    events = [event.removeprefix(b"data: ") for event in body.split(b"\n\n")] if body.startswith(b"data: ") else [body]
    texts: dict[int, str] = {}
    for event in events:
        for choice in orjson.loads(event)["choices"] if event.startswith(b"{") else []:
            said = choice.get("text") or (choice.get("delta") or choice.get("message") or {}).get("content") or ""
            texts[choice["index"]] = texts.get(choice["index"], "") + said
    return [text for _, text in sorted(texts.items())]
