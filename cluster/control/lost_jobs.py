"""Writes the result of a job whose driver cannot: SIGKILL killed the driver, or the head that ran it is gone.

Example: SIGKILL kills a driver, and its reports stop. After `SILENT_S` control asks Ray, and Ray says that the process has ended. The
job's record has no result, so control writes one: ``lost``, with what the user can do.
"""

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from cluster import logs
from cluster.control import clock
from cluster.errors import BadRequest, JobNotFound, PoolUnavailable
from cluster.pool.submit import JobServer, RayJob
from cluster.store.jobs import Damaged, JobRecord, JobResult, JobSnapshot, JobStatus, JobStore
from cluster.store.versions import Versions
from cluster.types import check_name

SILENT_S = 8
"""How long a driver may be silent before control asks Ray about it. A driver reports at least every three seconds."""
STALE_S = 90
"""A job that Ray does not know is lost once the newest object of its record is this old. Such a job may run in a shell, or under another Ray
on the same store. Then only its record shows that it lives, and its driver writes there every thirty seconds."""
LOOK_S = 1
"""Control looks at one job at most this often."""

log = logs.logger(__name__)


class JobFacts(NamedTuple):
    """What control knows about a job whose driver is silent."""

    last: JobSnapshot | None
    ray: RayJob | None
    """None where Ray does not know the job."""
    silent_s: float
    """Seconds since the driver's last report, or since this control started."""
    stale_s: float
    """Seconds since the newest object of the job's record was written."""
    asked_by: str
    """Who cancelled the job; empty where nobody did."""
    resumable: bool
    """Whether the run has a checkpoint."""


def how_it_ended(facts: JobFacts, now_s: float) -> JobResult | None:
    """The result of a job whose driver did not write one; None while the job may live. Pure."""
    ray = facts.ray
    if facts.silent_s < SILENT_S or (facts.stale_s < STALE_S if ray is None else not ray.ended):
        return None
    go_on = (
        f" Continue with: springtide train --resume {facts.last.run}" if facts.resumable and facts.last else " Submit it again."
    )

    def ended(status: JobStatus, message: str) -> JobResult:
        return JobResult(status=status, ended_s=now_s, message=message, last=facts.last)

    if facts.asked_by:
        return ended(JobStatus.CANCELLED, f"Cancelled by {facts.asked_by}.")
    if ray is None:
        return ended(JobStatus.LOST, f"Its driver is gone, and Ray no longer knows the job.{go_on}")
    if ray.status == "STOPPED":
        return ended(JobStatus.CANCELLED, f"It was stopped from outside.{go_on}")
    if ray.status == "SUCCEEDED":
        return ended(JobStatus.SUCCEEDED, "Its process ended without an error, but could not record what it made.")
    if ray.killed:
        return ended(JobStatus.LOST, f"Its driver was killed.{go_on}")
    return ended(JobStatus.FAILED, ray.last_words)


def stale_s(record: JobRecord) -> float:
    """How long ago the newest object of a record was written, in seconds. Of two clocks the one that says less counts: where the machine's
    was set ahead, `clock` was not, and where it was set back, drivers that write since are behind `clock`."""
    written = [record.spec.created_s if record.spec else 0, record.newest.snapshot.at_s if record.newest else 0]
    return min(time.time(), clock.now_s()) - max(written)


def _safe(run: str) -> bool:
    """Whether a stored name may become a path. Example: ``../versions`` may not: removing that run would remove every version."""
    try:
        return bool(check_name(run))
    except BadRequest:
        return False


class Drivers:
    """The drivers' progress reports. A driver says about once a second where its job is."""

    def __init__(self) -> None:
        self.began_s = time.monotonic()
        self.lock = threading.Lock()
        self.told: dict[str, tuple[float, JobSnapshot]] = {}
        self.cancelling: set[str] = set()
        """Cancelled jobs. A driver that Ray did not start learns of it from the answer to its report."""

    def tell(self, id: str, snapshot: JobSnapshot) -> bool:
        """Note a report. Returns whether somebody cancelled the job."""
        with self.lock:
            self.told[id] = (time.monotonic(), snapshot)
            return id in self.cancelling

    def ask_to_end(self, id: str) -> None:
        with self.lock:
            self.cancelling.add(id)

    def silent_s(self, id: str) -> float:
        """Seconds since the driver's last report, or since this control started."""
        with self.lock:
            told_s, _ = self.told.get(id, (self.began_s, None))
        return time.monotonic() - told_s

    def live(self, id: str) -> JobSnapshot | None:
        """Where the job is; None where its driver has been silent for `SILENT_S`."""
        with self.lock:
            told_s, snapshot = self.told.get(id, (0.0, None))
        return snapshot if time.monotonic() - told_s < SILENT_S else None

    def last(self, record: JobRecord) -> JobSnapshot | None:
        """Where the job is or was: the newer of its last report and its record."""
        with self.lock:
            _, told = self.told.get(record.id, (0.0, None))
        written = record.result.last if record.result else record.newest.snapshot if record.newest else None
        return told if told and (written is None or told.at_s >= written.at_s) else written

    def forget(self, id: str) -> None:
        with self.lock:
            self.told.pop(id, None)
            self.cancelling.discard(id)


