"""One request from its body to its answer: which fleet it wakes, how long it waits, and what it hears in the end. Sockets are real."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import orjson
import pytest
from aiohttp import web

from cluster.config import Gateway
from cluster.errors import ModelNotFound, Overloaded
from cluster.types import ColdStage, ColdStart, FleetState, Generation, ReplicaState, VersionId, View
from deployments.api.inference import Inference, Routing
from deployments.routing.budget import Budget
from deployments.routing.engine_routes import ENGINE_ROUTES
from deployments.routing.measure import Recorder
from deployments.routing.payload import Payload
from deployments.routing.query_of_death import Loss
from deployments.routing.refresh import Refresh
from deployments.routing.router import Router
from deployments.routing.shadow import Shadow
from deployments.routing.table import Table
from deployments.routing.upstream import Timeouts, Upstream

FLEETS = {name: FleetState(name, name, (f"{name}@1",), f"fleet-{name}") for name in "mn"}
LIMITS = Gateway(hold_timeout_s=0.2, cold_start_timeout_s=0.5, max_held=2, max_body_bytes=1024)


class Pool:
    """A gateway's parts, and one replica that says what it was asked. ``m`` and ``n`` are fleets; the alias x means what nobody hosts."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.woken: list[str] = []
        self.revision = 0
        table, recorder = Table(), Recorder()
        upstream = Upstream(table, Timeouts(5, 5, 5))
        router = Router(table, self.wake)
        self.routing = Routing(
            router,
            Refresh(router, lambda: self),
            upstream,
            recorder,
            Shadow(upstream, recorder),
            Budget(4, 4096, LIMITS.max_held),
        )
        self.routing.refresh.control = self
        self.inference = Inference(ENGINE_ROUTES["/v1/completions"], LIMITS, self.routing)

    async def wake(self, fleet: FleetState) -> None:
        self.woken.append(fleet.name)

    class stage:  # an actor's method
        @staticmethod
        async def remote(fleet: str) -> ColdStart:
            return ColdStart(ColdStage.STARTING, f"A replica of {fleet} starts.")

    async def running(self, names: str) -> None:
        """From now on these fleets have a replica each."""
        self.revision += 1
        moves = {
            name: Generation(alias=name, generation=1, stable=VersionId(name, 1), reason="", author="", time_s=0)
            for name in "mnx"
        }
        replicas = tuple(ReplicaState(f"r-{n}", self.url, "s", f"{n}@1", {f"{n}@1": "d"}, {}, 0, app=f"fleet-{n}") for n in names)
        await self.routing.router.adopt(View(self.revision, moves, replicas, FLEETS))

    async def canary(self) -> None:
        """The alias m moves from m@1 to m@2, which gets half of the requests."""
        await self.running("m")
        table = self.routing.router.table
        move = table.view.aliases["m"].model_copy(
            update={"generation": 2, "canary": VersionId("m", 2), "percent": 50, "rollout": 1}
        )
        replica = table.replicas["r-m"]._replace(held={"m@1": "d", "m@2": "d"})
        await self.routing.router.adopt(table.view._replace(revision=9, aliases={"m": move}, replicas=(replica,)))

    async def ask(self, model: str, **body: Any) -> tuple[int, dict[str, str], Any]:
        return await self.post(orjson.dumps({"model": model, **body}))

    async def post(self, raw: bytes) -> tuple[int, dict[str, str], Any]:
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": raw}

        async def send(message: Any) -> None:
            sent.append(message)

        await self.inference({"headers": []}, receive, send)
        headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return sent[0]["status"], headers, orjson.loads(b"".join(message["body"] for message in sent[1:]))


