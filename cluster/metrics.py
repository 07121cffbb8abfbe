"""Every metric that Springtide exports, in one table, and the tide's values for them.

They are Ray's own kind (`ray.util.metrics`): the actor that sets one hands it over every 10 s to the agent of its node, which serves it in
Prometheus' text form with ``ray_`` before its name. Scrape ``http://HOST:PORT/metrics`` of every node:

- on the local pool HOST is ``pool.host`` (127.0.0.1) and PORT is ``pool.agent_ports`` + 4 (`metrics_port`; 28504 unless configured);
  the port binds to loopback where the pool does, and asks for no token;
- elsewhere ``GET /api/prometheus/sd`` on the dashboard's port, with the pool's token, lists every node's address for Prometheus' HTTP
  service discovery; KubeRay names port 8080.

Ray labels each series with the process that gave it (``WorkerId``), so counters and histograms are summed over it: a control that was
started again counts from zero beside the old one's series. A gauge that nobody sets ends within 20 s. The buckets of a histogram are
exact; Ray fills ``_sum`` in from their middles.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from ray.util.metrics import Counter, Gauge, Histogram

from cluster import logs
from cluster.capacity.allocator import GrantChange
from cluster.capacity.arbiter import SERVING
from cluster.capacity.handover import Allocation, Handover, SlotSnapshot, ended_since

TRAINING, IDLE = "training", "idle"
MOST_JOBS = 64
"""Jobs with series of their own at a time, those that hold slots first. All count in the sums."""
RECENT = 500
"""How many of the last snapshots are searched for the hand-over that ended: one that takes longer than that many changes is timed too short."""
PARTS = ("grant", "held", "active")
TELLS = {"gauge": "set", "counter": "inc", "histogram": "observe"}
SECONDS = (0.25, 0.5, 1, 1.5, 2, 3, 4, 5, 7.5, 10, 15, 20, 30, 45, 60, 120, 300)

log = logs.logger(__name__)


class Metric(NamedTuple):
    """``tags``: the labels of its series. None is called ``job``, which Prometheus keeps for itself."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    help: str
    tags: tuple[str, ...] = ()

    def make(self) -> Gauge | Counter | Histogram:
        """The instrument. Works in a process without Ray as well, and then nobody reads it."""
        if self.kind == "histogram":
            return Histogram(self.name, self.help, list(SECONDS), self.tags)
        return (Gauge if self.kind == "gauge" else Counter)(self.name, self.help, self.tags)


SLOTS = Metric("springtide_slots", "gauge", "Slots held, by owner: serving, training or idle.", ("owner",))
JOB_SLOTS = Metric("springtide_job_slots", "gauge", "A job's slots: its grant, those held, those active.", ("job_id", "part"))
LEASE = Metric("springtide_lease_slots", "gauge", "Slots that serving may have.")
WANTED = Metric("springtide_wanted_slots", "gauge", "Slots that serving holds and asks for.")
WAITING = Metric("springtide_waiting_jobs", "gauge", "Jobs that hold no slot and have been given none.")
DECISIONS = Metric(
    "springtide_decisions_total",
    "counter",
    "Changes of a grant, by owner (serving, training) and act (grow, shrink).",
    ("owner", "act"),
)
SLOTS_FREE = Metric(
    "springtide_handover_slots_free_seconds", "histogram", "From a decision until the job had given its slots back.", ("kind",)
)
TRAINING_AGAIN = Metric(
    "springtide_handover_training_seconds", "histogram", "From a decision until the job trained on all that it has.", ("kind",)
)
CHECKPOINTS = Metric(
    "springtide_checkpoints_total",
    "counter",
    "Checkpoints of a job, by outcome: written or failed. Its workers tell these themselves.",
    ("job_id", "outcome"),
)
METRICS = (SLOTS, JOB_SLOTS, LEASE, WANTED, WAITING, DECISIONS, SLOTS_FREE, TRAINING_AGAIN, CHECKPOINTS)


class Sample(NamedTuple):
    """One value: a gauge's level, what a counter grows by, or one observation. ``tags`` in the metric's order."""

    metric: Metric
    value: float
    tags: tuple[str, ...] = ()


# what is to be said: pure


