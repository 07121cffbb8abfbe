"""In front of an engine: who gets in, and who is counted. Real ASGI calls, no server."""

import asyncio
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from deployments import wire
from deployments.replica.auth import AuthMiddleware
from deployments.replica.in_flight import InFlight

SECRET = "s3cret"


def scope(version: str = "m@1", secret: str = SECRET, kind: str = "http") -> dict[str, Any]:
    return {"type": kind, "headers": [(wire.SECRET.encode(), secret.encode()), (wire.VERSION.encode(), version.encode())]}


async def ask(app: Any, **of: Any) -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope(**of), None, send)
    return sent


class Slow:
    """An application that answers when it is told to."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.asked = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked += 1
        await self.go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})


def test_only_the_secret_opens_and_nothing_but_http() -> None:
    async def tried() -> tuple[list[Any], int]:
        app = Slow()
        app.go.set()
        front = AuthMiddleware(app, SECRET)
        return [(await ask(front, **of))[0] for of in ({}, {"secret": "other"}, {"secret": ""}, {"kind": "websocket"})], app.asked

    answers, asked = asyncio.run(tried())
    assert [answer.get("status") for answer in answers] == [200, wire.FORBIDDEN, wire.FORBIDDEN, None]
    assert answers[3] == {"type": "websocket.close"} and asked == 1


def test_a_closed_engine_answers_without_a_body_and_asks_nobody() -> None:
    async def tried() -> tuple[list[dict[str, Any]], int]:
        app = Slow()
        return await ask(InFlight(app, lambda _: False)), app.asked

    (start, body), asked = asyncio.run(tried())
    assert start["status"] == wire.CLOSED and wire.is_closed(start["status"], 0) and not body.get("body") and asked == 0


@given(st.lists(st.sampled_from(["m@1", "m@2", "tuned@7"]), max_size=12))
def test_requests_are_counted_by_version_while_they_run_and_not_afterwards(versions: list[str]) -> None:
    async def tried() -> None:
        app = Slow()
        in_flight = InFlight(app, lambda _: True)
        asking = [asyncio.create_task(ask(in_flight, version=version)) for version in versions]
        await asyncio.sleep(0)
        assert in_flight.running == len(versions)
        assert all(in_flight.answering[version] == versions.count(version) for version in versions)
        assert in_flight.streams(apart_from="m@1") == len([version for version in versions if version != "m@1"])
        assert set(in_flight.used_s) == set(versions)
        app.go.set()
        await asyncio.gather(*asking)
        assert in_flight.running == 0 and not in_flight.answering and not in_flight.tasks

    asyncio.run(tried())


def test_cut_ends_what_is_in_flight_and_counts_it_no_more() -> None:
    async def tried() -> int:
        in_flight = InFlight(Slow(), lambda _: True)
        asking = asyncio.create_task(ask(in_flight))
        await asyncio.sleep(0)
        in_flight.cut()
        await asyncio.wait([asking])
        assert asking.cancelled()
        return in_flight.running

    assert asyncio.run(tried()) == 0


def test_quiet_begins_anew_with_every_request_and_is_not_waited_for_for_ever() -> None:
    async def waited(limit_s: float, busy: bool) -> float:
        app = Slow()
        in_flight = InFlight(app, lambda _: True)
        asking = asyncio.create_task(ask(in_flight)) if busy else None
        loop = asyncio.get_running_loop()
        loop.call_later(0.3, app.go.set)
        began_s = loop.time()
        await in_flight.until_quiet(0.2, limit_s)
        took_s = loop.time() - began_s
        app.go.set()
        if asking is not None:
            await asking
        return took_s

    assert asyncio.run(waited(5, busy=True)) >= 0.5
    assert 0.2 <= asyncio.run(waited(5, busy=False)) < 0.5
    assert asyncio.run(waited(0.1, busy=True)) < 0.3


def test_a_version_that_leaves_waits_for_its_own_requests_only() -> None:
    async def tried() -> list[bool]:
        app = Slow()
        front = InFlight(app, lambda _: True)
        asking = [asyncio.create_task(ask(front, version=version)) for version in ("a@1", "b@1")]
        await asyncio.sleep(0)
        found = [await front.until_answered("a@1", 0.05), await front.until_answered("c@1", 0.05)]
        waiting = asyncio.create_task(front.until_answered("a@1", 5))
        asking[0].cancel()
        found.append(await waiting)
        app.go.set()
        await asyncio.gather(*asking, return_exceptions=True)
        return found

    assert asyncio.run(tried()) == [False, True, True]
