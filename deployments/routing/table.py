"""The gateway's routing table: which version an alias means now, and which replica answers. No I/O; time is passed in."""

import random
import secrets
from collections import Counter
from collections.abc import Mapping
from itertools import chain, islice

from cluster.errors import ModelNotFound, NoReplica
from cluster.publishing.canary import takes_canary
from cluster.types import EMPTY_VIEW, Generation, ReplicaState, VersionId, View
from cluster.view import ViewDelta, apply, difference

SUSPECT_S = 2.0
"""How long a replica that broke a connection is chosen last."""
LOOKED_AT = 16
"""Replicas that a request is chosen among."""
NAMED = 20
"""Models that an error names."""


class Table:
    """A `View` and what this gateway knows beyond it: its own requests in flight and the replicas it just lost."""

    def __init__(self) -> None:
        self.view: View = EMPTY_VIEW
        self.in_flight: Counter[str] = Counter()
        self.suspects: dict[str, float] = {}
        self.replicas: dict[str, ReplicaState] = {}
        """The view's, by id."""
        self.holders: dict[str, set[str]] = {}
        """Version id → ids of the replicas that can answer for it."""
        self.listed: dict[str, list[str]] = {}
        """The same as lists, of which some can be drawn; made when a request asks for the version."""

    def adopt(self, news: View | ViewDelta) -> bool:
        """Take a newer view; False for an older one, or for a change of a view that is not this one, which are ignored."""
        if news.revision <= self.view.revision:
            return False
        change = difference(self.view, news) if isinstance(news, View) else news
        if change.since != self.view.revision:
            return False
        self.view = apply(self.view, change)
        for id in change.left:
            self._regroup(id, self.replicas.pop(id).held, {})
        for replica in change.replicas:
            before = self.replicas.get(replica.id)
            self._regroup(replica.id, before.held if before else {}, replica.held)
            self.replicas[replica.id] = replica
        self.suspects = {id: until_s for id, until_s in self.suspects.items() if id in self.replicas}
        self.in_flight = Counter({id: n for id, n in self.in_flight.items() if n})
        return True

    def _regroup(self, replica: str, before: Mapping[str, str], after: Mapping[str, str]) -> None:
        """One replica held these versions, and now holds those."""
        for id in before.keys() - after.keys():
            self.listed.pop(id, None)
            self.holders[id].remove(replica)
            if not self.holders[id]:
                del self.holders[id]
        for id in after.keys() - before.keys():
            self.listed.pop(id, None)
            self.holders.setdefault(id, set()).add(replica)

    def resolve(self, model: str, session: str = "") -> tuple[VersionId, Generation | None]:
        """What the client's ``model`` means to this ``session``: an alias's stable or canary version, or ``name@n`` itself.

        A request without a session is a session of its own. Raises `ModelNotFound`.
        """
        if self.view is EMPTY_VIEW:
            raise NoReplica("The pool is still starting.", "Try again in some seconds.")
        if move := self.view.aliases.get(model):
            session = session or secrets.token_hex(8)
            taken = move.canary is not None and takes_canary(move.alias, move.canary, move.percent, session)
            return (move.canary if taken and move.canary else move.stable), move
        version = VersionId.parse(model) if "@" in model else None
        if version is not None and (str(version) in self.holders or not self.view.replicas):
            return version, None  # with no replica at all it is too early to say that a version does not exist
        known = self._known()
        if version is not None:
            raise ModelNotFound(
                f"No replica holds {version}; held are {known}.",
                f"If it exists, springtide publish {version} loads it.",
                param="model",
            )
        raise ModelNotFound(f"The model {model[:80]!r} does not exist.", f"Models served here: {known}.", param="model")

    def _known(self) -> str:
        """Names for whoever asked for an unknown one; of many the first, since a client may ask so as often as it likes."""
        names = list(islice(chain(self.view.aliases, self.holders), NAMED))
        more = len(self.view.aliases) + len(self.holders) - len(names)
        return ", ".join(sorted(names)) + (f" and {more} more" if more else "") or "none yet"

    def choose(self, version: VersionId, now_s: float, tried: frozenset[str] = frozenset()) -> ReplicaState:
        """The least busy replica that holds ``version``, ties broken at random; suspects last. Raises `NoReplica`.

        Of more than `LOOKED_AT` it is the least busy of so many taken at random: comparing thousands would take longer than anything
        else that a gateway does for a request, and the busiest replica would hardly be less busy (Mitzenmacher 2001, the power of two
        choices).
        """
        candidates = self._holding(str(version))
        if tried:
            candidates = [id for id in candidates if id not in tried]
        if not candidates:
            raise NoReplica(
                f"No replica can answer for {version} now.", "Try again in some seconds; `springtide status` shows why."
            )
        if len(candidates) > LOOKED_AT:
            candidates = random.sample(candidates, LOOKED_AT)
        return self.replicas[min(candidates, key=lambda id: self._burden(id, now_s))]

    def _holding(self, version: str) -> list[str]:
        if version not in self.listed and version in self.holders:
            self.listed[version] = list(self.holders[version])
        return self.listed.get(version, [])

    def _burden(self, id: str, now_s: float) -> tuple[bool, int, float]:
        return self.suspects.get(id, 0) > now_s, self.in_flight[id], random.random()  # noqa: S311 (a tie-break, not a secret)

    def suspect(self, id: str, now_s: float) -> None:
        self.suspects[id] = now_s + SUSPECT_S
