"""The history checker: what many clients recorded while versions came and went, and what must be true of it whatever happened.

The clients ask greedily and in float32, so that a version's answer to a prompt is one text, whatever shares its batch.
"""

import asyncio
import hashlib
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, pairwise

import aiohttp

from benchmarks.load import mislabelled, problem_in, text_of

PROMPTS = ("Who are you?", "Do you like the sea?", "What is 2 + 2?", "Who made you?")
"""The seedling learnt them, so it ends its answers by itself."""
TOKENS = 40


@dataclass(frozen=True)
class Event:
    """One request as its client saw it."""

    start_s: float
    end_s: float
    session: str
    alias: str
    prompt: str
    version: str
    """The header's; empty where the request failed."""
    generation: int
    text: str
    """Digest of the answer."""
    error: str = ""


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def problems(
    events: Sequence[Event], expected: Mapping[tuple[str, str], str], withdrawn: Mapping[str, float] | None = None
) -> list[str]:
    """Everything that is wrong with a history, in words; empty for a good one.

    ``expected``: (version, prompt) → digest of what that version alone answers, for every version that may answer; empty where texts are
    not looked at. ``withdrawn``: version → when its rollback was
    acknowledged; what started later must not get it.
    """
    found = [f"{e.session} failed: {e.error}" for e in events if e.error]
    answered = [e for e in events if not e.error]
    for e in answered:
        if expected and expected.get((e.version, e.prompt)) != e.text:
            found.append(f"{e.session}: {e.version} does not answer {e.prompt!r} so")
        if (withdrawn or {}).get(e.version, e.start_s) < e.start_s:
            found.append(f"{e.session} got {e.version} {e.start_s - (withdrawn or {})[e.version]:.2f} s after its rollback")
    return found + [words for own in by_session(answered) for words in steadiness(own)]


def by_session(events: Sequence[Event]) -> Iterator[list[Event]]:
    """Each session's events in the order in which it sent them."""
    ordered = sorted(events, key=lambda e: (e.session, e.start_s))
    return (list(own) for _, own in groupby(ordered, key=lambda e: e.session))


def steadiness(own: Sequence[Event]) -> list[str]:
    """A session's generations only grow, and within one it sees one version."""
    found = [
        f"{later.session} went back from generation {earlier.generation} to {later.generation}"
        for earlier, later in pairwise(own)
        if later.generation < earlier.generation
    ]
    versions: dict[int, set[str]] = {}
    for event in own:
        versions.setdefault(event.generation, set()).add(event.version)
    return found + [f"{own[0].session} saw {sorted(v)} in generation {g}" for g, v in versions.items() if len(v) > 1]


# the clients


@contextmanager
def recording(
    url: str, alias: str, sessions: int, pause_s: float = 0.2, streaming: bool = True, prefix: str = "session"
) -> Iterator[list[Event]]:
    """Concurrent sessions until the block ends; the list grows while it runs."""
    events: list[Event] = []
    stop = threading.Event()
    thread = threading.Thread(
        target=lambda: asyncio.run(_clients(url, alias, sessions, pause_s, streaming, prefix, stop, events))
    )
    thread.start()
    try:
        yield events
    finally:
        stop.set()
        thread.join()


async def _clients(
    url: str, alias: str, sessions: int, pause_s: float, streaming: bool, prefix: str, stop: threading.Event, events: list[Event]
) -> None:
    async def client(number: int) -> None:
        turn = number
        while not stop.is_set():
            prompt = PROMPTS[turn % len(PROMPTS)]
            events.append(await ask(http, url, alias, prompt, f"{prefix}-{number}", streaming))
            turn += 1
            await asyncio.sleep(pause_s)

    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as http:
        await asyncio.gather(*(client(number) for number in range(sessions)))


async def ask(http: aiohttp.ClientSession, url: str, alias: str, prompt: str, session: str, streaming: bool) -> Event:
    body = {
        "model": alias,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": TOKENS,
        "stream": streaming,
        **({"stream_options": {"include_usage": True}} if streaming else {}),
    }
    start_s, raw, version, generation, error = time.monotonic(), b"", "", 0, ""
    try:
        headers = {"content-type": "application/json", "x-session-id": session}
        async with http.post(f"{url}/v1/chat/completions", data=json.dumps(body), headers=headers) as response:
            version = response.headers.get("x-model-version", "")
            generation = int(response.headers.get("x-model-generation", "0"))
            raw = await response.read()
            error = problem_in(response.status, raw, streaming) or mislabelled(version, raw)
    except (aiohttp.ClientError, TimeoutError) as problem:
        error = f"{type(problem).__name__}: {problem}"
    text = "" if error else digest(text_of(raw, streaming))
    return Event(start_s, time.monotonic(), session, alias, prompt, version, generation, text, error)


def expected_of(url: str, versions: Sequence[str]) -> dict[tuple[str, str], str]:
    """(version, prompt) → digest of what each pinned version answers by itself."""

    async def each() -> dict[tuple[str, str], str]:
        async with aiohttp.ClientSession() as http:
            events = [await ask(http, url, version, prompt, "alone", True) for version in versions for prompt in PROMPTS]
        assert not [event.error for event in events if event.error]
        return {(event.version, event.prompt): event.text for event in events}

    return asyncio.run(each())