def levels(snapshot: SlotSnapshot, before: Iterable[str] = ()) -> list[Sample]:
    """The gauges at ``snapshot``. ``before``: jobs that had series of their own; those that have left are set to 0 once and then end."""
    training = sum(one.held for one in snapshot.jobs)
    slots = [
        Sample(SLOTS, n, (owner,)) for owner, n in ((SERVING, snapshot.serving), (TRAINING, training), (IDLE, snapshot.idle))
    ]
    waiting = sum(1 for one in snapshot.jobs if one.held == one.grant == 0)
    totals = [Sample(LEASE, snapshot.lease), Sample(WANTED, snapshot.wanted), Sample(WAITING, waiting)]
    left = [Allocation(job, 0, 0, 0) for job in before if job not in {one.job for one in snapshot.jobs}]
    of = [(one.job, part, getattr(one, part)) for one in (*named(snapshot), *left) for part in PARTS]
    parts = [Sample(JOB_SLOTS, slots, (job, part)) for job, part, slots in of]
    return [*slots, *totals, *parts]


def named(snapshot: SlotSnapshot) -> list[Allocation]:
    """The jobs with series of their own."""
    return sorted(snapshot.jobs, key=lambda one: -max(one.held, one.grant))[:MOST_JOBS]


def decided(changes: Iterable[GrantChange]) -> list[Sample]:
    """One for each change of somebody's grant."""
    return [
        Sample(
            DECISIONS, 1, (SERVING if change.owner == SERVING else TRAINING, "grow" if change.after > change.before else "shrink")
        )
        for change in changes
    ]


def took(done: Iterable[Handover]) -> list[Sample]:
    """The seconds of hand-overs that were carried out."""
    both = (
        (one.kind, metric, s) for one in done for metric, s in ((SLOTS_FREE, one.slots_free_s), (TRAINING_AGAIN, one.training_s))
    )
    return [Sample(metric, max(0.0, seconds), (kind,)) for kind, metric, seconds in both if seconds is not None]


# saying it


class Board:
    """The instruments, and what they were told already: every decision and every hand-over counts once."""

    def __init__(self) -> None:
        self.instruments: dict[str, Any] = {}
        self.jobs: tuple[str, ...] = ()
        self.change: GrantChange | None = None
        self.snapshot: SlotSnapshot | None = None
        self.failing = False

    def news(self, snapshots: Sequence[SlotSnapshot], changes: Sequence[GrantChange]) -> list[Sample]:
        """What has to be said now."""
        if not snapshots:
            return []
        said = [*levels(snapshots[-1], self.jobs), *decided(self._since(changes)), *took(self._ended(snapshots))]
        self.jobs = tuple(one.job for one in named(snapshots[-1]))
        self.change, self.snapshot = (changes[-1] if changes else None), snapshots[-1]
        return said

    def _since(self, changes: Sequence[GrantChange]) -> list[GrantChange]:
        """Those after the last that was counted, which is known by identity: clocks may go back."""
        new: list[GrantChange] = []
        for change in reversed(changes):
            if change is self.change:
                break
            new.append(change)
        return new

    def _ended(self, snapshots: Sequence[SlotSnapshot]) -> list[Handover]:
        """Hand-overs that ended since. Where nothing was recorded since, none did."""
        if snapshots[-1] is self.snapshot:
            return []
        since_s = self.snapshot.at_s if self.snapshot else float("-inf")
        return ended_since(list(snapshots)[-RECENT:], since_s)

    def tell(self, sample: Sample) -> None:
        name, kind, _, keys = sample.metric
        if name not in self.instruments:
            self.instruments[name] = sample.metric.make()
        instrument, tags = self.instruments[name], dict(zip(keys, sample.tags, strict=True))
        getattr(instrument, TELLS[kind])(float(sample.value), tags)


def publish(board: Board, snapshots: Sequence[SlotSnapshot], changes: Sequence[GrantChange]) -> None:
    """Tell Ray's agent how the tide stands and what has happened since the last call. Never raises: who calls has more important things
    to do than to be watched. Gauges are to be set again and again, or they end."""
    try:
        for sample in board.news(snapshots, changes):
            board.tell(sample)
        board.failing = False
    except Exception:
        if not board.failing:
            log.exception("the tide's metrics")
        board.failing = True
