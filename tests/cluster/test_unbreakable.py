"""No request ends an engine, none is answered by a 500, and none holds the others up. The last tests of the shared pool: they load adapters."""

import asyncio
import contextlib
import json
import resource
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator

import aiohttp
import httpx
import psutil
import pytest

from cluster import client
from cluster.config import Config
from cluster.pool import graph
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
    """The same few hundred each time, of which 135 were answered. `python -m tests.fuzz` sends others."""
    with unharmed(pool):
        figures = fuzz.fuzz_alike(pool.url, models, 320)
    print(figures)
    assert figures.faults == [] and figures.statuses[200] > 100, "\n\n".join(figures.faults)


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_thousands_of_requests_end_no_engine_and_leave_its_memory_alone(pool: Running, models: list[str]) -> None:
    """The first third fills caches: of compiled grammars, prefixes and templates."""
    figures = fuzz.Figures()
    with unharmed(pool):
        before = processes(pool)
        fuzz.fuzz(pool.url, models, 2_700, figures)
        warm = fuzz.memory(before)
        fuzz.fuzz(pool.url, models, 5_300, figures)
        after = fuzz.memory(before)
    print(figures, f"the engines' memory: {warm} after a third, {after} in the end: {fuzz.grown(warm, after):+.1%}", sep="\n")
    assert figures.faults == [], "\n\n".join(figures.faults)
    assert fuzz.grown(warm, after) < 0.05


# what abuses an API: the fault list, 3.5

HI = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


def chat(**of: object) -> bytes:
    return json.dumps({"model": "seedling", **HI, **of}).encode()


def schema(one: object) -> dict[str, object]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": one}}


def named(count: int, one: dict[str, object], **more: object) -> dict[str, object]:
    return {"type": "object", "properties": {f"p{n}": one for n in range(count)}, **more}


def doubled(levels: int) -> dict[str, object]:
    one: dict[str, object] = {"type": "string"}
    for _ in range(levels):
        one = {"anyOf": [one, {"type": "array", "items": one}]}
    return one


def chained(count: int) -> dict[str, object]:
    """Each refers to another, and all to each other."""
    refer = [{"$ref": f"#/$defs/d{n}"} for n in range(count)]
    links = {f"d{n}": {"anyOf": [refer[n - 1], {"type": "array", "items": refer[n]}, {"type": "null"}]} for n in range(count)}
    return {"$defs": links, "$ref": "#/$defs/d0"}


def opened(pool: Running) -> socket.socket:
    return socket.create_connection((pool.config.gateway.host, pool.config.gateway.port), timeout=30)


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
    "a grammar of many words": (chat(structured_outputs={"grammar": "root ::= " + " | ".join(f'"word {n}"' for n in range(3_000))}), {200}),
    "a grammar of itself": (chat(structured_outputs={"grammar": "root ::= root"}), {200, 400}),
    "a schema of many properties of which some are needed": (chat(response_format=schema(named(500, {"type": "string"}, minProperties=200))), {400}),
    "a schema of a thousand addresses": (chat(response_format=schema(named(1_000, {"type": "string", "format": "uri"}))), {400}),
    "a schema that doubles nine times": (chat(response_format=schema(doubled(9))), {200}),
    "a schema of references to references": (chat(response_format=schema(chained(200))), {200}),
    "a schema of itself": (chat(response_format=schema({"$ref": "#"})), {200, 400}),
    "a large enum": (chat(response_format=schema({"enum": [f"v{n}" for n in range(5_000)]})), {200}),
    "a pattern of 255 characters": (chat(response_format=schema({"type": "string", "pattern": "^[a-z]{1,255}$"})), {200}),
    "a hundred optional characters as a pattern": (chat(response_format=schema({"type": "string", "pattern": f"^{'[a-z]?' * 100}$"})), {400}),
    "a hundred optional characters as a regex": (chat(structured_outputs={"regex": "[a-z]?" * 100}), {400}),
    "a hundred optional characters as a grammar": (chat(structured_outputs={"grammar": "root ::= " + "[a-z]? " * 100}), {400}),
    "a hundred characters or nothing as a regex": (chat(structured_outputs={"regex": "([a-z]|)" * 100}), {400}),
    "a hundred characters or nothing as a grammar": (chat(structured_outputs={"grammar": "root ::= " + '([a-z] | "") ' * 100}), {400}),
    "a text of 255 characters": (chat(response_format=schema({"type": "string", "maxLength": 255})), {200}),
    "a regex of 255 characters": (chat(structured_outputs={"regex": "[a-z]{1,255}"}), {200}),
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
        "x-request-disconnect-disabled": "?0",
        "host": "evil.example",
    }
    answer = httpx.post(f"{pool.url}/v1/chat/completions", content=chat(), headers=forged, timeout=60)
    assert (answer.status_code, answer.headers["x-model-version"]) == (200, "seedling@1")


