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
from cluster.types import Generation, ReplicaState, VersionId

SLOTS_PER_NODE = 8
ADAPTERS_PER_NODE = 10
NODES_PER_JOB = 10
HOLDERS = 4
"""Replicas that hold an adapter, on average."""
BASE = VersionId("seedling", 1)
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
        self.places: dict[str, list[str]] = {adapter.name: [] for adapter in adapters}
        """Adapter's alias → the replicas that hold it."""
        self.replicas: dict[str, ReplicaState] = {}
        for _ in range(self.running):
            self._start()
        for name in self.places:
            self._place(name, *self.random.sample(list(self.replicas), HOLDERS))

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

    # the gateways' side

    def route(self) -> tuple[dict[str, Generation], tuple[ReplicaState, ...]]:
        """What control finds to tell the gateways now: replicas have come and gone, and aliases have moved."""
        self._staff()
        for name in self.random.sample(list(self.places), max(1, int(len(self.places) * FLIPS))):
            self._flip(name)
        states = (state._replace(running=self.random.randrange(32)) for state in self.replicas.values())
        return dict(self.aliases), tuple(states)

    def asks(self, requests: int) -> list[str]:
        """Aliases as clients ask for them: every second request is for the base, the others for few adapters often and for many seldom."""
        names = list(self.places)
        ranks = (min(len(names), int(self.random.paretovariate(0.5))) for _ in range(requests))
        return [BASE.name if self.random.random() < 0.5 else names[rank - 1] for rank in ranks]

    def _staff(self) -> None:
        """As many replicas as run, and every adapter on one of them at least."""
        ids = list(self.replicas)
        for id in self.random.sample(ids, max(0, len(ids) - self.running)):
            self._leave(id)
        for _ in range(self.running - len(ids)):
            id = self._start()
            for name in self.random.sample(list(self.places), len(self.places) * HOLDERS * 2 // self.slots):
                self._place(name, id)
        ids = list(self.replicas)
        for name in [name for name, holders in self.places.items() if not holders]:
            self._place(name, self.random.choice(ids))

    def _start(self) -> str:
        id, self.born = f"replica-{self.born}", self.born + 1
        url = f"http://10.{self.born >> 16}.{self.born >> 8 & 255}.{self.born & 255}:8000"
        secret = f"{self.random.getrandbits(256):064x}"
        self.replicas[id] = ReplicaState(id, url, secret, str(BASE), {str(BASE): digest(BASE)}, {}, 0)
        return id

    def _leave(self, id: str) -> None:
        for name in {version.partition("@")[0] for version in self.replicas.pop(id).held} - {BASE.name}:
            self.places[name].remove(id)

    def _flip(self, name: str) -> None:
        """Publish the adapter's next version where this one is held and on one replica more; another drops it."""
        self.aliases[name] = move(VersionId(name, self.aliases[name].stable.n + 1))
        self._place(name, *self.places[name], self.random.choice(list(self.replicas)))
        if len(self.places[name]) > HOLDERS:
            self._hold(self.places[name].pop(0), name)

    def _place(self, name: str, *ids: str) -> None:
        """Load the adapter's live version beside the one before it."""
        live = self.aliases[name].stable
        for id in ids:
            self._hold(id, name, *(VersionId(name, n) for n in (live.n - 1, live.n) if n))
        self.places[name] = list(dict.fromkeys([*self.places[name], *ids]))

    def _hold(self, id: str, name: str, *versions: VersionId) -> None:
        """Of this adapter the replica holds these versions from now on."""
        state = self.replicas[id]
        others = {version: at for version, at in state.held.items() if not version.startswith(f"{name}@")}
        self.replicas[id] = state._replace(held=others | {str(version): digest(version) for version in versions})


def move(version: VersionId) -> Generation:
    return Generation(alias=version.name, generation=version.n, stable=version, reason="published", author="ci", time_s=version.n)


def digest(version: VersionId) -> str:
    return hashlib.sha256(str(version).encode()).hexdigest()