def run(test: Callable[[Pool], Coroutine[Any, Any, None]]) -> None:
    async def both() -> None:
        async def answer(request: web.Request) -> web.Response:
            body = await request.json()
            if status := body.get("answered_with"):
                return web.json_response({"error": {"message": "No.", "code": status}}, status=status)
            return web.json_response(body)

        app = web.Application()
        app.router.add_post("/v1/completions", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        pool = Pool(f"http://127.0.0.1:{runner.addresses[0][1]}")
        try:
            await asyncio.wait_for(test(pool), 10)
        finally:
            pool.routing.upstream.close()
            await runner.cleanup()
        budget = pool.routing.budget
        assert (budget.requests, budget.bytes, budget.waiting) == (0, 0, {}), "everything is given back"

    asyncio.run(both())


def test_each_model_goes_to_its_own_fleet_and_names_its_version() -> None:
    async def test(pool: Pool) -> None:
        await pool.running("mn")
        for name in "mn":
            status, headers, body = await pool.ask(name, n=1.0)
            assert (status, headers["x-model-version"], headers["x-model-generation"]) == (200, f"{name}@1", "1")
            assert body == {"model": f"{name}@1", "n": 1.0}
        assert pool.woken == []

    run(test)


def test_no_replica_of_another_fleet_is_asked_while_the_models_own_can_answer() -> None:
    """Two fleets that hosted the same weights shared each other's traffic."""

    async def test(pool: Pool) -> None:
        await pool.running("m")
        own = pool.routing.router.table.replicas["r-m"]
        others = own._replace(id="r-n", url="http://127.0.0.1:1", app="fleet-n")
        view = pool.routing.router.table.view
        await pool.routing.router.adopt(view._replace(revision=9, replicas=(own, others), alias_fleets={"m": "m"}))
        assert [(await pool.ask("m"))[0] for _ in range(12)] == [200] * 12
        assert pool.routing.router.table.suspects == {}, "the other was asked, and is not there"

    run(test)


def test_a_request_wakes_the_fleet_of_its_model_while_another_runs() -> None:
    """A fleet was woken only where no replica ran at all: beside a second one it would have slept for ever."""

    async def test(pool: Pool) -> None:
        await pool.running("m")
        asking = [asyncio.create_task(pool.ask("n")) for _ in range(2)]
        await asyncio.sleep(0.25)
        assert pool.woken[0] == "n" and set(pool.woken) == {"n"}
        assert not any(one.done() for one in asking), "a cold start takes longer than a swap of weights may"
        with pytest.raises(Overloaded):
            await pool.ask("n")
        assert (await pool.ask("m"))[0] == 200, "who waits for another fleet takes no place here"
        await pool.running("mn")
        assert [(await one)[0] for one in asking] == [200, 200]

    run(test)


def test_who_has_waited_too_long_hears_how_far_the_replica_is() -> None:
    async def test(pool: Pool) -> None:
        await pool.running("m")
        status, headers, body = await pool.ask("n@1")
        assert (status, headers["retry-after"], headers["x-model-version"]) == (503, "5", "n@1")
        assert "A replica of n starts." in body["error"]["message"]

    run(test)


@pytest.mark.parametrize(("model", "words"), [("x", "no fleet hosts"), ("n@99", "no fleet answers"), ("gpt-4", "does not exist")])
def test_what_nobody_can_answer_is_refused_at_once_and_wakes_nobody(model: str, words: str) -> None:
    """`n@99` woke a fleet that sleeps; an alias of another base waited for 30 s."""

    async def test(pool: Pool) -> None:
        await pool.running("")
        with pytest.raises(ModelNotFound, match=words):
            await asyncio.wait_for(pool.ask(model), 0.15)
        assert pool.woken == []

    run(test)


def test_the_bodies_that_wait_are_bounded() -> None:
    """Nothing bounded them."""

    async def test(pool: Pool) -> None:
        await pool.running("m")
        asking = [asyncio.create_task(pool.ask("n", prompt="x" * 900)) for _ in range(2)]
        await asyncio.sleep(0.05)
        held = pool.routing.budget.bytes
        assert 1800 < held < 2048, "as they are sent, and nothing beside it"
        pool.routing.budget.max_bytes = held + 100
        with pytest.raises(Overloaded, match="MiB"):
            await pool.ask("m", prompt="x" * 500)
        assert (await pool.ask("m"))[0] == 200
        await pool.running("mn")
        await asyncio.gather(*asking)

    run(test)


@pytest.mark.parametrize(
    "raw", [b'{"model": "n",%s "prompt": "x"}' % (b" " * 900), b'{"model": "n", "logit_bias": [%s]}' % b",".join([b"1e9"] * 90)]
)
def test_a_body_that_waits_counts_as_it_is_sent_and_not_as_it_came(raw: bytes) -> None:
    """Blanks are not kept; 1e9 is kept as 1000000000.0. What is counted must be what is held, or the bound is none."""

    async def test(pool: Pool) -> None:
        await pool.running("m")
        asking = asyncio.create_task(pool.post(raw))
        await asyncio.sleep(0.05)
        rest = {key: value for key, value in orjson.loads(raw).items() if key != "model"}
        assert pool.routing.budget.bytes == len(orjson.dumps(rest)) - 1 != len(raw)
        await pool.running("mn")
        assert (await asking)[0] == 200

    run(test)


def test_a_request_that_only_its_sender_got_wrong_counts_neither_for_nor_against_a_canary() -> None:
    """A 501 of the engine counted against the version."""

    async def test(pool: Pool) -> None:
        await pool.canary()
        table = pool.routing.router.table
        assert [(await pool.ask("m", answered_with=status))[0] for status in (400, 422, 501)] == [400, 400, 501]
        assert pool.routing.recorder.measured("m", 1) == {} and table.suspects == {}
        assert (await pool.ask("m", answered_with=500))[0] == 502 and (await pool.ask("m"))[0] == 200
        tallies = pool.routing.recorder.measured("m", 1).values()
        assert (sum(one.requests for one in tallies), sum(one.errors for one in tallies)) == (2, 1)

    run(test)


def test_a_request_that_no_engine_is_asked_counts_neither_for_nor_against_a_canary() -> None:
    async def test(pool: Pool) -> None:
        await pool.canary()
        asked = {"prompt": "x", "echo": True, "logprobs": 1}
        shape = Payload(asked).shape("/v1/completions")
        for replica in ("r-1", "r-2"):
            pool.routing.upstream.quarantine.lost(shape, Loss(replica, said=True, alone=True), time.monotonic())
        assert [(await pool.ask("m", **asked))[0] for _ in range(3)] == [503, 503, 503]
        assert pool.routing.recorder.measured("m", 1) == {}

    run(test)


def test_whoever_needs_an_engine_that_does_not_start_hears_why_at_once_and_wakes_no_other() -> None:
    async def test(pool: Pool) -> None:
        await pool.running("m")
        asking = asyncio.create_task(pool.ask("n"))
        await asyncio.sleep(0.1)
        assert pool.woken == ["n"]
        view = pool.routing.router.table.view
        failed = FLEETS["n"]._replace(failed="The engine of n did not start on n@1: 0.35 GiB KV cache is needed.")
        await pool.routing.router.adopt(view._replace(revision=9, fleets={**FLEETS, "n": failed}))
        for status, headers, body in (await asking, await pool.ask("n")):
            assert (status, headers["retry-after"], body["error"]["code"]) == (503, "60", "engine_failed")
            assert "0.35 GiB KV cache is needed" in body["error"]["message"]
        assert pool.woken == ["n"] and pool.routing.router.waking == {}
        assert (await pool.ask("m"))[0] == 200
        await pool.routing.router.adopt(view._replace(revision=10))
        assert (await pool.ask("n"))[0] == 503 and len(pool.woken) > 1, "a minute later it is tried again"

    run(test)
