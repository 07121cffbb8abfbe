"""No request ends an engine, none is answered by a 500, and none holds the others up. The last tests of the shared pool: they load adapters."""

import asyncio
import contextlib
import json
import socket
import statistics
import time
from collections.abc import Iterator

import aiohttp
import httpx
import psutil
import pytest

from cluster import client
from tests import fuzz
from tests.cluster.test_publish import ONE, adapter, ask, gateways
from tests.conftest import Running
from tests.waiting import when

MiB = 1 << 20


@pytest.fixture(scope="module")
def models(pool: Running, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The live alias, its base, and an adapter that is loaded beside it."""
    made = adapter(pool, tmp_path_factory.mktemp("fuzzed"), seed=900)
    client.of(pool.config).publish(made.id, "seedling", "to be fuzzed")
    client.of(pool.config).publish(ONE, "seedling", "its adapter stays loaded")
    assert ask(pool, str(made.id)).headers["x-model-version"] == str(made.id)
    return ["seedling", str(ONE), str(made.id)]


def processes(pool: Running) -> list[psutil.Process]:
    return fuzz.engines(replica["pid"] for replica in client.of(pool.config).status()["replicas"])


@contextlib.contextmanager
def unharmed(pool: Running) -> Iterator[None]:
    """The engines that were there live on, and answer."""
    before = processes(pool)
    yield
    assert all(process.is_running() for process in before), "an engine has ended"
    assert ask(pool).status_code == 200


def test_requests_of_all_kinds_end_no_engine_and_find_no_500(pool: Running, models: list[str]) -> None:
    """The same few hundred each time. `python -m tests.fuzz` sends others."""
    with unharmed(pool):
        figures = fuzz.fuzz(pool.url, models, 320)
    print(figures)
    assert figures.faults == [] and figures.statuses[200] > 100, "\n\n".join(figures.faults)


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_thousands_of_requests_end_no_engine_and_leave_its_memory_alone(pool: Running, models: list[str]) -> None:
    fuzz.fuzz(pool.url, models, 800)  # caches fill up
    with unharmed(pool):
        before = processes(pool)
        began_mb, figures = fuzz.resident_mb(before), fuzz.fuzz(pool.url, models, 8_000, fixed=False)
        ended_mb = fuzz.resident_mb(before)
    print(figures, f"the engines' memory: {began_mb:.0f} MB before, {ended_mb:.0f} MB after", sep="\n")
    assert figures.faults == [], "\n\n".join(figures.faults)
    assert ended_mb < 1.1 * began_mb


# what abuses an API: the fault list, 3.5

HI = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


def chat(**of: object) -> bytes:
    return json.dumps({"model": "seedling", **HI, **of}).encode()


def schema(one: object) -> dict[str, object]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": one}}


ABUSE: dict[str, tuple[bytes, set[int]]] = {
    **{f"model {name[:12]!r}": (chat(model=name), {400, 404}) for name in (
        "seedling:..", "seedling:", "../../etc/passwd", "%2e%2e%2f", "a\x00b", "x" * 10_000, "\u202egnildees", "a\nb", "seedling@0",
        "seedling@9999999999",
    )},
    "nested 10,000 deep": (b'{"model": "seedling", "messages": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", {400}),
    "nested 500 deep": (chat(response_format=schema(None)).replace(b"null", b'{"a":' * 500 + b"1" + b"}" * 500), {400}),
    "a key twice": (chat()[:-1] + b', "max_tokens": 1}', {200, 400}),
    "NaN": (chat()[:-1] + b', "temperature": NaN}', {400}),
    "a number beyond floats": (chat()[:-1] + b', "temperature": 1e999}', {400}),
    "a number beyond integers": (chat()[:-1] + b', "seed": ' + b"9" * 400 + b"}", {400}),
    "no UTF-8": (chat().replace(b"Hi", b"\xff\xfe"), {400}),
    "half a surrogate": (chat().replace(b"Hi", b"\\ud800"), {400}),
    "n": (chat(n=10**6), {400}),
    "max_tokens": (chat(max_tokens=10**9), {400}),
    "top_logprobs": (chat(logprobs=True, top_logprobs=10**6), {400}),
    "many stops": (chat(stop=["x"] * 100_000), {400}),
    "a long stop": (chat(stop="x" * 1_000_000), {200, 400}),
    "logit_bias": (chat(logit_bias={"-1": 1, "999999": 1}), {400}),
    "all of the vocabulary": (chat(logit_bias={str(n): -100 for n in range(300)}), {200}),
    "bad words": (chat(bad_words=["x" * 100_000]), {400}),
    "pickled tensors": (json.dumps({"model": "seedling", "prompt": "a", "prompt_embeds": "gASVAAAA"}).encode(), {400}),
    **{f"an image at {url[:20]}": (chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]), {400})
       for url in ("http://169.254.169.254/latest/meta-data", "file:///etc/passwd", "data:image/png;base64,AAAA")},
    "a template": (chat(chat_template="{% for i in range(1000000000) %}x{% endfor %}"), {400}),
    "a regex of a million": (chat(structured_outputs={"regex": "(a{1000}){1000}"}), {400}),
    "a regex without an end": (chat(structured_outputs={"regex": "(((("}), {400}),
    "a deep regex": (chat(structured_outputs={"regex": "(" * 2_000 + "a" + ")" * 2_000}), {400}),
    "a deep grammar": (chat(structured_outputs={"grammar": "root ::= " + "(" * 9_000 + '"a"' + ")" * 9_000}), {400}),
    "a grammar of itself": (chat(structured_outputs={"grammar": "root ::= root"}), {200, 400}),
    "a schema that refers to nothing": (chat(response_format=schema({"$ref": "#/nope"})), {400}),
    "other machines' memory": (chat(kv_transfer_params={"do_remote_prefill": True, "remote_host": "10.0.0.1"}), {200}),
}  # fmt: skip


@pytest.mark.parametrize("case", ABUSE)
def test_abuse_is_answered_at_once_in_openais_form(pool: Running, case: str) -> None:
    raw, right = ABUSE[case]
    path = "/v1/completions" if b'"prompt"' in raw else "/v1/chat/completions"
    began_s = time.monotonic()
    answer = httpx.post(pool.url + path, content=raw, headers={"content-type": "application/json"}, timeout=60)
    assert answer.status_code in right, answer.text
    assert answer.status_code == 200 or set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert time.monotonic() - began_s < 5 and len(answer.content) < 10_000


def test_headers_of_ours_from_a_client_change_nothing(pool: Running) -> None:
    forged = {
        "x-springtide-secret": "guess",
        "x-springtide-version": "seedling@9",
        "x-request-disconnect-disabled": "?1",
        "host": "evil.example",
    }
    answer = httpx.post(f"{pool.url}/v1/chat/completions", content=chat(), headers=forged, timeout=60)
    assert (answer.status_code, answer.headers["x-model-version"]) == (200, "seedling@1")


SMUGGLED = [
    b"POST /v1/models HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    b"GET /admin/status HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /v1/models HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\nContent-Length: 0\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n{}\r\n0\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
]


@pytest.mark.parametrize("raw", SMUGGLED)
def test_no_second_request_is_smuggled_in_one_and_bad_lengths_are_refused(pool: Running, raw: bytes) -> None:
    with socket.create_connection((pool.config.gateway.host, pool.config.gateway.port), timeout=5) as peer:
        peer.sendall(raw)
        peer.settimeout(3)
        heard = b""
        with contextlib.suppress(TimeoutError, ConnectionError):
            while chunk := peer.recv(65536):
                heard += chunk
    statuses = [line.split()[1] for line in heard.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]
    assert all(status[:1] == b"4" for status in statuses), heard
    assert b"aliases" not in heard


def test_neither_a_prompt_nor_the_token_is_in_a_log(pool: Running) -> None:
    secret = "correct-horse-battery-staple"
    for body in (
        chat(messages=[{"role": "user", "content": secret}]),
        chat(structured_outputs={"regex": f"{secret}(("}),
        chat(temperature=secret),
    ):
        httpx.post(f"{pool.url}/v1/chat/completions", content=body, headers={"authorization": f"Bearer {secret}"}, timeout=60)
    logs = [path for path in pool.config.home.rglob("*") if path.is_file() and path.suffix in (".log", ".err", ".out", ".txt")]
    assert logs, "where are they?"
    assert [path for path in logs if secret.encode() in path.read_bytes()] == []


# who is slow holds up nobody: the fault list, 3.1


def latencies_s(pool: Running, count: int = 30) -> list[float]:
    taken: list[float] = []
    with httpx.Client(timeout=60) as session:
        for _ in range(count):
            began_s = time.monotonic()
            assert session.post(f"{pool.url}/v1/chat/completions", content=chat()).status_code == 200
            taken.append(time.monotonic() - began_s)
    return sorted(taken)


def test_grammars_that_take_long_hold_up_other_grammars_at_most(pool: Running) -> None:
    """They used to be read in the loop that serves everybody's tokens."""
    heavy = [chat(structured_outputs={"regex": f"(a|b)*a(a|b){{{16 + n}}}"}, max_tokens=1) for n in range(6)]
    heavy += [chat(response_format=schema(fuzz.NESTED), max_tokens=1)] * 6
    alone = latencies_s(pool)

    async def both() -> list[float]:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
            posts = [asyncio.ensure_future(session.post(f"{pool.url}/v1/chat/completions", data=raw)) for raw in heavy]
            taken = await asyncio.to_thread(latencies_s, pool)
            assert {answer.status for answer in await asyncio.gather(*posts)} <= {200, 400}
            return taken

    beside = asyncio.run(both())
    print(f"median {statistics.median(alone):.3f} s alone, {statistics.median(beside):.3f} s beside; longest {beside[-1]:.2f} s")
    assert beside[-1] < 2


def test_a_hundred_clients_that_leave_free_the_engine(pool: Running) -> None:
    """S11: twice fifty, because so many run at a time."""
    body = chat(max_tokens=900, ignore_eos=True, stream=True)

    async def leave() -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            answers = await asyncio.gather(*(session.post(f"{pool.url}/v1/chat/completions", data=body) for _ in range(50)))
            await asyncio.gather(*(answer.content.readany() for answer in answers[:8]))
            for answer in answers:
                answer.close()

    for _ in range(2):
        asyncio.run(leave())
    running = lambda: sum(replica["running"] for replica in client.of(pool.config).status()["replicas"])  # noqa: E731
    print(f"free after {when(lambda: running() == 0, 3):.1f} s; control is told once a second")
    assert ask(pool).status_code == 200


def test_slow_readers_hold_up_nobody_and_cost_the_gateway_little(pool: Running) -> None:
    """S12: twenty clients that read nothing of long streams."""
    alone, (gateway, *_) = latencies_s(pool), gateways(pool)
    body = chat(max_tokens=900, ignore_eos=True, stream=True, logprobs=True, top_logprobs=20)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    before_mb = gateway.memory_info().rss / MiB
    with contextlib.ExitStack() as readers:
        for _ in range(20):
            reader = readers.enter_context(socket.socket())
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.connect((pool.config.gateway.host, pool.config.gateway.port))
            reader.sendall(head + body)
        time.sleep(2)
        beside, grown_mb = latencies_s(pool), gateway.memory_info().rss / MiB - before_mb
    print(
        f"median {statistics.median(alone):.3f} s alone, {statistics.median(beside):.3f} s beside; the gateway grew by {grown_mb:.0f} MB"
    )
    assert grown_mb < 40 and beside[-1] < 5


def test_headers_that_never_end_hold_up_nobody_and_are_cut(pool: Running) -> None:
    """S13 with a thousand connections; they are to be cut after ten seconds."""
    sent = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-Slow: "
    alone = latencies_s(pool)
    with contextlib.ExitStack() as crowd:
        peers = [
            crowd.enter_context(socket.create_connection((pool.config.gateway.host, pool.config.gateway.port)))
            for _ in range(1_000)
        ]
        began_s = time.monotonic()
        for peer in peers:
            peer.sendall(sent)
        beside = latencies_s(pool)
        for peer in peers:
            peer.settimeout(max(0.1, began_s + 13 - time.monotonic()))
            with contextlib.suppress(ConnectionError):
                while peer.recv(4096):
                    pass
        took_s = time.monotonic() - began_s
    print(f"cut after {took_s:.1f} s; median {statistics.median(alone):.3f} s alone, {statistics.median(beside):.3f} s beside")
    assert took_s < 13 and statistics.median(beside) < 2 * statistics.median(alone) + 0.05
