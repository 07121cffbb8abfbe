"""The gateway's routing table: which version an alias means now, and which replica answers. No I/O; time is passed in."""

import random
import secrets
from collections import Counter
from itertools import chain, islice

from cluster.canary import takes_canary
from cluster.errors import ModelNotFound, NoReplica
from cluster.types import EMPTY_VIEW, Generation, ReplicaState, VersionId, View

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
        self.holders: dict[str, list[ReplicaState]] = {}

    def adopt(self, view: View) -> bool:
        """Take a newer view; False for an older one, which is ignored."""
        if view.revision <= self.view.revision:
            return False
        known = self.view.aliases
        newest = {name: max(move, known.get(name, move), key=lambda one: one.generation) for name, move in view.aliases.items()}
        self.view = view._replace(aliases=newest)  # a control that was just restarted may know less of an alias than this gateway
        self.holders = {}
        for replica in view.replicas:
            for id in replica.held:
                self.holders.setdefault(id, []).append(replica)
        alive = {replica.id for replica in view.replicas}
        self.suspects = {id: until_s for id, until_s in self.suspects.items() if id in alive}
        self.in_flight = Counter({id: n for id, n in self.in_flight.items() if n})
        return True

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
        candidates = self.holders.get(str(version), [])
        if tried:
            candidates = [replica for replica in candidates if replica.id not in tried]
        if not candidates:
            raise NoReplica(
                f"No replica can answer for {version} now.", "Try again in some seconds; `springtide status` shows why."
            )
        if len(candidates) > LOOKED_AT:
            candidates = random.sample(candidates, LOOKED_AT)
        return min(candidates, key=lambda replica: self._burden(replica.id, now_s))

    def _holding(self, version: str) -> list[str]:
        if version not in self.listed and version in self.holders:
            self.listed[version] = list(self.holders[version])
        return self.listed.get(version, [])

    def _burden(self, id: str, now_s: float) -> tuple[bool, int, float]:
        return self.suspects.get(id, 0) > now_s, self.in_flight[id], random.random()  # noqa: S311 (a tie-break, not a secret)

    def suspect(self, id: str, now_s: float) -> None:
        self.suspects[id] = now_s + SUSPECT_S
