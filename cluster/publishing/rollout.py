"""The way of a version from registered to live: a total, pure state machine.

::

    REGISTERED ──verdict──▶ WARMING ──every replica is ready──▶ CANARY(5 %) ─ … ─▶ CANARY(100 %) ──all hold it──▶ LIVE ──▶ RETIRED
         └───────────────────────┴──────────────────────────────────┴───────────────────┴──────────────────────────┴──▶ ROLLED_BACK

`decide` looks at what is known and says the next record, or None to stay. It reads no clock and does no I/O: control passes the time
in, writes the record to the store (create-only, so that two controls cannot both), and only then acts on it. Whoever reads the last
record knows what the alias must be (`wanted`), so a control that was killed anywhere goes on from there.
"""

from typing import Literal, NamedTuple

from pydantic import AliasChoices, Field, model_validator

from cluster.publishing.canary import Comparison, Margins, looks
from cluster.types import Durable, Record, Version, VersionId

Stage = Literal["registered", "warming", "canary", "live", "retired", "rolled_back"]
ENDED: tuple[Stage, ...] = ("retired", "rolled_back")
UNDER_WAY: tuple[Stage, ...] = ("registered", "warming", "canary")

WARM_TIMEOUT_S = 600
"""A version that a replica has neither loaded nor refused by then is given up."""


class Policy(Durable):
    """How carefully a version goes live."""

    steps: tuple[int, ...] = (5, 25, 100)
    """Per cent of sessions that get the new version, step by step; at 100 it is live once every replica holds it."""
    min_requests: int = Field(default=50, ge=0)
    """Answers by the canary before the next step."""
    min_step_s: float = Field(default=60, ge=0)
    """Time in one step before the next."""
    max_step_s: float = Field(default=86_400, gt=0)
    """How long a step below 100 % may take; then the version is rolled back, with what it waited for as the reason. A canary that nobody asks
    would stay one for ever, and no other version could be published."""
    gate: bool = True
    """Whether a verdict is needed first (`cluster.publishing.gate`). The artefact itself is checked in any case."""
    shadow_percent: int = Field(default=0, ge=0, le=100)
    """Share of the stable version's requests that the canary answers too, for comparison only."""
    margins: Margins = Margins()

    @model_validator(mode="after")
    def check(self) -> "Policy":
        rising = all(a < b for a, b in zip(self.steps, self.steps[1:], strict=False))
        if not (self.steps and rising and self.steps[0] > 0 and self.steps[-1] == 100):
            raise ValueError(f"steps {self.steps} must rise from above 0 to 100")
        return self


DIRECT = Policy(steps=(100,), min_requests=0, min_step_s=0, gate=False)
"""Live at once, for development and for going back to what was live before."""


class Rollout(Record):
    """``rollouts/<alias>/<number>/<n>.json``: one record of one rollout; the highest ``n`` is where it is now."""

    alias: str
    number: int
    """Which rollout of the alias this is, from 1."""
    n: int
    """Which record of the rollout this is, from 1."""
    version: Version
    incumbent: Version | None
    """What the alias meant when the rollout began, and means again if it is rolled back. None for an alias's first version."""
    policy: Policy
    stage: Stage
    percent: int = 0
    """The canary's share of sessions."""
    reason: str
    """Why it entered this stage."""
    author: str
    """Who asked for the version to go live."""
    since_s: float
    """When it entered this stage, in seconds since the epoch."""
    seen: int = 0
    """Answers by the canary before it entered this step."""
    is_rollback: bool = Field(default=False, validation_alias=AliasChoices("is_rollback", "back"))
    """Whether this goes straight back to a version that was live before: then nobody waits for long streams to end."""

    def next(self, stage: Stage, reason: str, now_s: float, percent: int = 0, seen: int = 0) -> "Rollout":
        change = {"n": self.n + 1, "stage": stage, "reason": reason, "since_s": now_s, "percent": percent, "seen": seen}
        return self.model_copy(update=change)


class Order(NamedTuple):
    """What an operator asked for."""

    what: Literal["promote", "abort"]
    author: str
    reason: str


