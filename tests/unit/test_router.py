"""Holds, waits and wakes of one gateway, and the loop that keeps its view new. Control is faked; time is not."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from cluster.types import EMPTY_VIEW, ColdStage, ColdStart, FleetState, Generation, ReplicaState, VersionId, View
from deployments.gateway import wake
from deployments.routing import refresh as refreshing
from deployments.routing import router as routing
from deployments.routing.engine_routes import ENGINE_ROUTES
from deployments.routing.refresh import Refresh
from deployments.routing.router import Router
from deployments.routing.table import Table, Target

ONE, TWO = VersionId("m", 1), VersionId("m", 2)
FLEET = FleetState("m", "m", ("m@1", "m@2"), "fleet-m")
COMPLETIONS = ENGINE_ROUTES["/v1/completions"]


def view(revision: int, stable: VersionId = ONE, *held: str) -> View:
    move = Generation(alias="m", generation=revision, stable=stable, reason="", author="", time_s=0)
    replicas = (ReplicaState("a", "", "", "m@1", dict.fromkeys(held, "d"), {}, 0, app="fleet-m"),) if held else ()
    return View(revision, {"m": move}, replicas, {"m": FLEET})


async def nobody(fleet: FleetState) -> None:
    pass


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 10))


def test_a_request_for_an_alias_under_move_waits_for_the_move() -> None:
    async def test() -> None:
        router = Router(Table(), nobody)
        await router.adopt(view(1, ONE, "m@1", "m@2"))
        router.prepare(["m"], 2)
        asking = asyncio.create_task(router.resolve("m", "", COMPLETIONS))
        pinned = await router.resolve("m@1", "", COMPLETIONS)
        await asyncio.sleep(0.02)
        assert pinned.version == ONE and not asking.done()
        await router.adopt(view(2, TWO, "m@1", "m@2"))
        assert (await asking).version == TWO and router.moving == {}

    run(test)


def test_a_hold_that_its_own_view_has_overtaken_holds_nobody() -> None:
    async def test() -> None:
        router = Router(Table(), nobody)
        await router.adopt(view(2, TWO, "m@2"))
        router.prepare(["m"], 2)
        assert (await asyncio.wait_for(router.resolve("m", "", COMPLETIONS), 1)).version == TWO

    run(test)


def test_a_move_that_never_comes_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        monkeypatch.setattr(routing, "HOLD_TIMEOUT_S", 0.05)
        router = Router(Table(), nobody)
        await router.adopt(view(1, ONE, "m@1"))
        router.prepare(["m"], 2)
        assert (await router.resolve("m", "", COMPLETIONS)).version == ONE and router.moving == {}

    run(test)


def test_an_alias_wakes_its_own_fleet_while_another_answers() -> None:
    """A fleet that slept stayed asleep for as long as another with the same weights ran."""

    async def test() -> None:
        woken: list[str] = []

        async def wake(fleet: FleetState) -> None:
            woken.append(fleet.name)

        router = Router(Table(), wake)
        twin = FLEET._replace(name="twin", app="fleet-twin")
        await router.adopt(view(1, ONE, "m@1")._replace(fleets={"m": FLEET, "twin": twin}, alias_fleets={"m": "twin"}))
        assert (await router.resolve("m", "", COMPLETIONS)).version == ONE
        await asyncio.sleep(0)
        assert woken == ["twin"]
        await router.adopt(view(2, ONE, "m@1")._replace(fleets={"m": FLEET, "twin": twin}, alias_fleets={"m": "m"}))
        await router.resolve("m", "", COMPLETIONS)
        await asyncio.sleep(0)
        assert woken == ["twin"]

    run(test)


def test_a_fleet_is_woken_once_however_many_ask() -> None:
    async def test() -> None:
        woken: list[str] = []

        async def wake(fleet: FleetState) -> None:
            woken.append(fleet.name)
            await asyncio.sleep(0.05)

        router = Router(Table(), wake)
        await router.adopt(view(1))
        assert router.wake(Target(ONE, None)) == FLEET and router.wake(Target(TWO, None)) == FLEET
        await asyncio.sleep(0.1)
        assert woken == ["m"]
        router.wake(Target(ONE, None))
        await asyncio.sleep(0)
        assert woken == ["m", "m"], "it did not come: again"
        await router.adopt(view(2, ONE, "m@1"))
        assert router.wake(Target(ONE, None)) is None

    run(test)


class Method:
    """A method of an actor's handle."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    async def remote(self, *arguments: Any) -> Any:
        return self.call(*arguments)


class Control:
    """A control actor that fails for as long as it is told to."""

    def __init__(self) -> None:
        self.now = view(1)
        self.failures: list[Exception] = []
        self.configure = Method(lambda configuration: None)
        self.view = Method(self._view)
        self.stage = Method(lambda fleet: ColdStart(ColdStage.STARTING, f"A replica of {fleet} starts."))

    def _view(self, known: int) -> View | None:
        if self.failures:
            raise self.failures.pop(0)
        return self.now if self.now.revision > known else None


