"""The gateway's routing table: which version an alias means now, which fleet answers for it, and which replica. No I/O; time is passed in."""

import random
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import chain, islice
from typing import NamedTuple

from cluster.errors import ModelNotFound, NoReplica, WrongTask
from cluster.publishing.canary import takes_canary
from cluster.types import EMPTY_VIEW, FleetState, Generation, ReplicaState, VersionId, View, is_interim
from cluster.view import ViewDelta, apply, delta
from deployments.routing.engine_routes import EngineRoute, paths_of

SUSPECT_S = 2.0
"""How long a replica that broke a connection is chosen last."""
LOOKED_AT = 16
"""Replicas that a request is chosen among."""
NAMED = 20
"""Models that an error names."""


class Target(NamedTuple):
    """What a client's ``model`` means to one request."""

    version: VersionId
    move: Generation | None
    """The alias's generation; None where the client named the version itself."""
    fleet: str = ""
    """The fleet whose replicas are asked first: the alias's, or the one of the route's task. Empty where any replica that holds the version
    is as good."""


class Table:
    """A `View` and what this gateway knows beyond it: its own requests in flight and the replicas it just lost."""

    def __init__(self) -> None:
        self.view: View = EMPTY_VIEW
        self.in_flight: Counter[str] = Counter()
        self.suspects: dict[str, float] = {}
        """Replica id → until when it is chosen last."""
        self.buried: frozenset[str] = frozenset()
        """Replicas whose engine said that it has ended, until control drops them or tells of another state: some start another engine."""
        self.replicas: dict[str, ReplicaState] = {}
        """The view's, by id."""
        self.holders: dict[str, set[str]] = {}
        """Version id → ids of the replicas that can answer for it."""
        self.holder_lists: dict[str, dict[str, list[str]]] = {}
        """The same as lists, because `random.sample` wants one: version id → fleet → its replicas, and "" → all. A list is made when a request
        asks for it."""
        self.fleet_of_app: dict[str, str] = {}
        """Serve application → the fleet whose replicas it has, or whose surge it is."""
        self.running: Counter[str] = Counter()
        """Serve application → its replicas."""
        self.listed_by: dict[str, list[str]] = {}
        """Version id → names of the fleets that answer for it once they run."""

    def adopt(self, news: View | ViewDelta) -> bool:
        """Take a newer view. False for an older view and for a change of another view: both are ignored."""
        if news.revision <= self.view.revision:
            return False
        change = delta(self.view, news) if isinstance(news, View) else news
        if change.since != self.view.revision:
            return False
        self.view = apply(self.view, change)
        for id in change.left:
            gone = self.replicas.pop(id)
            self.running[gone.app] -= 1
            self._regroup(id, gone.held, {})
        for replica in change.replicas:
            before = self.replicas.get(replica.id)
            self.running[replica.app] += before is None  # a replica never changes its application
            self._regroup(replica.id, before.held if before else {}, replica.held)
            self.replicas[replica.id] = replica
        if change.fleets or change.removed:
            self._list_fleets()
        self.suspects = {id: until_s for id, until_s in self.suspects.items() if id in self.replicas}
        self.buried = (self.buried & self.replicas.keys()) - {replica.id for replica in change.replicas}
        self.in_flight = Counter({id: n for id, n in self.in_flight.items() if n})
        return True

    def _regroup(self, replica: str, before: Mapping[str, str], after: Mapping[str, str]) -> None:
        """One replica held the versions ``before``, and now holds ``after``."""
        for id in before.keys() - after.keys():
            self.holder_lists.pop(id, None)
            self.holders[id].remove(replica)
            if not self.holders[id]:
                del self.holders[id]
        for id in after.keys() - before.keys():
            self.holder_lists.pop(id, None)
            self.holders.setdefault(id, set()).add(replica)

    def _list_fleets(self) -> None:
        self.listed_by, self.fleet_of_app = {}, {}
        self.holder_lists.clear()
        for fleet in self.view.fleets.values():
            self.fleet_of_app |= {app: fleet.name for app in (fleet.app, fleet.surge) if app}
            for id in fleet.versions:
                self.listed_by.setdefault(id, []).append(fleet.name)

    # which version

    def resolve(self, model: str, session: str = "") -> Target:
        """What the client's ``model`` means to this ``session``: an alias's stable or canary version, or ``name@n`` itself.

        A request without a session is a session of its own. Raises `ModelNotFound` at once for what no replica holds and no fleet
        answers for, and `NoReplica` before the first view.
        """
        if self.view is EMPTY_VIEW:
            raise NoReplica("The pool is still starting.", "Try again in some seconds.")
        move = self.view.aliases.get(model)
        if move is None:
            return Target(self._pinned(model), None)
        version = move.stable
        if move.canary is not None and takes_canary(move.alias, move.canary, move.percent, session or secrets.token_hex(8)):
            version = move.canary
        if not self.hosts(str(version)):
            raise unhosted(model, version)
        return Target(version, move, self.view.alias_fleets.get(model, ""))

    def _pinned(self, model: str) -> VersionId:
        version = VersionId.parse(model) if "@" in model else None
        if version is not None and self.hosts(str(version)):
            return version
        if version is not None:
            raise ModelNotFound(
                f"No replica holds {version}, and no fleet answers for it. There are {self._known()}.",
                f"If it exists, springtide publish {version} loads it.",
                param="model",
            )
        raise ModelNotFound(f"The model {model[:80]!r} does not exist.", f"Models served here: {self._known()}.", param="model")

    def resolve_for(self, route: EngineRoute, model: str, session: str = "") -> Target:
        """As `resolve`, for a request to ``route``. Raises `WrongTask` where the model's fleets are for others.

        Example: the fleets chat and vectors both host m@1, with the tasks ``generate`` and ``embed``. Whoever pins m@1 is answered by chat
        at ``/v1/completions``, and by vectors at ``/v1/embeddings``.
        """
        target = self.resolve(model, session)
        tasks = {name: self.view.fleets[name].task for name in self._fleets_of(str(target.version), target.fleet)}
        fitting = [name for name, task in tasks.items() if task in route.tasks]
        if tasks and not fitting:
            task = next(iter(tasks.values()))
            raise WrongTask(
                f"The model {model} is of the task {task}, and {route.path} is for {' and '.join(route.tasks)}.",
                f"It answers {', '.join(paths_of(task))}.",
                param="model",
            )
        return target if len(fitting) == len(tasks) else target._replace(fleet=fitting[0])

    def task(self, id: str, own: str = "") -> str:
        """What the version's fleet does with it, the alias's ``own`` first; empty where no fleet is known."""
        return next((self.view.fleets[name].task for name in self._fleets_of(id, own)), "")

    def _fleets_of(self, id: str, own: str) -> list[str]:
        """Names of the fleets that answer for the version; only the alias's ``own`` where it has one."""
        if own:
            return [own] if own in self.view.fleets else []
        if id not in self.listed_by:  # an older version that a replica still holds
            some = next(iter(self.holders.get(id, ())), None)
            name = self.fleet_of_app.get(self.replicas[some].app) if some else None
            return [name] if name else []
        return self.listed_by[id]

    def _one_task(self, id: str) -> bool:
        return len({self.view.fleets[name].task for name in self.listed_by.get(id, ())}) < 2

    def hosts(self, id: str) -> bool:
        """Whether a replica holds the version, or a fleet answers for it once it runs."""
        return id in self.holders or id in self.listed_by

    def askable(self, id: str) -> bool:
        """Whether a request for the version is answered now, or after a fleet was woken for it."""
        return id in self.holders or self.fleet_to_wake(id) is not None

    def asleep(self, fleet: str) -> FleetState | None:
        """The fleet, where it has no replica."""
        state = self.view.fleets.get(fleet)
        return state if state is not None and not self.running[state.app] else None

    def unplaced(self, target: Target) -> bool:
        """Whether the fleet's replicas answer and none of them holds the version: it waits for a replica with a place for it, which may have to
        start first."""
        return str(target.version) not in self.holders and any(
            replica.held and self.fleet_of_app.get(replica.app, "") == target.fleet for replica in self.replicas.values()
        )

    def fleet_to_wake(self, id: str, own: str = "") -> FleetState | None:
        """The fleet to wake for the version: it answers for it and has no replica; of several the alias's ``own``. None where another fleet
        that runs answers for it too."""
        fleets = [self.view.fleets[name] for name in self.listed_by.get(id, ())]
        if not fleets or any(self.running[fleet.app] for fleet in fleets):
            return None
        return next((fleet for fleet in fleets if fleet.name == own), fleets[0])

    def versions(self) -> Iterable[str]:
        """Ids of all that `askable` is true for, but the interim ones of runs, which only who knows them may ask for."""
        asleep = (fleet.versions for fleet in self.view.fleets.values() if not self.running[fleet.app])
        askable = self.holders.keys() | {id for versions in asleep for id in versions if self.askable(id)}
        return {id for id in askable if not is_interim(id)}

    def _known(self) -> str:
        """Names for whoever asked for an unknown one; of many the first, since a client may ask so as often as it likes."""
        names = list(islice((name for name in chain(self.view.aliases, self.holders) if not is_interim(name)), NAMED))
        more = len(self.view.aliases) + len(self.holders) - NAMED if len(names) == NAMED else 0
        return ", ".join(sorted(names)) + (f" and {more} more" if more else "") or "none yet"

    # which replica

    def choose(self, version: VersionId, now_s: float, tried: frozenset[str] = frozenset(), fleet: str = "") -> ReplicaState:
        """The least busy replica that holds ``version``, ties broken at random; suspects last. Raises `NoReplica`.

        The replicas of ``fleet`` come first, its surge's included. Another fleet's is taken only where none of them is left, or all are
        suspects, and where all fleets that answer for the version have the same task. Example: the fleets chat and batch both host m@1. A
        request for chat's alias goes to a replica of chat, however busy, and to one of batch while chat has none.

        Of more than `LOOKED_AT` holders it compares so many, drawn at random. Comparing thousands would take longer than anything else
        that a gateway does for a request, and the choice would hardly be better (Mitzenmacher 2001, the power of two choices).
        Example: of 400 replicas that hold the version, 16 are drawn, and the one with the fewest requests of this gateway is taken.
        """
        candidates = self._holding(str(version), fleet)
        if tried or self.buried:
            candidates = [id for id in candidates if id not in tried and id not in self.buried]
        if fleet and all(self.suspects.get(id, 0) > now_s for id in candidates) and self._one_task(str(version)):
            return self.choose(version, now_s, tried)
        if not candidates:
            raise NoReplica(
                f"No replica can answer for {version} now.", "Try again in some seconds; `springtide status` shows why."
            )
        if len(candidates) > LOOKED_AT:
            candidates = random.sample(candidates, LOOKED_AT)
        return self.replicas[min(candidates, key=lambda id: self._burden(id, now_s))]

    def _holding(self, version: str, fleet: str = "") -> list[str]:
        """Ids of the fleet's replicas that hold the version; of all replicas where no fleet is named."""
        lists = self.holder_lists.get(version)
        if lists is None:
            lists = self.holder_lists[version] = {}
        if fleet not in lists:
            holders = self.holders.get(version, ())
            lists[fleet] = [id for id in holders if not fleet or self.fleet_of_app.get(self.replicas[id].app) == fleet]
        return lists[fleet]

    def _burden(self, id: str, now_s: float) -> tuple[bool, int, float]:
        return self.suspects.get(id, 0) > now_s, self.in_flight[id], random.random()  # noqa: S311 (a tie-break, not a secret)

    def suspect(self, id: str, now_s: float) -> None:
        self.suspects[id] = now_s + SUSPECT_S

    def bury(self, id: str) -> None:
        """Choose the replica no more: its engine said that it has ended, which control hears a moment later. What it held stays known until
        then, so that requests wait for another replica and are not told that their version does not exist."""
        self.buried |= self.replicas.keys() & {id}

    @property
    def answering(self) -> int:
        """How many replicas there are, those left out whose engine has ended."""
        return len(self.replicas) - len(self.buried)


def unhosted(model: str, version: VersionId) -> ModelNotFound:
    """The error for an alias whose base nobody hosts."""
    return ModelNotFound(
        f"The model {model[:80]!r} exists, but no fleet hosts {version} or the weights under it.",
        f"`springtide models {version}` names them; host them with `springtide fleets add`.",
        param="model",
    )