class Warmth(NamedTuple):
    """How far the replicas are with what this stage asks of them: to be ready for the version, or to hold it."""

    replicas: int
    ready: int
    refused: str = ""
    """A replica's own words, empty where none refused."""
    waits: str = ""
    """What they wait for, where that needs words."""

    @property
    def complete(self) -> bool:
        return 0 < self.replicas <= self.ready


class Facts(NamedTuple):
    """What `decide` goes by. A field is None while nothing is known."""

    warmth: Warmth | None = None
    passed: bool | None = None
    """The gate's verdict."""
    verdict: str = ""
    comparison: Comparison | None = None
    look: bool = True
    """Whether canary and stable shall be compared now: at fixed looks only, see `cluster.publishing.canary`."""
    order: Order | None = None
    can_split: bool = True
    """Whether the replicas can hold both versions at once. One replica cannot have two sets of weights."""
    replaced_by: VersionId | None = None
    """The version that another rollout has made live on this alias since."""


def begin(
    alias: str,
    number: int,
    version: VersionId,
    incumbent: VersionId | None,
    policy: Policy,
    reason: str,
    author: str,
    now_s: float,
    is_rollback: bool = False,
) -> Rollout:
    return Rollout(
        alias=alias,
        number=number,
        n=1,
        version=version,
        incumbent=incumbent,
        policy=policy,
        stage="registered",
        reason=reason,
        author=author,
        since_s=now_s,
        is_rollback=is_rollback,
    )


def decide(rollout: Rollout, facts: Facts, now_s: float) -> Rollout | None:
    """The rollout's next record, or None where it stays as it is. Every stage and every combination of facts has an answer."""
    if rollout.stage in ENDED:
        return None
    if rollout.stage == "live":
        return _decide_live(rollout, facts, now_s)
    if facts.order is not None and facts.order.what == "abort":
        return rollout.next("rolled_back", f"aborted by {facts.order.author}: {facts.order.reason}", now_s)
    if rollout.stage == "registered":
        return _decide_registered(rollout, facts, now_s)
    if facts.warmth is not None and facts.warmth.refused:
        return rollout.next("rolled_back", facts.warmth.refused, now_s)
    return (_decide_warming if rollout.stage == "warming" else _decide_canary)(rollout, facts, now_s)


def _decide_registered(rollout: Rollout, facts: Facts, now_s: float) -> Rollout | None:
    if not rollout.policy.gate:
        return rollout.next("warming", "no gate asked for", now_s)
    if facts.passed is None:
        return None
    if not facts.passed:
        return rollout.next("rolled_back", f"the gate refused it: {facts.verdict}", now_s)
    return rollout.next("warming", facts.verdict or "the gate passed it", now_s)


def _decide_warming(rollout: Rollout, facts: Facts, now_s: float) -> Rollout | None:
    warmth = facts.warmth
    if warmth is not None and warmth.complete:
        return _step(rollout, facts, f"{count(warmth.ready)} ready", now_s)
    return _late(rollout, warmth, now_s)


def count(replicas: int) -> str:
    return f"{replicas} replica{'' if replicas == 1 else 's'}"


def _late(rollout: Rollout, warmth: Warmth | None, now_s: float) -> Rollout | None:
    """At 100 % replicas change their weights one after another, so the time is for each."""
    limit_s = WARM_TIMEOUT_S * (max(1, warmth.replicas) if warmth and rollout.stage == "canary" else 1)
    if now_s - rollout.since_s <= limit_s:
        return None
    ready = f"{warmth.ready} of {warmth.replicas}" if warmth else "no"
    waits = f", waiting for {warmth.waits}" if warmth and warmth.waits else ""
    return rollout.next("rolled_back", f"after {limit_s} s {ready} replicas were ready{waits}", now_s)


def _decide_canary(rollout: Rollout, facts: Facts, now_s: float) -> Rollout | None:
    if rollout.percent == 100:
        if facts.warmth is not None and facts.warmth.complete:
            return rollout.next("live", f"held by {count(facts.warmth.ready)}", now_s)
        return _late(rollout, facts.warmth, now_s)
    if facts.order is not None:
        return rollout.next("canary", f"promoted by {facts.order.author}: {facts.order.reason}", now_s, 100)
    return _compare(rollout, facts, facts.comparison, now_s) or _overdue(rollout, facts, now_s)


