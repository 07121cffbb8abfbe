"""What `deployments.uvicorn_patches` relies on in uvicorn: that pieces of a body may be written to the connection between ASGI's messages."""

import asyncio
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

import httpx
import uvicorn

from deployments.http import Receive, Scope, Send
from deployments.uvicorn_patches import KEY, ClientConnection, connection_of, ended_when_left, expose_connections
from tests.conftest import free_ports

START: dict[str, Any] = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
App = Callable[[Scope, Receive, Send], Awaitable[None]]


def test_this_is_the_uvicorn_that_the_patch_was_written_for() -> None:
    assert version("uvicorn") == "0.54.0", "read httptools_impl.py of this one, and then change the number"


@asynccontextmanager
async def served(app: App, **settings: Any) -> AsyncGenerator[int]:
    """The port of an application under a real uvicorn with the patch, as Serve's ingress is."""
    expose_connections()
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()  # a client may come before the server does
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", **settings))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await serving


def found(scope: Scope) -> ClientConnection:
    connection = connection_of(scope)
    assert connection is not None
    return connection


def test_pieces_written_to_the_connection_are_the_body_of_the_answer() -> None:
    seen: list[bool] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        connection = found(scope)
        seen.append(connection.streams)
        await send(START)
        seen.append(connection.streams)
        if scope["method"] != "HEAD":
            for piece in (b"a", b"bc" * 5000):
                connection.write(piece)
        await send({"type": "http.response.body", "body": b"d"})
        seen.append(connection.streams)

    async def run() -> None:
        async with served(app) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            for _ in range(2):  # the second over the same connection
                answer = await client.get("/")
                assert answer.text == "a" + "bc" * 5000 + "d" and answer.headers["transfer-encoding"] == "chunked"
            assert (await client.head("/")).text == ""

    asyncio.run(run())
    assert seen == [False, True, False] * 2 + [False, False, False]


def test_a_client_that_reads_slowly_is_waited_for_and_one_that_leaves_is_not() -> None:
    full: list[bool] = []
    drained = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        connection = found(scope)
        await send(START)
        while not connection.full:
            connection.write(b"x" * 65536)
        full.append(True)
        await connection.drain()
        drained.set()
        connection.write(b"y")  # it has left: nothing happens

    async def run() -> None:
        async with served(app) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
            writer.write(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
            await reader.readline()
            await asyncio.sleep(0.2)
            assert full and not drained.is_set()
            writer.transport.abort()
            await asyncio.wait_for(drained.wait(), 5)

    asyncio.run(run())


def test_a_request_ends_when_its_client_leaves_and_nothing_else_does() -> None:
    """Also where Serve was told not to look: `x-request-disconnect-disabled: ?1` let anybody keep an engine busy for nobody."""
    ended: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        with ended_when_left(scope):
            try:
                await send(START)
                await send({"type": "http.response.body", "body": b"x", "more_body": True})
                await asyncio.sleep(60 if path == "/endless" else 0.3)
            except asyncio.CancelledError:
                ended.append(path)
                raise
            await send({"type": "http.response.body"})
            await asyncio.sleep(0.2)  # the client has its answer and may leave: what follows it is not cancelled
        ended.append(f"{path} after its answer")

    async def asked(port: int, path: str) -> asyncio.StreamWriter:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"GET {path} HTTP/1.1\r\nhost: a\r\n\r\n".encode())
        await reader.readuntil(b"x\r\n")
        if path == "/short":
            await reader.readuntil(b"0\r\n\r\n")
        return writer

    async def run() -> None:
        async with served(app) as port:
            endless, short = await asyncio.gather(asked(port, "/endless"), asked(port, "/short"))
            short.transport.abort()
            await asyncio.sleep(0.3)
            assert ended == ["/short after its answer"]
            endless.transport.abort()
            await asyncio.sleep(0.1)

    asyncio.run(run())
    assert ended == ["/short after its answer", "/endless", "/endless after its answer"]


def test_a_client_that_leaves_after_a_long_body_is_noticed() -> None:
    """uvicorn stops reading once 64 KiB of a body wait, and nobody asks for more after the last piece."""
    ended = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        with ended_when_left(scope):
            try:
                while (await receive()).get("more_body"):
                    pass
                await asyncio.sleep(60)
            finally:
                ended.set()

    async def run() -> None:
        async with served(app) as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 101000\r\n\r\n" + b"a" * 1000)
            await asyncio.sleep(0.1)
            writer.write(b"b" * 100_000)
            await asyncio.sleep(0.2)
            writer.close()
            await asyncio.wait_for(ended.wait(), 2)

    asyncio.run(run())


def test_a_request_that_somebody_else_ends_is_not_taken_for_one_whose_client_left() -> None:
    async def ends(scope: Scope) -> None:
        with ended_when_left(scope):
            await asyncio.sleep(60)

    class Connected:
        left = False

        def when_left(self, tell: Any) -> None:
            pass

    async def run() -> None:
        task = asyncio.create_task(ends({KEY: Connected()}))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    asyncio.run(run())


def test_another_server_has_no_such_connection() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({**START, "status": 200 if connection_of(scope) is None else 500})
        await send({"type": "http.response.body"})

    async def run() -> None:
        async with served(app, http="h11") as port, httpx.AsyncClient() as client:
            assert (await client.get(f"http://127.0.0.1:{port}/")).status_code == 200

    asyncio.run(run())


def test_serves_own_server_hands_the_connection_through_its_middleware() -> None:
    """Without it a stream would go by ASGI in silence, at three times the cost."""
    from ray.serve._private.http_util import start_asgi_http_server
    from ray.serve.config import HTTPOptions

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        connection = found(scope)
        await send(START)
        assert connection.streams
        connection.write(b"a")
        await send({"type": "http.response.body"})

    async def run() -> None:
        expose_connections()
        (port,) = free_ports(1)
        options = HTTPOptions(host="127.0.0.1", port=port)
        serving, server = await start_asgi_http_server(app, options, event_loop=asyncio.get_running_loop())
        try:
            async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(retries=5)) as client:
                answer = await client.get(f"http://127.0.0.1:{port}/")
            assert (answer.text, bool(answer.headers["x-request-id"])) == ("a", True)
        finally:
            server.should_exit = True
            await serving

    asyncio.run(run())