class JobReaper:
    """Watches the jobs that have not ended, and writes the results of those whose drivers cannot. Any thread may call any method."""

    def __init__(self, jobs: JobStore, versions: Versions, server: Callable[[], JobServer], drivers: Drivers) -> None:
        self.jobs, self.store, self.server, self.drivers = jobs, jobs.store, server, drivers
        self.versions = versions
        self.lock = threading.Lock()
        self.unfinished: set[str] = set()
        self.looked_s: dict[str, float] = {}

    def watch(self, id: str) -> None:
        with self.lock:
            self.unfinished.add(id)

    def watched(self) -> set[str]:
        with self.lock:
            return set(self.unfinished)

    def find(self, ids: list[str]) -> None:
        """Watch those of ``ids`` that have no result yet. An earlier control may have watched them."""
        for id in ids:
            try:
                if self.jobs.result(id) is None:
                    self.watch(id)
                    if self.jobs.cancel_asked(id):
                        self.drivers.ask_to_end(id)
            except Damaged:
                continue  # its own job only

    def reap(self, id: str) -> None:
        """Write the result of a job whose driver is gone, and forget a job that has a result."""
        now_s = time.monotonic()
        with self.lock:
            looked_s = self.looked_s.get(id, float("-inf"))
            if self.drivers.silent_s(id) < SILENT_S or now_s - looked_s < LOOK_S:
                return
            self.looked_s[id] = now_s
        try:
            record = self.jobs.record(id)
            if record.result is None and (result := how_it_ended(self._facts(record), time.time())) is not None:
                self.jobs.finish(id, result)
                log.warning("job %s: %s", id, result.message)
            if record.result or self.jobs.result(id):
                self.forget(id)
        except (Damaged, JobNotFound):
            return  # its own job only, and `document` shows the damage
        except PoolUnavailable:
            return  # Ray's job server is away, so nothing is known

    def cancelled(self, id: str, author: str) -> bool:
        """Whether a cancelled job has ended. Writes the result where the driver did not."""
        record, ray = self.jobs.record(id), self.server().state(id)
        if record.result is None:
            if not ray.ended if ray else stale_s(record) < STALE_S:
                return False
            words = f"Cancelled by {author}."
            last = self.drivers.last(record)
            self.jobs.finish(id, JobResult(status=JobStatus.CANCELLED, ended_s=time.time(), message=words, last=last))
        self.forget(id)
        return True

    def forget(self, id: str) -> None:
        """Forget a job that has ended. Remove its run's interim versions, and its run's files where the run has no checkpoint, or somebody
        cancelled the job."""
        record = self.jobs.record(id)
        if record.result is None:
            return
        last = self.drivers.last(record)
        run = last.run if last and last.run else id
        self.drivers.forget(id)
        with self.lock:
            self.unfinished.discard(id)
            self.looked_s.pop(id, None)
        if not _safe(run):
            log.error("job %s names its run %r, which is no run's name: nothing is removed", id, run[:80])
            return
        cancelled = record.result.status == JobStatus.CANCELLED and self.jobs.cancel_asked(id) is not None
        if self._trained(run):
            return
        if cancelled or not self._resumable(run):
            self.store.remove(f"runs/{run}")
            self.versions.remove_interims(run)
        else:  # whoever resumes it makes new ones
            for version in self.versions.interims(run):
                self.versions.remove(version)

    def _facts(self, record: JobRecord) -> JobFacts:
        last, asked = self.drivers.last(record), self.jobs.cancel_asked(record.id)
        ray = self.server().state(record.id) if record.spec is None or record.spec.submitted else None
        resumable = bool(last and last.run and self._resumable(last.run))
        return JobFacts(last, ray, self.drivers.silent_s(record.id), stale_s(record), asked.author if asked else "", resumable)

    def _resumable(self, run: str) -> bool:
        """Whether the run has a checkpoint, or a result that no job has registered."""
        return _safe(run) and any(name.isdigit() or name == "result" for name in self.store.children(f"runs/{run}"))

    def _trained(self, run: str) -> bool:
        """Whether a job that has not ended is training the run."""
        for id in self.watched():
            try:
                last = self.drivers.last(self.jobs.record(id))
            except JobNotFound:
                continue
            if id == run or (last and last.run == run):
                return True
        return False
