"""What operators and jobs ask for: publish, promote, abort, roll back. Each asks in a thread of its own and waits for the control loop.

What reads files is done in the asker's thread, before the loop hears of it; what must not be overtaken is decided in the loop.
"""

from collections.abc import Callable

from cluster.control import admission, clock
from cluster.control.aliases import AliasReconciler, Progress
from cluster.control.gateways import Gateways
from cluster.control.hosting import Fleet, Hosting
from cluster.control.loop import Loop
from cluster.control.replicas import LOAD_TIMEOUT_S
from cluster.errors import Conflict, PoolUnavailable, SpringtideError, VersionRefused
from cluster.publishing import rollout
from cluster.publishing.rollout import DIRECT, Order, Policy, Rollout
from cluster.redact import redact
from cluster.types import Manifest, VersionId, check_name

ABORT_TIMEOUT_S = 30


class Publishing:
    """Called from many threads at once."""

    def __init__(self, hosting: Hosting, aliases: AliasReconciler, gateways: Gateways, loop: Loop) -> None:
        self.hosting = hosting
        self.aliases = aliases
        self.gateways = gateways
        self.loop = loop

    def publish(
        self, version: str, alias: str, reason: str, author: str, policy: Policy | None = None, after: int | None = None
    ) -> Rollout:
        """Begin a rollout of ``version`` on ``alias``, and return it once it waits for something: its verdict, a surge of the fleet, the
        canary's requests, or nothing any more, because it is live.

        Raises `VersionRefused` with the reason where it did not get that far, and then the alias means what it meant before; `Conflict`
        where another rollout of the alias is under way, or where the alias is not at generation ``after`` any more.
        """
        registry, cache = self.hosting.desired.registry, self.hosting.config.home / "cache"
        check_name(VersionId.parse(version).name)
        manifest = registry.manifest(VersionId.parse(version))
        was_live = registry.past(check_name(alias)).was_live(manifest.id)
        fleet, hosted = self.loop.call(lambda: self._fleet_for(manifest, alias))
        memory_bytes = self.hosting.device_bytes() if manifest.kind == "weights" else None
        admission.check(fleet.spec, registry, manifest, hosted, examined=was_live, memory_bytes=memory_bytes)
        # It reads headers and settings, from a bucket that may be slow: here and not in the loop.
        self.hosting.shapes.swap_obstacle(registry, cache, manifest.weights, hosted)
        wanted = policy or self.hosting.config.publishing.policy
        begun = self.loop.call(lambda: self._begin(manifest, alias, wanted, redact(reason), author, was_live, after))
        return self._until(begun, self._waits, LOAD_TIMEOUT_S)

    def order(self, alias: str, what: str, reason: str, author: str, version: str | None = None) -> Rollout:
        """``promote`` the alias's rollout to 100 %, or ``abort`` it. Returns it when that is done.

        Raises `Conflict` where no rollout is under way, or that of another version than ``version``. An order may wait for minutes until it is
        heard, and must not reach a later rollout than the one that its author saw.
        """
        now = self.loop.call(lambda: self._order(alias, what, redact(reason), author, version))
        goal, timeout_s = ("live", LOAD_TIMEOUT_S) if what == "promote" else ("rolled_back", ABORT_TIMEOUT_S)
        return self._until(now, lambda one: one.rollout.stage == goal and self._announced(one.rollout), timeout_s, goal)

    def rollback(self, alias: str, to: str | None, reason: str, author: str) -> Rollout:
        """Make ``alias`` mean ``to`` at once; by default abort the rollout under way, or else go back to the version before."""
        check_name(alias)
        now = self.loop.call(lambda: self.hosting.desired.rollout(alias))
        under_way = now is not None and now.stage in rollout.UNDER_WAY
        if now is not None and under_way and now.is_rollback and to in (None, str(now.version)):
            return self._until(now, self._waits, LOAD_TIMEOUT_S)  # somebody else was faster, or this is asked once more
        if to is None and under_way:
            return self.order(alias, "abort", reason, author)
        registry = self.hosting.desired.registry
        live = registry.alias(alias)  # read first: what was before it is decided for this generation and no other
        target = VersionId.parse(to) if to else registry.previous(alias)
        return self.publish(str(target), alias, reason, author, DIRECT, None if to or live is None else live.generation)

    # in the loop's thread

    def _fleet_for(self, manifest: Manifest, alias: str) -> tuple[Fleet, VersionId]:
        """The fleet that the version would go live on, and what it hosts now. Raises `VersionRefused` where it must not."""
        fleet, hosted = self.hosting.for_publish(alias, manifest)
        desired = self.hosting.desired
        coming = {other: one.version for other, one in desired.under_way().items()}
        meant = {**{alias: id for alias, id in desired.live().items() if self.hosting.holds_back(alias)}, **coming}
        needed = {other: self.hosting.weights(id) for other, id in meant.items()}
        leaving = self.hosting.weights(coming[fleet.model]) if fleet.model in coming else None
        admission.check_replaces(fleet.model, manifest, alias, hosted, needed, leaving)
        return fleet, hosted

    def _begin(
        self, manifest: Manifest, alias: str, policy: Policy, reason: str, author: str, was_live: bool, after: int | None
    ) -> Rollout:
        desired = self.hosting.desired
        desired.refresh(alias)
        self._fleet_for(manifest, alias)
        live, now = desired.move(alias), desired.rollout(alias)
        if after is not None and (live is None or live.generation != after):
            raise Conflict(f"{alias} was moved meanwhile.", "See `springtide history`, then decide again.")
        if now is not None and now.stage in rollout.UNDER_WAY:
            raise Conflict(
                f"A rollout of {now.version} on {alias} is under way ({now.stage} {now.percent} %).",
                f"Wait for it, or end it: springtide promote {alias}, springtide abort {alias}.",
            )
        number, incumbent = (now.number + 1 if now else 1), live.stable if live else None
        back = was_live and policy == DIRECT
        begun = rollout.begin(alias, number, manifest.id, incumbent, policy, reason, author, clock.now_s(), back)
        if incumbent == manifest.id:
            return begun.next("live", "it is live already", clock.now_s())
        try:
            self.aliases.begin(begun)
        finally:
            self.loop.retry(("alias", alias))  # whether it was written or not: the store says
        return begun

    def _order(self, alias: str, what: str, reason: str, author: str, version: str | None) -> Rollout:
        now = self.hosting.desired.rollout(check_name(alias))
        if now is None or now.stage not in rollout.UNDER_WAY or what not in ("promote", "abort"):
            raise Conflict(f"No rollout of {alias} is under way.", "See `springtide history`.")
        if version not in (None, str(now.version)):
            raise Conflict(
                f"The rollout of {version} on {alias} has ended; {now.version} follows it.", "See `springtide history`."
            )
        if what == "promote" and now.stage != "canary":
            raise Conflict(f"The rollout of {now.version} is still {now.stage}.", "Promote it when it is a canary.")
        if what == "promote" and alias in self.aliases.orders:
            raise Conflict(f"An order for the rollout of {now.version} is being carried out.", "See `springtide history`.")
        self.aliases.orders[alias] = Order(what, author, reason)
        self.loop.retry(("alias", alias))
        return now

    # waiting: `done` is asked after each turn of the loop, and reads nothing but memory

    def _until(self, begun: Rollout, done: Callable[[Progress], bool], timeout_s: float, goal: str = "live") -> Rollout:
        """Wait for the loop to bring the rollout there. A rollback that was not the ``goal`` is raised with its reason."""
        if begun.stage == "live":
            return begun  # never recorded: it was live already
        if not self.loop.wait(lambda: self._ended(begun, done), timeout_s):
            raise self._too_late(begun, timeout_s)
        newest = self.aliases.progress[begun.alias].rollout
        now = newest if newest.number == begun.number else self._as_it_ended(begun)
        if now.stage == "rolled_back" and goal != "rolled_back":
            raise VersionRefused(now.reason, "The live version is untouched.")
        return now

    def _ended(self, begun: Rollout, done: Callable[[Progress], bool]) -> bool:
        progress = self.aliases.progress.get(begun.alias)
        if progress is None or progress.rollout.number < begun.number:
            return False
        if progress.rollout.number > begun.number or done(progress):
            return True  # another has followed already, so this one has ended
        return progress.rollout.stage == "rolled_back" and self._announced(progress.rollout)

    def _as_it_ended(self, begun: Rollout) -> Rollout:
        """Another rollout has followed already: this one as it went live, if it did, or else how it ended."""
        records = self.hosting.desired.registry.records(begun.alias, begun.number)
        return next((record for record in records if record.stage == "live"), records[-1])

    def _too_late(self, begun: Rollout, timeout_s: float) -> SpringtideError:
        progress = self.aliases.progress.get(begun.alias)
        failure = self.loop.queue.failures.get(("alias", begun.alias))
        stage, why = (progress.rollout if progress else begun).stage, f": {failure.words}" if failure else ""
        return PoolUnavailable(f"{begun.version} is still {stage} after {timeout_s} s{why}.", "See `springtide status`.")

    def _waits(self, now: Progress) -> bool:
        """Whether the rollout waits for something that its publisher need not wait for."""
        one = now.rollout
        if one.stage == "registered":
            return one.policy.gate and now.facts is not None and now.facts.passed is None
        if now.surges and one.stage in rollout.UNDER_WAY:
            return True  # engines take as long to start as they take; `springtide publish` shows it
        return self._announced(one) and (one.stage == "live" or (one.stage == "canary" and one.percent < 100))

    def _announced(self, one: Rollout) -> bool:
        """Whether every gateway routes by what the rollout's record says."""
        move, wanted = self.gateways.current.aliases.get(one.alias), rollout.wanted(one)
        return wanted is None or (move is not None and (move.stable, move.canary, move.percent) == wanted)