def _compare(rollout: Rollout, facts: Facts, comparison: Comparison | None, now_s: float) -> Rollout | None:
    if comparison is None:
        return None
    policy, requests = rollout.policy, in_step(rollout, comparison)
    done = requests >= policy.min_requests and now_s - rollout.since_s >= policy.min_step_s
    # The end of a step is a look of its own: nothing goes on that was not looked at with all that is known.
    look = max(1, looks(comparison.evidence) + done)
    if (facts.look or done) and (worse := comparison.worse(policy.margins, look)):
        return rollout.next("rolled_back", f"the canary is worse: {worse}", now_s)
    return _step(rollout, facts, f"no worse over {requests} requests", now_s) if done else None


def _overdue(rollout: Rollout, facts: Facts, now_s: float) -> Rollout | None:
    limit_s = rollout.policy.max_step_s
    if now_s - rollout.since_s <= limit_s:
        return None
    return rollout.next(
        "rolled_back", f"after {limit_s:.0f} s at {rollout.percent} % it waits for {_lacks(rollout, facts, now_s)}", now_s
    )


def in_step(rollout: Rollout, comparison: Comparison) -> int:
    """Answers by the canary since it entered this step. A gateway that was restarted counts from 0 again."""
    requests = comparison.canary.requests
    return requests - rollout.seen if requests >= rollout.seen else requests


def _decide_live(rollout: Rollout, facts: Facts, now_s: float) -> Rollout | None:
    if facts.replaced_by is None:
        return None
    if facts.replaced_by == rollout.incumbent:
        return rollout.next("rolled_back", f"the alias went back to {facts.replaced_by}", now_s)
    return rollout.next("retired", f"replaced by {facts.replaced_by}", now_s)


def _step(rollout: Rollout, facts: Facts, reason: str, now_s: float) -> Rollout:
    """The next share of the policy; all at once where there is nobody to compare with, or no room for both."""
    percent = next((step for step in rollout.policy.steps if step > rollout.percent), 100)
    alone = rollout.incumbent is None or not facts.can_split
    seen = facts.comparison.canary.requests if facts.comparison else 0
    return rollout.next("canary", reason, now_s, 100 if alone else percent, seen)


class Wanted(NamedTuple):
    """What an alias must mean."""

    stable: VersionId
    canary: VersionId | None = None
    percent: int = 0


def wanted(rollout: Rollout) -> Wanted | None:
    """What the alias must mean while this is its newest rollout; None where the rollout leaves it alone."""
    if rollout.stage in ("live", "retired") or rollout.percent == 100:
        return Wanted(rollout.version)
    if rollout.incumbent is None:
        return None
    if rollout.stage == "canary":
        return Wanted(rollout.incumbent, rollout.version, rollout.percent)
    return Wanted(rollout.incumbent)


def waiting_for(rollout: Rollout, facts: Facts, now_s: float) -> str:
    """What stands between a rollout and its next stage, in words for whoever watches."""
    policy = rollout.policy
    if rollout.stage == "registered":
        return "its verdict: springtide evaluate" if policy.gate else "control"
    if rollout.stage == "warming" or rollout.percent == 100:
        ready = f"{facts.warmth.ready} of {facts.warmth.replicas} replicas are ready" if facts.warmth else "replicas"
        return facts.warmth.waits if facts.warmth and facts.warmth.waits else ready
    if rollout.stage == "canary":
        left_s = max(0.0, policy.max_step_s - (now_s - rollout.since_s))
        return f"{_lacks(rollout, facts, now_s)} at {rollout.percent} %, for {left_s:.0f} s more at most"
    return ""


def _lacks(rollout: Rollout, facts: Facts, now_s: float) -> str:
    """What a canary needs for its next step."""
    policy = rollout.policy
    seconds = max(0.0, policy.min_step_s - (now_s - rollout.since_s))
    requests = max(0, policy.min_requests - (in_step(rollout, facts.comparison) if facts.comparison else 0))
    return " and ".join([*([f"{seconds:.0f} s"] if seconds else []), f"{requests} more requests"])
