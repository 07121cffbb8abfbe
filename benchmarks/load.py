"""The load generator: closed-loop clients of an OpenAI chat API, light enough to share two cores with what it measures.

One process, asyncio and aiohttp. While a stream runs, a chunk costs a clock reading and a list append; its bytes are looked at
once, after the stream has ended.
"""

import asyncio
import itertools
import json
import math
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import aiohttp

TIMEOUT_S = 120
PAUSE_AFTER_FAILURE_S = 0.05
"""A refused connection fails within microseconds; without a pause a client would spin."""

USAGE = re.compile(rb'"completion_tokens":\s*(\d+)')
MODEL = re.compile(rb'"model":\s*"([^"]*)"')
SUBJECTS = ("the sea", "a lighthouse", "the moon", "a tide pool", "salt", "a boat", "the wind", "a harbour", "sand", "a whale")
QUESTIONS = (
    "What is {}?",
    "Why do people like {}?",
    "Tell me one fact about {}.",
    "How would you explain {} to a child?",
    "Where would I find {}?",
    "Write a short line about {}.",
    "Is {} old or new?",
    "What is {} good for?",
)


@dataclass(frozen=True)
class Sample:
    """One request as its client saw it. Times are seconds on the monotonic clock."""

    client: int
    """Which of the concurrent clients sent it."""
    start_s: float
    first_byte_s: float
    """When the first bytes of the body came."""
    end_s: float
    tokens: int
    """Generated tokens, as the server counts them in ``usage``."""
    gaps_s: tuple[float, ...]
    """Between one token event and the next, in a stream. Events that arrive in one read are 0 apart."""
    error: str
    """Empty, or why the request failed."""
    version: str | None
    """The header ``x-model-version``."""
    generation: int | None = None
    """The header ``x-model-generation``: which move of the alias this answer belongs to."""
    text: str | None = None
    """The whole answer, where `run` was asked to keep it."""

    @property
    def ok(self) -> bool:
        return not self.error

    @property
    def ttft_s(self) -> float:
        return self.first_byte_s - self.start_s


def prompts(seed: int = 0) -> list[str]:
    """Every question about every subject, in an order that ``seed`` fixes."""
    questions = [question.format(subject) for question in QUESTIONS for subject in SUBJECTS]
    random.Random(seed).shuffle(questions)  # noqa: S311 (reproducible, not secret)
    return questions


async def run(
    url: str,
    model: str,
    streams: int,
    requests: int | None = None,
    duration_s: float | None = None,
    stop: threading.Event | None = None,
    streaming: bool = True,
    tokens: int = 32,
    headers: dict[str, str] | None = None,
    keep_text: bool = False,
    pause_s: float = 0,
    watch: Callable[[Sample], None] = lambda _: None,
) -> list[Sample]:
    """Keep ``streams`` requests open at ``url`` (``http://host:port/v1``) until ``requests``, ``duration_s`` or ``stop`` ends it.

    Greedy, exactly ``tokens`` tokens each, prompts from `prompts` in turn. A failed request is a `Sample` with an ``error``;
    nothing is raised and nothing is retried. Each client thinks for ``pause_s``
    after each answer. ``watch`` hears each sample as it ends. Returned in the order in which they ended.
    """
    tickets = _tickets(requests, duration_s, stop)
    bodies = [_request(model, prompt, streaming, tokens) for prompt in prompts()]
    samples: list[Sample] = []

    async def client(number: int) -> None:
        for ticket in tickets:
            sample = await _ask(session, f"{url}/chat/completions", bodies[ticket % len(bodies)], streaming, number, keep_text)
            samples.append(sample)
            watch(sample)
            await asyncio.sleep(pause_s if sample.ok else PAUSE_AFTER_FAILURE_S)

    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    headers = {"content-type": "application/json", **(headers or {})}
    async with aiohttp.ClientSession(timeout=timeout, headers=headers, connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(client(number) for number in range(streams)))
    return samples


async def replay(
    url: str, model: str, arrivals_s: Sequence[float], tokens: int, watch: Callable[[Sample], None] = lambda _: None
) -> list[Sample]:
    """Send a streamed request at each of these times, whatever became of those before (an open loop). Returned in order of their ends."""
    bodies = [_request(model, prompt, True, tokens) for prompt in prompts()]
    samples: list[Sample] = []
    began_s = time.monotonic()

    async def client(number: int) -> None:
        sample = await _ask(session, f"{url}/chat/completions", bodies[number % len(bodies)], True, number, keep_text=False)
        samples.append(sample)
        watch(sample)

    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    headers = {"content-type": "application/json"}
    async with (
        aiohttp.ClientSession(timeout=timeout, headers=headers, connector=aiohttp.TCPConnector(limit=0)) as session,
        asyncio.TaskGroup() as clients,
    ):
        for number, at_s in enumerate(arrivals_s):
            await asyncio.sleep(max(0.0, began_s + at_s - time.monotonic()))
            clients.create_task(client(number))
    return samples


@contextmanager
def background(url: str, model: str, streams: int, pause_s: float = 0) -> Iterator[list[Sample]]:
    """`run` in a thread of its own until the block ends; the list fills while it runs."""
    stop, samples = threading.Event(), list[Sample]()
    running = run(url, model, streams, stop=stop, pause_s=pause_s, watch=samples.append)
    thread = threading.Thread(target=lambda: asyncio.run(running))
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


def _tickets(requests: int | None, duration_s: float | None, stop: threading.Event | None) -> Iterator[int]:
    """0, 1, 2, … shared by all clients, until there is nothing more to send."""
    deadline_s = time.monotonic() + duration_s if duration_s is not None else math.inf
    for number in itertools.count():
        if number == requests or time.monotonic() >= deadline_s or (stop is not None and stop.is_set()):
            return
        yield number


