"""The table of every metric that Springtide exports. `cluster.control.metrics` says the values of most, a job's workers those of theirs.

They are Ray's own kind (`ray.util.metrics`): the actor that sets one hands it over every 10 s to the agent of its node, which serves it in
Prometheus' text form with ``ray_`` before its name. Scrape ``http://HOST:PORT/metrics`` of every node:

- on the local pool HOST is ``pool.host`` (127.0.0.1) and PORT is ``pool.agent_ports`` + 4 (`metrics_port`; 28504 unless configured);
  the port binds to loopback where the pool does, and asks for no token;
- elsewhere ``GET /api/prometheus/sd`` on the dashboard's port, with the pool's token, lists every node's address for Prometheus' HTTP
  service discovery; KubeRay names port 8080.

Ray labels each series with the process that set it (``WorkerId``), so sum counters and histograms over that label: a restarted control
counts from zero, beside the series of the one before. A gauge that nobody sets ends within 20 s. A histogram's buckets are exact; Ray
computes its ``_sum`` from the middles of the buckets.
"""

from typing import Literal, NamedTuple

from ray.util.metrics import Counter, Gauge, Histogram

SECONDS = (0.25, 0.5, 1, 1.5, 2, 3, 4, 5, 7.5, 10, 15, 20, 30, 45, 60, 120, 300)


class Metric(NamedTuple):
    """``tags``: the labels of its series. None is called ``job``, which Prometheus keeps for itself."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    help: str
    tags: tuple[str, ...] = ()

    def make(self) -> Gauge | Counter | Histogram:
        """The instrument. It also works in a process without Ray; then nobody reads it."""
        if self.kind == "histogram":
            return Histogram(self.name, self.help, list(SECONDS), self.tags)
        return (Gauge if self.kind == "gauge" else Counter)(self.name, self.help, self.tags)


SLOTS = Metric("springtide_slots", "gauge", "Slots held, by owner: serving, training or idle.", ("owner",))
FLEET_SLOTS = Metric("springtide_fleet_slots", "gauge", "A fleet's slots: its grant, and those that it lacks.", ("fleet", "part"))
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
METRICS = (SLOTS, FLEET_SLOTS, JOB_SLOTS, LEASE, WANTED, WAITING, DECISIONS, SLOTS_FREE, TRAINING_AGAIN, CHECKPOINTS)