@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/json; charset=utf-16",
    ],
)
def test_the_body_counts_and_not_what_its_type_is_called(pool: Running, content_type: str) -> None:
    answer = httpx.post(f"{pool.url}/v1/chat/completions", content=chat(), headers={"content-type": content_type}, timeout=60)
    assert answer.status_code == 200


def test_a_hundred_megabytes_are_refused_before_they_come(pool: Running) -> None:
    began_s = time.monotonic()
    with opened(pool) as peer:
        peer.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 104857600\r\n\r\n" + b"{" * 65536)
        assert peer.recv(4096).startswith(b"HTTP/1.1 413 ")
    assert time.monotonic() - began_s < 8


def test_a_page_of_another_site_reaches_neither_ray_nor_the_admin_routes(pool: Running) -> None:
    """DNS rebinding (CVE-2025-62593): a browser is made to call 127.0.0.1 under a name of the attacker's. It has no token."""
    headers = {"host": "evil.example", "origin": "http://evil.example", "user-agent": "Mozilla/5.0"}
    for method, url in (
        ("POST", f"{pool.pool.dashboard}/api/jobs/"),
        ("GET", f"{pool.pool.dashboard}/api/version"),
        ("GET", f"{pool.url}/admin/status"),
    ):
        assert httpx.request(method, url, headers=headers, json={"entrypoint": "true"}).status_code in (401, 403, 405), url


SMUGGLED = [
    b"POST /v1/models HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    b"GET /admin/status HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /v1/models HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\nContent-Length: 0\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n{}\r\n0\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
]


@pytest.mark.parametrize("raw", SMUGGLED)
def test_no_second_request_is_smuggled_in_one_and_bad_lengths_are_refused(pool: Running, raw: bytes) -> None:
    with opened(pool) as peer:
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
    heavy += [chat(response_format=schema(named(count, {})), max_tokens=1) for count in (700, 800, 900)]
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
    """Twice fifty, whose prompts fill nearly all of the KV cache. Were it not freed, the second fifty and the last client would wait."""

    def body(wave: int, number: int) -> dict[str, object]:
        prompt = [5 + (wave * 53 + number * 7 + place) % 300 for place in range(600)]  # no prefix in common
        return {"model": "seedling", "prompt": prompt, "max_tokens": 400, "ignore_eos": True, "stream": True}

    async def leave(wave: int) -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            posts = (session.post(f"{pool.url}/v1/completions", json=body(wave, number)) for number in range(50))
            answers = await asyncio.gather(*posts)
            assert all(await asyncio.gather(*(answer.content.readany() for answer in answers))), "each is being answered"
            for answer in answers:
                answer.close()

    for wave in range(2):
        asyncio.run(leave(wave))
        began_s = time.monotonic()
        assert ask(pool, max_tokens=2).status_code == 200
        print(f"the next client was answered after {(took_s := time.monotonic() - began_s):.2f} s")
        assert took_s < 1
    running = lambda: sum(replica["running"] for replica in client.of(pool.config).status()["replicas"])  # noqa: E731
    print(f"free after {when(lambda: running() == 0, 3):.1f} s; control is told once a second")


def test_a_client_that_leaves_after_a_long_body_frees_the_engine_before_a_whole_answer_is_done(pool: Running) -> None:
    """Where a stream's next token finds nobody, a whole answer would be finished for nobody."""
    running = lambda: sum(replica["running"] for replica in client.of(pool.config).status()["replicas"])  # noqa: E731
    body = chat(max_tokens=900, ignore_eos=True, n=8) + b" " * 500_000
    with opened(pool) as peer:
        peer.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        when(lambda: running() > 0, 5)
    print(f"free after {when(lambda: running() == 0, 2.5):.1f} s; control is told once a second")


@contextlib.contextmanager
def readers(pool: Running, count: int, reads: bool) -> Iterator[None]:
    """Clients of long streams, who read them or read nothing at all."""
    body = chat(max_tokens=900, ignore_eos=True, stream=True, logprobs=True, top_logprobs=20)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with contextlib.ExitStack() as crowd:
        for _ in range(count):
            reader = crowd.enter_context(socket.socket())
            if not reads:
                reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.connect((pool.config.gateway.host, pool.config.gateway.port))
            reader.sendall(head + body)
            if reads:
                threading.Thread(target=drained, args=(reader,), daemon=True).start()
        yield


def drained(peer: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while peer.recv(1 << 16):
            pass


@pytest.mark.chaos
def test_clients_that_read_nothing_cost_others_no_more_than_clients_that_read(pool: Running) -> None:
    """Twenty long streams. What they take of others is the engine's work, which is the same for both. By turns: the machine has other work.

    What the gateway does wrong it does wrong in every turn, and the machine's other work slows some turns: so the quickest turn beside clients
    that read nothing is held against the slowest beside clients that read. The longest answer is printed and has no bar: beside either, a process
    that asks may itself wait seconds for a processor (its schedstat).
    """
    alone, (gateway, *_) = latencies_s(pool), gateways(pool)
    beside: dict[bool, list[list[float]]] = {True: [], False: []}
    grown_mb, before_mb = 0.0, gateway.memory_info().rss / MiB
    for reads in (True, False, True, False):
        with readers(pool, 20, reads):
            time.sleep(1)
            beside[reads].append(latencies_s(pool, 10))
            grown_mb = max(grown_mb, gateway.memory_info().rss / MiB - before_mb)
        when(lambda: sum(one["running"] for one in client.of(pool.config).status()["replicas"]) == 0, 5)
    medians = {reads: sorted(statistics.median(turn) for turn in turns) for reads, turns in beside.items()}
    print(
        f"median {statistics.median(alone):.3f} s alone, {medians[True]} s beside twenty that read, {medians[False]} s beside twenty that do not"
        f" (longest {max(map(max, beside[True])):.2f} and {max(map(max, beside[False])):.2f} s); the gateway grew by {grown_mb:.0f} MB"
    )
    assert grown_mb < 40 and medians[False][0] < 1.3 * medians[True][-1] + 0.1


CROWD = 2_000


@pytest.fixture
def many_files() -> Iterator[None]:
    """This process may open as many as two thousand connections need."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], min(before[1], 2 * CROWD)), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


HALF_SENT = {
    "headers": b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-Slow: ",
    "bodies": b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{",
}


@pytest.mark.parametrize("what", HALF_SENT)
def test_requests_that_never_end_hold_up_nobody_and_are_cut(pool: Running, many_files: None, what: str) -> None:
    """Two thousand connections, which are to be cut after ten seconds."""
    alone = latencies_s(pool)
    with contextlib.ExitStack() as crowd:
        peers = [crowd.enter_context(opened(pool)) for _ in range(CROWD)]
        began_s = time.monotonic()
        for peer in peers:
            peer.sendall(HALF_SENT[what])
        time.sleep(1)
        beside, statuses = latencies_s(pool), Counter(ended(peer, began_s + 15) for peer in peers)
        took_s = time.monotonic() - began_s
    print(
        f"{statuses} after {took_s:.1f} s; median {statistics.median(alone):.3f} s alone, {statistics.median(beside):.3f} s beside, longest"
        f" {alone[-1]:.3f} and {beside[-1]:.3f} s"
    )
    assert took_s < 13 and set(statuses) <= {b"408", b""}
    assert statistics.median(beside) < 1.1 * statistics.median(alone) + 0.01


def ended(peer: socket.socket, until_s: float) -> bytes:
    """The status that the connection ended with; empty where there was none. Fails where it does not end."""
    peer.settimeout(max(0.1, until_s - time.monotonic()))
    heard = b""
    with contextlib.suppress(ConnectionError):
        while chunk := peer.recv(4096):
            heard += chunk
    return heard[9:12]


@contextlib.contextmanager
def impatient(pool: Running, **seconds: float) -> Iterator[None]:
    """The pool with another gateway, which waits for less long."""

    def deploy(config: Config) -> None:
        graph.deploy(config)
        when(lambda: ask(pool, max_tokens=1).status_code == 200, 30)

    deploy(pool.config.model_copy(update={"gateway": pool.config.gateway.model_copy(update=seconds)}))
    try:
        yield
    finally:
        deploy(pool.config)


@pytest.mark.chaos
def test_an_answer_that_takes_too_long_is_a_504_and_the_engine_ends_it(pool: Running) -> None:
    """Half a second for an answer of nine hundred tokens."""
    took_s = 0.0
    with impatient(pool, answer_timeout_s=0.5):
        for _ in range(3):
            began_s = time.monotonic()
            answer = ask(pool, max_tokens=900, ignore_eos=True)
            took_s = time.monotonic() - began_s
            assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout") and took_s < 2
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        free_s = when(lambda: sum(one["running"] for one in client.of(pool.config).status()["replicas"]) == 0, 3)
        print(f"504 after {took_s:.1f} s; the engine is free {free_s:.1f} s later")