def _request(model: str, prompt: str, streaming: bool, tokens: int) -> bytes:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": tokens,
        "ignore_eos": True,  # vLLM's extension: every answer has the same length
        "stream": streaming,
    }
    return json.dumps(body | ({"stream_options": {"include_usage": True}} if streaming else {})).encode()


async def _ask(session: aiohttp.ClientSession, url: str, body: bytes, streaming: bool, client: int, keep_text: bool) -> Sample:
    chunks: list[tuple[float, bytes]] = []
    status, error = 0, ""
    said: Mapping[str, str] = {}
    start_s = time.monotonic()
    try:
        async with session.post(url, data=body) as response:
            status, said = response.status, response.headers
            async for chunk in response.content.iter_any():
                chunks.append((time.monotonic(), chunk))
    except (aiohttp.ClientError, TimeoutError) as problem:
        error = f"{type(problem).__name__}: {problem}"
    end_s = time.monotonic()
    whole = b"".join(chunk for _, chunk in chunks)
    version, generation = said.get("x-model-version"), said.get("x-model-generation")
    error = error or problem_in(status, whole, streaming) or mislabelled(version, whole)
    return Sample(
        client=client,
        start_s=start_s,
        first_byte_s=chunks[0][0] if chunks else end_s,
        end_s=end_s,
        tokens=generated(whole),
        gaps_s=gaps(chunks) if streaming else (),
        error=error,
        version=version,
        generation=int(generation) if generation else None,
        text=text_of(whole, streaming) if keep_text and not error else None,
    )


# what the bytes say: pure functions


def problem_in(status: int, body: bytes, streaming: bool) -> str:
    """Empty for a complete answer, else what is wrong with it."""
    if status != 200:
        return f"status {status}: {body[:200].decode(errors='replace')}"
    if streaming and not body.rstrip().endswith(b"data: [DONE]"):
        return f"truncated stream: …{body[-80:].decode(errors='replace')}"
    if generated(body) == 0:
        return f"no tokens: …{body[-200:].decode(errors='replace')}"
    return ""


def mislabelled(version: str | None, body: bytes) -> str:
    """Empty where every ``model`` in the answer is the version that the header names; nothing to compare where there is no header.

    >>> mislabelled("m@1", b'data: {"model": "m@1"} data: {"model": "m@2"}')
    'the header says m@1, the body m@1, m@2'
    """
    named = {name.decode() for name in MODEL.findall(body)}
    if version is None or named == {version}:
        return ""
    return f"the header says {version}, the body {', '.join(sorted(named)) or 'nothing'}"


def generated(body: bytes) -> int:
    """``completion_tokens`` of the answer's ``usage``, 0 where there is none. In a stream it is in the last event but one."""
    found = USAGE.findall(body[-2000:])
    return int(found[-1]) if found else 0


def gaps(chunks: Sequence[tuple[float, bytes]]) -> tuple[float, ...]:
    """Seconds between one token's event and the next, of a stream's bytes with the times at which they came.

    vLLM opens a chat stream with an event for the role and closes it with one for the usage and ``[DONE]``: those three carry no
    token. An event ends at a blank line, which cannot be inside one, because JSON escapes line ends.
    """
    times_s: list[float] = []
    carry = b""
    for time_s, chunk in chunks:
        joined = carry + chunk
        times_s += [time_s] * joined.count(b"\n\n")
        carry = b"\n" if joined.endswith(b"\n") and not joined.endswith(b"\n\n") else b""
    return tuple(later - earlier for earlier, later in itertools.pairwise(times_s[1:-2]))


def text_of(body: bytes, streaming: bool) -> str:
    """The text of a complete answer."""
    if not streaming:
        return json.loads(body)["choices"][0]["message"]["content"]
    events = [event.removeprefix(b"data: ") for event in body.split(b"\n\n")]
    answers = [json.loads(event) for event in events if event.startswith(b"{")]
    return "".join(choice["delta"].get("content") or "" for answer in answers for choice in answer["choices"])


# statistics


@dataclass(frozen=True)
class Summary:
    """One measurement. Latencies in milliseconds, None where the answers were not streamed (or none came)."""

    requests_per_s: float
    output_tokens_per_s: float
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    itl_p50_ms: float | None
    itl_p99_ms: float | None
    failed: int


def summarise(samples: Sequence[Sample], streaming: bool) -> Summary:
    """Rates over the wall time from the first start to the last end; failed requests count only as failed."""
    good = [sample for sample in samples if sample.ok]
    wall_s = max((s.end_s for s in samples), default=0) - min((s.start_s for s in samples), default=0)
    ttft_ms = [sample.ttft_s * 1000 for sample in good] if streaming else []
    itl_ms = [gap * 1000 for sample in good for gap in sample.gaps_s]
    return Summary(
        requests_per_s=len(good) / wall_s if wall_s else 0.0,
        output_tokens_per_s=sum(sample.tokens for sample in good) / wall_s if wall_s else 0.0,
        ttft_p50_ms=percentile(ttft_ms, 50),
        ttft_p99_ms=percentile(ttft_ms, 99),
        itl_p50_ms=percentile(itl_ms, 50),
        itl_p99_ms=percentile(itl_ms, 99),
        failed=len(samples) - len(good),
    )


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Linear interpolation between the two nearest values, as NumPy's default; None of nothing.

    >>> percentile([1, 2, 3, 4], 50)
    2.5
    """
    if not values:
        return None
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below, share = int(place), place % 1
    return ordered[below] if not share else ordered[below] * (1 - share) + ordered[below + 1] * share