def test_no_error_of_control_ends_the_refresh(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """An exception while control was being replaced ended it for good, and nothing told."""

    async def test() -> None:
        monkeypatch.setattr(refreshing, "REFRESH_S", 0.01)
        control, connected = Control(), list[int]()

        def connect() -> Control:
            connected.append(1)
            if len(connected) in (2, 3):
                raise ConnectionError("Ray's head is away")
            return control

        router = Router(Table(), nobody)
        assert router.table.view is EMPTY_VIEW
        refresh = Refresh(router, connect)
        await refresh.start({})
        assert router.table.view.revision == 1
        control.failures = [RuntimeError("restarting"), ValueError("an answer that cannot be read")]
        control.now = view(5, TWO, "m@2")
        while router.table.view.revision < 5:
            refresh.check()
            await asyncio.sleep(0.01)
        assert len(connected) >= 4 and refresh.failed_since_s is None
        assert (await refresh.stage("m")).words == "A replica of m starts."
        refresh.stop()
        await asyncio.sleep(0.01)
        with pytest.raises(RuntimeError, match="refresh"):
            refresh.check()

    run(test)
    assert [record.message for record in caplog.records if "does not answer" in record.message] == [
        "control does not answer, the known view goes on: RuntimeError: restarting"
    ], "once, however long it takes"


def test_a_control_that_cannot_be_reached_holds_up_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was looked for by a call that blocked the event loop, and every stream with it."""
    import time

    async def test() -> None:
        monkeypatch.setattr(refreshing, "REFRESH_S", 0.01)
        control = Control()
        refresh = Refresh(Router(Table(), nobody), lambda: time.sleep(0.3) or control)
        await refresh.start({})
        control.failures = [RuntimeError("away")]
        longest = 0.0
        for _ in range(40):
            began_s = time.monotonic()
            await asyncio.sleep(0.01)
            longest = max(longest, time.monotonic() - began_s)
        refresh.stop()
        assert longest < 0.25

    run(test)


def test_looking_a_fleet_up_holds_up_no_stream() -> None:
    """Serve asks its controller for the handle and waits. In the event loop every stream of every fleet waited with it."""

    async def test() -> None:
        woken, loop_goes_on = list[str](), threading.Event()

        class Handle:
            wake = Method(lambda: woken.append("once"))

        def find(app: str) -> Handle:
            assert app == FLEET.app and loop_goes_on.wait(5)
            return Handle()

        waking = asyncio.create_task(wake(find, FLEET, 60))
        await asyncio.sleep(0.02)
        assert woken == [] and not waking.done()
        loop_goes_on.set()
        await waking
        assert woken == ["once"]

    run(test)


def test_a_fleet_that_serve_does_not_find_in_time_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        over = threading.Event()
        await wake(lambda app: over.wait(5), FLEET, 0.02)
        over.set()

    run(test)
    assert [record.message for record in caplog.records] == ["no replica of m was started: "]


def test_a_control_that_takes_no_configuration_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """The refresh used to wait for it for ever, and the gateway looked well."""

    async def test() -> None:
        monkeypatch.setattr(refreshing, "REFRESH_S", 0.01)
        monkeypatch.setattr(refreshing, "ANSWER_TIMEOUT_S", 0.1)
        control = Control()
        refresh = Refresh(Router(Table(), nobody), lambda: control)
        await refresh.start({})

        async def stuck() -> None:
            calls.append(1)
            if len(calls) == 1:
                await asyncio.sleep(60)

        calls: list[int] = []
        control.configure = Method(lambda _: None)
        control.configure.remote = lambda *_: stuck()  # type: ignore[method-assign]
        control.failures.append(RuntimeError("restarting"))
        control.now = view(5, TWO, "m@2")
        while refresh.router.table.view.revision < 5:
            await asyncio.sleep(0.01)
        assert len(calls) == 2
        refresh.stop()

    run(test)
    with pytest.raises(TimeoutError):
        run(starting_with_a_stuck_control(monkeypatch))


def starting_with_a_stuck_control(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Coroutine[Any, Any, None]]:
    async def test() -> None:
        monkeypatch.setattr(refreshing, "ANSWER_TIMEOUT_S", 0.1)
        control = Control()
        control.configure.remote = lambda *_: asyncio.sleep(60)  # type: ignore[method-assign]
        async with asyncio.timeout(5) as limit:
            try:
                await Refresh(Router(Table(), nobody), lambda: control).start({})
            except TimeoutError:
                assert not limit.expired(), "it was given up by itself"
                raise

    return test
