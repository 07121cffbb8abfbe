"""A pool without machines: load, replicas, jobs and adapters that come, go and move, all from one seed. For `tests.scale`.

It does what Ray and the clients would do with the allocator's grants: replicas start where slots are free and take a while to end; jobs grow
into what they were promised, give back late, end, die without a word, or fall silent for a while and come back.
"""

import hashlib
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

from cluster.capacity.allocator import Allocator, Grant, Heartbeat
from cluster.capacity.arbiter import Job
from cluster.publishing.adapter_placement import AdapterPlacement, WantedAdapters, assign
from cluster.types import FleetState, Generation, ReplicaState, VersionId

SLOTS_PER_NODE = 8
ADAPTERS_PER_NODE = 10
NODES_PER_JOB = 10
PLACES = 10
"""For adapters, on each replica: with half of the slots served, four replicas hold each adapter."""
BASE = VersionId("seedling", 1)
FLEET = FleetState("base", BASE.name, (str(BASE),), "fleet-base")
ENDING_TURNS = 20
SILENT_TURNS = 60
"""Longer than `cluster.capacity.allocator.SILENT_S`."""
FLIPS = 0.002
"""Share of the aliases that move from one view to the next."""


@dataclass
class Driver:
    """A training job as the pool sees it; slots and turns."""

    job: Job
    held: int = 0
    silent_until: int = 0


