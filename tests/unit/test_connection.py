"""HTTP/1.1 to a replica, over real sockets. What a replica may do wrong is in test_upstream."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import pytest
import uvloop

from deployments.routing.connection import Connection, ConnectionLost, Connections, NeverConnected

Writer = asyncio.StreamWriter
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: Text/Event-Stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


Result = TypeVar("Result")


def run_on_both(make: Callable[[], Coroutine[Any, Any, Result]]) -> list[Result]:
    """On asyncio's own loop, and on uvloop, as Ray has it in an actor: their transports differ."""
    results: list[Result] = []
    for factory in (asyncio.new_event_loop, uvloop.new_event_loop):
        with asyncio.Runner(loop_factory=factory) as runner:
            results.append(runner.run(make()))
    return results


def chunk(piece: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(piece), piece)


@asynccontextmanager
async def replica(*answers: Callable[[Writer], object]) -> AsyncGenerator[tuple[str, list[int]]]:
    """A server that answers each request in turn; yields its URL and, of each connection, how many requests it carried."""
    carried: list[int] = []
    todo = iter(answers)

    async def serve(reader: asyncio.StreamReader, writer: Writer) -> None:
        mine = len(carried)
        carried.append(0)
        while head := await reader.read(65536):
            assert head.startswith(b"POST /v1/x HTTP/1.1\r\n")
            carried[mine] += 1
            done = next(todo)(writer)
            if asyncio.iscoroutine(done):
                await done
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", carried


def says(*pieces: bytes) -> Callable[[Writer], None]:
    return lambda writer: writer.write(b"".join(pieces))


async def ask(connections: Connections, url: str, read: Callable[[Connection], object] | None = None) -> bytes:
    async with connections.to(url) as connection:
        connection.ask("/v1/x", {"a": "b"}, b"{}")
        await connection.head()
        return await connection.body()


def test_one_connection_carries_one_request_after_the_other() -> None:
    async def run() -> None:
        answer = says(HEAD, chunk(b"a"), chunk(b"b"), END)
        async with replica(answer, answer, answer) as (url, carried):
            connections = Connections()
            assert [await ask(connections, url) for _ in range(3)] == [b"ab"] * 3 and carried == [3]
            connections.close()

    run_on_both(run)


def test_requests_at_once_have_a_connection_each() -> None:
    async def run() -> None:
        answer = says(HEAD, chunk(b"a"), END)
        async with replica(*[answer] * 4) as (url, carried):
            connections = Connections()
            assert await asyncio.gather(*(ask(connections, url) for _ in range(4))) == [b"a"] * 4 and carried == [1] * 4
            connections.close()

    run_on_both(run)


