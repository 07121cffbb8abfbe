"""Jobs as control sees them: it submits, lists and cancels them, and reads their logs.

A job's record is in the store (`cluster.store.jobs`). The job's driver writes the record, and tells control about once a second where the job
is. `cluster.control.lost_jobs` writes the result of a job whose driver cannot.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from cluster import jobspec, logs
from cluster.control.job_census import Census
from cluster.control.job_logs import JobLogs
from cluster.control.lost_jobs import Drivers, JobReaper
from cluster.errors import BadRequest, JobNotFound, PoolUnavailable, SpringtideError
from cluster.pool.submit import STOP_S, JobServer
from cluster.store.jobs import JobResult, JobSnapshot, JobSpec, JobStatus, JobStore, document
from cluster.store.registry import Registry
from cluster.types import check_name

REAP_S = 2
"""How often control looks at the jobs that have not ended."""
END_S = 2 * STOP_S
"""How long a cancelled job may take to end."""

log = logs.logger(__name__)


class JobService:
    """What the control actor does for jobs. Every method may be called from any thread."""

    def __init__(
        self, registry: Registry, server: Callable[[], JobServer], configured: Callable[[], Iterable[object]] = tuple
    ) -> None:
        """``server``: Ray's job server, connected to when it is first needed. Raises `PoolUnavailable`. ``configured``: the files that the
        configuration names."""
        self.server, self.configured = server, configured
        self.drivers = Drivers()
        self.logs = JobLogs(server)
        self._use(registry)

    def configure(self, registry: Registry) -> None:
        """Take over another store. Where it is the same, as at every start of a gateway, all that is known of its jobs stays known."""
        if registry is not self.registry:
            self._use(registry)

    def _use(self, registry: Registry) -> None:
        self.registry, self.store = registry, registry.store
        self.jobs = JobStore(self.store)
        self.reaper = JobReaper(self.jobs, registry.catalog, self.server, self.drivers)
        self.census = Census(self.jobs, self.reaper.find, self.configured)

    def start(self) -> None:
        threading.Thread(target=self._run, daemon=True, name="jobs-loop").start()

    def progress(self, id: str, snapshot: dict[str, Any]) -> bool:
        """A driver reports where its job is. Returns whether somebody cancelled the job."""
        self.reaper.watch(id)
        return self.drivers.tell(id, JobSnapshot.model_validate(snapshot))

    def listed(self, limit: int = 20) -> list[dict[str, Any]]:
        """The newest jobs, the newest first, as `get` describes them."""
        found: list[dict[str, Any]] = []
        for id in self.jobs.by_age()[: max(0, min(limit, 1000))]:
            with contextlib.suppress(JobNotFound):  # a name that is no job's, or a record whose specification somebody removed
                found.append(self.get(id))
        return found

    def get(self, id: str) -> dict[str, Any]:
        """One job; see `cluster.store.jobs.document`. Raises `JobNotFound`."""
        live = self.drivers.live(id)
        record = self.jobs.record(id, events=live is None)
        if record.result is None and live is None:
            self.reaper.watch(id)
            self.reaper.reap(id)
            record = self.jobs.record(id)
        return document(record, True if live else None, live)

    def events(self, id: str, limit: int = 100) -> list[dict[str, Any]]:
        """The newest of what happened to a job, oldest first: ``[{"at_s", "kind", "words", "data"}, …]``. None for one of the older jobs that have
        ended (`cluster.control.job_census`). Raises `JobNotFound`."""
        self.jobs.record(id, events=False)
        events = self.jobs.events(id, min(limit, 1000))
        return [event.model_dump(mode="json", exclude={"schema_version"}) for event in events]

    def submit(self, verb: str, options: dict[str, Any], author: str) -> str:
        """Start a job that came over HTTP, and return its id. Raises `BadRequest` or `ModelNotFound` for a mistake that shows before it starts."""
        asked = jobspec.parse(verb, options)
        jobspec.check_remote(asked)
        self._check_names(asked.document())
        id = jobspec.new_id(verb)
        self.jobs.create(JobSpec(id=id, verb=verb, options=asked.recorded(), owner=author, created_s=time.time()))
        try:
            self.server().start(id, asked, {jobspec.ORIGIN: "http"})
        except SpringtideError as error:
            self.jobs.finish(id, JobResult(status=JobStatus.FAILED, ended_s=time.time(), message=str(error), code=error.code))
            raise
        self.reaper.watch(id)
        return id

    def cancel(self, id: str, author: str) -> dict[str, Any]:
        """End a job, and remove its checkpoints. Versions that it has registered stay. A job that has ended keeps its result.

        Raises `Damaged` if its order or its result cannot be read. The job is not asked to end then.
        """
        record = self.jobs.record(id)
        if self.jobs.result(id) is None:
            self.jobs.ask_to_cancel(id, author)
            self.drivers.ask_to_end(id)
            if record.spec is None or record.spec.submitted:
                self.server().stop(id)
            deadline_s = time.monotonic() + END_S
            while not self.reaper.cancelled(id, author):
                if time.monotonic() > deadline_s:
                    raise PoolUnavailable(f"{id} is being cancelled and has not ended yet.", "See `springtide jobs`.")
                time.sleep(0.1)
        return self.get(id)

    def log(self, id: str, offset: int = 0) -> dict[str, Any]:
        """See `JobLogs.read`."""
        record = self.jobs.record(id)
        return self.logs.read(record, self.drivers.last(record), offset)

    def _check_names(self, given: dict[str, Any]) -> None:
        for option in ("base", "teacher", "student"):
            if model := given.get(option):
                self.registry.resolve(model)
        if (run := given.get("resume")) and not self.store.children(f"runs/{check_name(run)}"):
            raise BadRequest(f"There is no run {run}.", "A run that ended or was cancelled cannot be resumed.", "resume")

    def _run(self) -> None:
        while True:
            try:
                self.census.go_on()
                for id in self.reaper.watched():
                    self.reaper.reap(id)
            except Exception:
                # The store or Ray's job server is away for a moment. A thread that ended would let lost jobs look alive for ever.
                log.exception("a look at the jobs")
            time.sleep(REAP_S)
