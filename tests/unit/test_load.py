"""The load generator's pure parts: what it reads from a stream's bytes, and its statistics."""

import asyncio
import itertools
import json
import threading

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import load
from benchmarks.load import Sample, gaps, generated, percentile, problem_in, summarise, text_of


def event(payload: object) -> bytes:
    return b"data: " + (payload if isinstance(payload, bytes) else json.dumps(payload).encode()) + b"\n\n"


def delta(**fields: str) -> bytes:
    return event({"model": "seedling@1", "choices": [{"delta": fields}]})


STREAM = [
    delta(role="assistant", content=""),
    delta(content="One"),
    delta(content=" two\n\n"),
    delta(content=" three"),
    event({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3}}),
    event(b"[DONE]"),
]
WHOLE = b"".join(STREAM)


def sample(
    start_s: float = 0, first_byte_s: float = 0, end_s: float = 1, gaps_s: tuple[float, ...] = (), error: str = ""
) -> Sample:
    return Sample(0, start_s, first_byte_s, end_s, tokens=4, gaps_s=gaps_s, error=error, version=None)


def test_gaps_are_between_token_events_only() -> None:
    assert gaps(list(zip([0.0, 1.0, 3.0, 7.0, 8.0, 9.0], STREAM, strict=True))) == (2.0, 4.0)


def test_events_in_one_read_are_zero_apart() -> None:
    assert gaps([(0.0, b"".join(STREAM[:3])), (5.0, b"".join(STREAM[3:]))]) == (0.0, 5.0)


@given(st.lists(st.integers(0, len(WHOLE)), max_size=12).map(sorted))
def test_however_the_bytes_are_cut_every_event_is_seen_once(cuts: list[int]) -> None:
    edges = [0, *cuts, len(WHOLE)]
    chunks = [(float(i), WHOLE[a:b]) for i, (a, b) in enumerate(itertools.pairwise(edges))]
    assert len(gaps(chunks)) == 2


def test_a_complete_stream_has_no_problem() -> None:
    assert problem_in(200, WHOLE, streaming=True) == ""
    assert generated(WHOLE) == 3
    assert text_of(WHOLE, streaming=True) == "One two\n\n three"


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (500, b"oh no", "status 500: oh no"),
        (200, WHOLE[:-20], "truncated stream"),
        (200, b"", "truncated stream"),
        (200, event({"error": {"message": "lost"}}) + event(b"[DONE]"), "no tokens"),
    ],
)
def test_an_incomplete_stream_says_what_is_wrong(status: int, body: bytes, words: str) -> None:
    assert words in problem_in(status, body, streaming=True)


def test_a_whole_answer() -> None:
    body = json.dumps({"choices": [{"message": {"content": "Yes."}}], "usage": {"completion_tokens": 2}}).encode()
    assert problem_in(200, body, streaming=False) == ""
    assert (generated(body), text_of(body, streaming=False)) == (2, "Yes.")


def test_percentiles() -> None:
    assert percentile([], 50) is None
    assert percentile([7], 99) == 7
    assert percentile([4, 1, 3, 2], 50) == 2.5
    assert percentile(range(101), 99) == 99


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0, 100))
def test_percentiles_agree_with_numpy(values: list[float], percent: float) -> None:
    import numpy

    assert percentile(values, percent) == pytest.approx(numpy.percentile(values, percent), rel=1e-9, abs=1e-9)


def test_summary_counts_good_requests_over_the_whole_wall_time() -> None:
    samples = [sample(10, 10.1, 11, (0.02, 0.04)), sample(10.5, 10.8, 12), sample(11, 11, 14, error="status 500")]
    summary = summarise(samples, streaming=True)
    assert (summary.requests_per_s, summary.output_tokens_per_s, summary.failed) == (0.5, 2.0, 1)
    assert summary.ttft_p50_ms == pytest.approx(200)
    assert summary.itl_p50_ms == pytest.approx(30)


def test_without_streams_there_are_no_latencies_of_tokens() -> None:
    summary = summarise([sample()], streaming=False)
    assert (summary.ttft_p50_ms, summary.ttft_p99_ms, summary.itl_p50_ms, summary.itl_p99_ms) == (None,) * 4
    assert summarise([], streaming=True).requests_per_s == 0


def test_prompts_are_fixed_by_their_seed() -> None:
    assert load.prompts(3) == load.prompts(3) != load.prompts(4)
    assert len(set(load.prompts())) == 80


async def serve(answer: web.StreamResponse | None, port: list[int]) -> web.AppRunner:
    """A server on a free port that streams `STREAM` slowly, or sends ``answer``."""

    async def chat(request: web.Request) -> web.StreamResponse:
        if answer is not None:
            return web.Response(status=answer.status, text="no")
        response = web.StreamResponse(headers={"x-model-version": "seedling@1"})
        await response.prepare(request)
        for part in STREAM:
            await response.write(part)
            await asyncio.sleep(0.001)
        return response

    app = web.Application()
    app.router.add_post("/v1/chat/completions", chat)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port.append(runner.addresses[0][1])
    return runner


def drive(answer: web.StreamResponse | None = None, **limits: object) -> list[Sample]:
    async def both() -> list[Sample]:
        port: list[int] = []
        server = await serve(answer, port)
        samples = await load.run(f"http://127.0.0.1:{port[0]}/v1", "m", 4, **limits)  # pyright: ignore[reportArgumentType]
        await server.cleanup()
        return samples

    return asyncio.run(both())


def test_run_sends_exactly_as_many_requests_as_asked() -> None:
    heard: list[Sample] = []
    samples = drive(requests=10, keep_text=True, watch=heard.append)
    assert len(samples) == 10 and samples == heard and {s.client for s in samples} == {0, 1, 2, 3}
    assert all(s.ok and s.tokens == 3 and len(s.gaps_s) == 2 and s.version == "seedling@1" for s in samples)
    assert {s.text for s in samples} == {"One two\n\n three"}


def test_run_ends_by_time_or_when_told() -> None:
    assert drive(duration_s=0.05)
    stop = threading.Event()
    stop.set()
    assert drive(stop=stop) == []


def test_failures_are_samples_and_never_raised() -> None:
    assert all(s.error == "status 503: no" for s in drive(web.Response(status=503), requests=4))
    refused = asyncio.run(load.run("http://127.0.0.1:9/v1", "m", 2, requests=2))
    assert len(refused) == 2 and not any(s.ok for s in refused)


def test_a_body_that_names_another_version_than_the_header_is_a_failure() -> None:
    assert load.mislabelled("seedling@1", WHOLE) == "" and load.mislabelled(None, WHOLE) == ""
    assert load.mislabelled("seedling@2", WHOLE) == "the header says seedling@2, the body seedling@1"
    assert load.mislabelled("seedling@1", b"{}") == "the header says seedling@1, the body nothing"