def test_what_a_replica_closed_is_not_used_again() -> None:
    """Neither after it said so, nor after it did so while nothing was asked."""

    def closes(writer: Writer) -> None:
        writer.write(HEAD + chunk(b"a") + END)
        writer.close()

    async def run() -> None:
        bye = says(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 1\r\n\r\nc")
        async with replica(closes, bye, says(HEAD, chunk(b"d"), END)) as (url, carried):
            connections = Connections()
            assert await ask(connections, url) == b"a"
            await asyncio.sleep(0.05)
            assert [await ask(connections, url) for _ in range(2)] == [b"c", b"d"] and carried == [1, 1, 1]
            connections.close()

    run_on_both(run)


@pytest.mark.parametrize("answer", [b"", HEAD[:20], HEAD + b"5\r\nab", b"no HTTP\r\n\r\n", HEAD + b"zz\r\n"])
def test_an_answer_that_is_not_whole_or_no_http_is_a_lost_connection(answer: bytes) -> None:
    def breaks(writer: Writer) -> None:
        writer.write(answer)
        writer.close()

    async def run() -> None:
        async with replica(breaks) as (url, _):
            with pytest.raises(ConnectionLost) as caught:
                await ask(Connections(), url)
            assert not isinstance(caught.value, NeverConnected)
        with pytest.raises(NeverConnected):
            await ask(Connections(), url)

    run_on_both(run)


def test_a_request_that_is_given_up_closes_its_connection() -> None:
    """vLLM ends a generation whose client has left."""
    left: list[bool] = []

    async def waits(writer: Writer) -> None:
        writer.write(HEAD)
        for _ in range(100):
            writer.write(chunk(b"a"))
            await asyncio.sleep(0.01)
            if writer.transport.is_closing():
                return left.append(True)

    async def run() -> None:
        async with replica(waits) as (url, _):
            async with Connections().to(url) as connection:
                connection.ask("/v1/x", {}, b"{}")
                assert (await connection.peek()).startswith(b"a")
            await asyncio.sleep(0.1)

    run_on_both(run)
    assert left == [True, True]


async def relayed(
    answer: Callable[[Writer], object], take: Callable[[bytes], bool], drain_s: float = 0, idle_s: float = 5
) -> int:
    """How often the client was waited for."""
    drained: list[None] = []

    async def drain() -> None:
        drained.append(None)
        await asyncio.sleep(drain_s)

    async with replica(answer) as (url, _), Connections().to(url) as connection:
        connection.ask("/v1/x", {}, b"{}")
        await connection.head()
        await connection.relay(take, drain, idle_s)
        assert connection.reusable
    return len(drained)


async def never() -> None:
    await asyncio.Event().wait()


async def dribbles(writer: Writer) -> None:
    writer.write(HEAD)
    for n in range(20):
        writer.write(chunk(b"%02d" % n))
        await asyncio.sleep(0.01)
    writer.write(END)


@pytest.mark.parametrize("waits", [False, True])
def test_every_piece_is_handed_on_in_order_whether_the_client_is_fast_or_slow(waits: bool) -> None:
    got: list[bytes] = []

    def take(piece: bytes) -> bool:
        got.append(piece)
        return waits

    drained = run_on_both(lambda: relayed(dribbles, take, drain_s=0.03))
    assert b"".join(got) == b"".join(b"%02d" % n for n in range(20)) * 2
    assert sum(drained) == (len(got) if waits else 0)
    if waits:
        assert len(got) < 40, "what comes while the client is waited for comes together"


def test_what_goes_wrong_with_a_piece_is_raised_where_the_stream_is_relayed() -> None:
    def take(piece: bytes) -> bool:
        raise ValueError(piece.decode())

    with pytest.raises(ValueError, match="00"):
        run_on_both(lambda: relayed(dribbles, take))


def test_a_stream_that_stands_still_is_given_up_and_a_slow_client_is_no_such_stream() -> None:
    async def stops(writer: Writer) -> None:
        writer.write(HEAD + chunk(b"a"))
        await asyncio.sleep(0.4)
        writer.write(chunk(b"b") + END)

    with pytest.raises(TimeoutError):
        run_on_both(lambda: relayed(stops, lambda _: False, idle_s=0.1))
    assert min(run_on_both(lambda: relayed(dribbles, lambda _: True, drain_s=0.3, idle_s=0.2))) >= 1


def test_a_connection_whose_client_left_while_it_stood_still_is_not_used_again() -> None:
    """The last piece and the end came in one read, and filled the client. The next request over the connection was sent and never read."""

    async def run() -> None:
        answer = says(HEAD, chunk(b"a"), END)
        async with replica(answer, answer) as (url, carried):
            connections = Connections()

            async def first() -> None:
                async with connections.to(url) as connection:
                    connection.ask("/v1/x", {}, b"{}")
                    await connection.relay(lambda _: True, never, 5)

            task = asyncio.create_task(first())
            await asyncio.sleep(0.1)
            task.cancel()
            assert await asyncio.wait_for(ask(connections, url), 5) == b"a" and carried == [1, 1]
            connections.close()

    run_on_both(run)


@pytest.mark.parametrize("more", [HEAD + chunk(b"b") + END, b"garbage", HEAD[:10]])
@pytest.mark.parametrize("later", [False, True])
def test_what_comes_after_a_complete_answer_is_no_answer(more: bytes, later: bool) -> None:
    async def talks(writer: Writer) -> None:
        writer.write(HEAD + chunk(b"a") + END + (b"" if later else more))
        await asyncio.sleep(0.05)
        if later:
            writer.write(more)

    async def run() -> None:
        async with replica(talks, says(HEAD, chunk(b"c"), END)) as (url, carried):
            connections = Connections()
            assert await ask(connections, url) == b"a"
            await asyncio.sleep(0.1)
            assert await ask(connections, url) == b"c" and carried == [1, 1]
            connections.close()

    run_on_both(run)


def test_nothing_is_read_on_before_it_is_known_where_a_stream_goes() -> None:
    """A stream piled up while its client's headers were being written."""
    written: list[int] = []

    async def floods(writer: Writer) -> None:
        writer.write(HEAD)
        for n in range(400):
            writer.write(chunk(b"x" * 65536))
            written.append(n)
            await writer.drain()
        writer.write(END)

    async def run() -> int:
        written.clear()
        async with replica(floods) as (url, _), Connections().to(url) as connection:
            connection.ask("/v1/x", {}, b"{}")
            await connection.head()
            assert (await connection.peek()).startswith(b"x")
            await asyncio.sleep(0.2)
            before, got = len(written), list[int]()

            def take(piece: bytes) -> bool:
                got.append(len(piece))
                return False

            await connection.relay(take, never, 5)
            assert sum(got) == 400 * 65536, "what was looked at is handed on as well"
            return before

    assert max(run_on_both(run)) < 200


def test_a_replica_that_closes_at_once_was_never_asked() -> None:
    async def run() -> None:
        async with replica() as (url, _), Connections().to(url) as connection:
            connection.abort()
            await asyncio.sleep(0.01)
            with pytest.raises(NeverConnected):
                connection.ask("/v1/x", {}, b"{}")

    run_on_both(run)


def test_old_connections_that_nobody_needs_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        answer = says(HEAD, chunk(b"a"), END)
        async with replica(*[answer] * 6) as (url, carried):
            connections = Connections()
            await asyncio.gather(*(ask(connections, url) for _ in range(4)))
            monkeypatch.setattr("deployments.routing.connection.KEEP_S", 0.05)
            await asyncio.sleep(0.1)
            await ask(connections, url)
            await asyncio.sleep(0.05)
            assert len(carried) == 5 and [len(idle) for idle in connections._idle.values()] == [1]
            connections.close()
            monkeypatch.undo()

    run_on_both(run)