class World:
    def __init__(self, nodes: int, turns: int, seed: int) -> None:
        """``turns``: how many turns of the allocator make a day."""
        self.random = Random(seed)
        self.slots = nodes * SLOTS_PER_NODE
        self.turns = turns
        self.wanted = self.running = self.slots // 2
        self.ending: deque[tuple[int, int]] = deque()
        """(turn at whose beginning they are gone, replicas)"""
        self.burst, self.burst_until = 0, 0
        self.drivers: dict[str, Driver] = {}
        self.jobs, self.born, self.came = max(1, nodes // NODES_PER_JOB), 0, 0
        adapters = [VersionId(f"adapter-{n}", 2) for n in range(nodes * ADAPTERS_PER_NODE)]
        self.aliases = {version.name: move(version) for version in (BASE, *adapters)}
        self.adapters = [adapter.name for adapter in adapters]
        """Their aliases."""
        self.replicas: dict[str, ReplicaState] = {}
        for _ in range(self.running):
            self._start()
        self.hold(self.place())

    # the allocator's side

    @property
    def serving(self) -> int:
        """Slots of replicas that run or end."""
        return self.running + sum(replicas for _, replicas in self.ending)

    @property
    def free(self) -> int:
        return self.slots - self.serving - sum(driver.held for driver in self.drivers.values())

    def step(self, turn: int, allocator: Allocator) -> list[Heartbeat]:
        """One turn's load and replicas, and whose heartbeat comes in it; who ends says so."""
        self.wanted = self._load(turn)
        while self.ending and self.ending[0][0] <= turn:
            self.ending.popleft()
        if self.wanted < self.running:
            self.ending.append((turn + ENDING_TURNS, self.running - self.wanted))
            self.running = self.wanted
        self.running += min(self.wanted - self.running, self.free)
        self._hire(turn, allocator)
        return [Heartbeat(one.job, one.held, one.held) for one in self.drivers.values() if one.silent_until <= turn]

    def hear(self, turn: int, grants: Mapping[str, Grant]) -> None:
        """The jobs take what they were given where it is free, and give back the rest when their checkpoint is written."""
        for id, driver in self.drivers.items():
            grant = grants.get(id)
            if grant is None or driver.silent_until > turn:
                continue
            if grant.slots > driver.held:
                driver.held += min(grant.slots - driver.held, self.free) // driver.job.step * driver.job.step
            elif self.random.random() < 0.2:
                driver.held = grant.slots

    def _load(self, turn: int) -> int:
        """Slots asked for: a day's tide with its noise, and bursts of up to a seventh of the pool. It is calm at midnight, so that what
        is held then can be compared with the midnight before."""
        calm = turn - turn % self.turns + int(self.turns * 0.95)
        if self.burst_until <= turn < calm and self.random.random() < 0.01:
            self.burst = self.random.randrange(self.slots // 7 + 1)
            self.burst_until = min(calm, turn + self.random.randint(10, 100))
        day = 0.45 + 0.2 * math.sin(2 * math.pi * turn / self.turns)
        noise = self.random.uniform(-0.01, 0.01)
        return max(1, int(self.slots * (day + noise)) + (self.burst if turn < self.burst_until else 0))

    def _hire(self, turn: int, allocator: Allocator) -> None:
        for id, driver in list(self.drivers.items()):
            chance = self.random.random()
            if chance < 0.002:
                allocator.end(id)
            if chance < 0.004:  # the other half of them died, and nobody said so
                del self.drivers[id]
            elif chance < 0.005:
                driver.silent_until = turn + SILENT_TURNS
        while len(self.drivers) < self.jobs:
            least, self.came = self.random.randint(1, 8), self.came + 1
            most, step = least + self.random.randrange(2 * self.slots // self.jobs), self.random.choice((1, 1, 2, 8))
            job = Job(f"job-{self.came}", self.random.randrange(4), float(turn), least, most, step)
            self.drivers[job.id] = Driver(job)

    # control's side

    def change(self) -> None:
        """Replicas come and go, and some aliases move to their next versions."""
        ids = list(self.replicas)
        for id in self.random.sample(ids, max(0, len(ids) - self.running)):
            del self.replicas[id]
        for _ in range(self.running - len(ids)):
            self._start()
        for name in self.random.sample(self.adapters, max(1, int(len(self.adapters) * FLIPS))):
            self.aliases[name] = move(VersionId(name, self.aliases[name].stable.n + 1))

    def place(self) -> AdapterPlacement:
        """Where control wants the live adapters."""
        live = WantedAdapters(tuple(str(self.aliases[name].stable) for name in self.adapters))
        return assign(live, list(self.replicas.values()), PLACES)

    def hold(self, placement: AdapterPlacement) -> None:
        """Every replica loads what it must hold; in the places that are left the newest of the others stay."""
        for id, assigned in placement.assigned.items():
            held = self.replicas[id].held
            new = {version: digest(version) for version in assigned if version not in held}
            others = [version for version in held if version not in (*assigned, str(BASE))]
            gone = others[: max(0, len(assigned) + len(others) - PLACES)]
            if new or gone:
                kept = {version: at for version, at in held.items() if version not in gone}
                self.replicas[id] = self.replicas[id]._replace(held=kept | new)

    # the gateways' side

    def route(self) -> tuple[dict[str, Generation], tuple[ReplicaState, ...], dict[str, FleetState], dict[str, str]]:
        """What control finds to tell the gateways now: aliases, replicas, fleets, and the fleet of each alias."""
        states = (state._replace(running=self.random.randrange(32)) for state in self.replicas.values())
        return dict(self.aliases), tuple(states), {FLEET.name: FLEET}, dict.fromkeys(self.aliases, FLEET.name)

    def asks(self, requests: int) -> list[str]:
        """Aliases as clients ask for them: every second request is for the base, the others for few adapters often and for many seldom."""
        names = self.adapters
        ranks = (min(len(names), int(self.random.paretovariate(0.5))) for _ in range(requests))
        return [BASE.name if self.random.random() < 0.5 else names[rank - 1] for rank in ranks]

    def _start(self) -> str:
        id, self.born = f"replica-{self.born}", self.born + 1
        url = f"http://10.{self.born >> 16}.{self.born >> 8 & 255}.{self.born & 255}:8000"
        secret = f"{self.random.getrandbits(256):064x}"
        self.replicas[id] = ReplicaState(id, url, secret, str(BASE), {str(BASE): digest(str(BASE))}, {}, 0, app=FLEET.app)
        return id


def move(version: VersionId) -> Generation:
    return Generation(alias=version.name, generation=version.n, stable=version, reason="published", author="ci", time_s=version.n)


def digest(version: str) -> str:
    return hashlib.sha256(version.encode()).hexdigest()
