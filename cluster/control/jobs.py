"""Jobs as control sees them: it submits, lists and ends them, and writes the end of those whose driver cannot.

A job's record is in the store (`cluster.store.jobs`); its driver writes it and tells control, about once a second, where the job is. Example:
a driver is killed by SIGKILL. It tells nothing more, after `SILENT_S` control asks Ray, Ray says that the process has ended, the record has
no result, so control writes one: ``lost``, with what to do.
"""

import codecs
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from cluster import jobspec, logs
from cluster.errors import BadRequest, JobNotFound, PoolUnavailable, SpringtideError
from cluster.pool.submit import STOP_S, JobServer, RayJob
from cluster.store.jobs import (
    Damaged,
    JobRecord,
    JobResult,
    JobSnapshot,
    JobSpec,
    JobStatus,
    JobStore,
    born,
    document,
)
from cluster.store.registry import Registry
from cluster.types import check_name

SETTLE_S = 2
"""How often jobs whose drivers are silent are looked at."""
SILENT_S = 8
"""A driver that has told nothing for this long is looked for: it tells something every three seconds."""
STALE_S = 90
"""How old the newest object of a record must be before a job is lost that Ray does not know: it may have been started from a shell, or by
another Ray on the same store, and then only its record says that it lives, every thirty seconds."""
KNOWN = 200
"""The newest jobs, of which a control that has just started finds those without a result."""
END_S = 2 * STOP_S
LOG_BYTES = 1 << 20
"""The most of a log that one answer holds."""
LOG_S = 2
"""How long a log that only Ray's server can read is kept: it sends the whole of it every time."""

log = logs.logger(__name__)


class Facts(NamedTuple):
    """What is known of a job whose driver is silent."""

    spec: JobSpec
    last: JobSnapshot | None
    ray: RayJob | None
    """None where Ray does not know it."""
    silent_s: float
    """Since its driver spoke, or since control could have heard it."""
    stale_s: float
    """Since the newest object of its record was written."""
    asked_by: str
    """Who asked for its end; empty where nobody did."""
    resumable: bool
    """Whether its run has a checkpoint."""


def verdict(facts: Facts, now_s: float) -> JobResult | None:
    """How a job ended that could not say it itself; None while it may live. Pure."""
    ray = facts.ray
    if facts.silent_s < SILENT_S or (facts.stale_s < STALE_S if ray is None else not ray.ended):
        return None
    go_on = f" Go on with: springtide train --resume {facts.last.run}" if facts.resumable and facts.last else " Submit it again."

    def ended(status: JobStatus, message: str) -> JobResult:
        return JobResult(status=status, ended_s=now_s, message=message, last=facts.last)

    if facts.asked_by:
        return ended(JobStatus.CANCELLED, f"Cancelled by {facts.asked_by}.")
    if ray is None:
        return ended(JobStatus.LOST, f"Its driver is gone, and the pool that ran it does not know it any more.{go_on}")
    if ray.status == "STOPPED":
        return ended(JobStatus.CANCELLED, f"It was ended from outside.{go_on}")
    if ray.status == "SUCCEEDED":
        return ended(JobStatus.SUCCEEDED, "Its process ended well, and could not write what it made.")
    if ray.killed:
        return ended(JobStatus.LOST, f"Its driver was killed.{go_on}")
    return ended(JobStatus.FAILED, ray.last_words)


class JobService:
    """What the control actor does for jobs. Every method may be called from any thread."""

    def __init__(self, registry: Registry, server: Callable[[], JobServer]) -> None:
        """``server``: Ray's job server, connected to when it is first needed. Raises `PoolUnavailable`."""
        self.server = server
        self.began_s = time.monotonic()
        self.lock = threading.Lock()
        self.heard: dict[str, tuple[float, JobSnapshot]] = {}
        """Id → (when, what its driver told)."""
        self.unfinished: set[str] = set()
        self.cancelling: set[str] = set()
        """Those whose end somebody asked for: a driver that Ray did not start hears of it here."""
        self.looked_s: dict[str, float] = {}
        self.kept_logs: dict[str, tuple[float, bytes]] = {}
        self.configure(registry)

    def configure(self, registry: Registry) -> None:
        self.registry, self.store = registry, registry.store
        self.jobs = JobStore(self.store)

    def start(self) -> None:
        threading.Thread(target=self._run, daemon=True, name="jobs-loop").start()

    # drivers

    def progress(self, id: str, snapshot: dict[str, Any]) -> bool:
        """A driver tells where its job is. Returns whether somebody asked for its end."""
        with self.lock:
            self.heard[id] = (time.monotonic(), JobSnapshot.model_validate(snapshot))
            self.unfinished.add(id)
            return id in self.cancelling

    # whoever asks

    def listed(self, limit: int = 20) -> list[dict[str, Any]]:
        """The newest jobs, the newest first, as `get` describes them."""
        return [self._described(id) for id in self._newest(max(0, min(limit, 1000)))]

    def get(self, id: str) -> dict[str, Any]:
        """One job; see `cluster.store.jobs.document`. Raises `JobNotFound`."""
        return self._described(id)

    def submit(self, verb: str, options: dict[str, Any], author: str) -> str:
        """Start a job that came over HTTP, and return its id. Raises `BadRequest` or `ModelNotFound` for what can be known now."""
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
        with self.lock:
            self.unfinished.add(id)
        return id

    def cancel(self, id: str, author: str) -> dict[str, Any]:
        """End a job, and remove what it kept to be resumed. What it has registered stays, and so does the end of one that has ended."""
        record = self.jobs.record(id)
        if record.result is None:
            self.jobs.ask_to_cancel(id, author)
            with self.lock:
                self.cancelling.add(id)
            if record.spec is None or record.spec.submitted:
                self.server().stop(id)
            self._await_end(id, author)
        return self.get(id)

    def logs(self, id: str, offset: int = 0) -> dict[str, Any]:
        """``{"text", "next"}``: a job's log from byte ``offset`` on, at most `LOG_BYTES` of it, and where to go on. Raises `JobNotFound`."""
        if offset < 0:
            raise BadRequest("offset is below 0.", "Send the `next` of the answer before.", "offset")
        raw = self._log(id, offset)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = decoder.decode(raw)  # a character that is cut off comes with the next answer
        return {"text": text, "next": offset + len(raw) - len(decoder.getstate()[0])}

    # inside

    def _check_names(self, given: dict[str, Any]) -> None:
        if base := given.get("base"):
            self.registry.meant(base)
        if (run := given.get("resume")) and not self.store.children(f"runs/{check_name(run)}"):
            raise BadRequest(
                f"There is no run {run}.", "One that ended, or was cancelled, leaves nothing to go on from.", "resume"
            )

    def _newest(self, limit: int) -> list[str]:
        """Ids by age, the newest first. Ours say their age; of others the specs are read, once each."""

        def created_s(id: str) -> float:
            try:
                return born(id) or self.jobs.spec(id).created_s
            except (Damaged, JobNotFound):
                return 0

        return sorted(self.jobs.ids(), key=created_s, reverse=True)[:limit]

    def _described(self, id: str) -> dict[str, Any]:
        with self.lock:
            told_s, live = self.heard.get(id, (0.0, None))
        if live is None or time.monotonic() - told_s > SILENT_S:
            self._settle(id)
            live = None
        record = self.jobs.record(id, events=live is None)
        if record.result is None:
            with self.lock:
                self.unfinished.add(id)
        return document(record, True if live else None, live)

    def _await_end(self, id: str, author: str) -> None:
        deadline_s = time.monotonic() + END_S
        while self.jobs.result(id) is None:
            record, ray = self.jobs.record(id), self._ray(id)
            if ray.ended if ray else stale_s(record) > STALE_S:
                last, words = self._last(record), f"Cancelled by {author}."
                self.jobs.finish(id, JobResult(status=JobStatus.CANCELLED, ended_s=time.time(), message=words, last=last))
            elif time.monotonic() > deadline_s:
                raise PoolUnavailable(f"{id} was asked to end, and has not ended yet.", "See `springtide jobs`.")
            else:
                time.sleep(0.1)
        self.forget(id)

    def _run(self) -> None:
        found = False
        while True:
            try:
                found = found or self._find()
                with self.lock:
                    ids = list(self.unfinished)
                for id in ids:
                    self._settle(id)
            except Exception:
                # The store or Ray's job server is away for a moment. A thread that ended would let lost jobs look alive for ever.
                log.exception("a look at the jobs")
            time.sleep(SETTLE_S)

    def _find(self) -> bool:
        """Jobs that a control before this one knew, and that have not ended."""
        for id in self._newest(KNOWN):
            try:
                if self.jobs.result(id) is None:
                    asked = self.jobs.cancel_asked(id) is not None
                    with self.lock:
                        self.unfinished.add(id)
                        self.cancelling |= {id} if asked else set()
            except Damaged:
                continue  # its own job only
        return True

    def _settle(self, id: str) -> None:
        """Write the end of a job whose driver cannot, and forget one that has ended."""
        now_s = time.monotonic()
        with self.lock:
            looked_s, self.looked_s[id] = self.looked_s.get(id, float("-inf")), now_s
        if self._silent_s(id) < SILENT_S or now_s - looked_s < SETTLE_S / 2:
            return
        try:
            record = self.jobs.record(id)
            if record.result is not None:
                return self.forget(id)
            if record.spec is None:
                return
            last, asked = self._last(record), self.jobs.cancel_asked(id)
            ray = self._ray(id) if record.spec.submitted else None
            facts = Facts(
                record.spec,
                last,
                ray,
                self._silent_s(id),
                stale_s(record),
                asked.author if asked else "",
                bool(last and last.run and self._checkpoints(last.run)),
            )
            if (result := verdict(facts, time.time())) is not None:
                self.jobs.finish(id, result)
                log.warning("job %s: %s", id, result.message)
                self.forget(id)
        except (Damaged, JobNotFound):
            return  # its own job only, and `document` shows the damage
        except PoolUnavailable:
            return  # Ray's job server is away, so nothing is known

    def forget(self, id: str) -> None:
        """Forget a job that has ended. Of one that somebody cancelled nothing is kept; nor of one that could not go on from it."""
        record = self.jobs.record(id)
        with self.lock:
            self.unfinished.discard(id)
            self.cancelling.discard(id)
            self.looked_s.pop(id, None)
            _, live = self.heard.pop(id, (0.0, None))
        if record.result is None:
            return
        last = record.result.last or live
        run = last.run if last and last.run else id
        cancelled = record.result.status == JobStatus.CANCELLED and self.jobs.cancel_asked(id) is not None
        useless = record.result.status.ended and not self._checkpoints(run)
        if (cancelled or useless) and not self._used(run, id):
            self.store.remove(f"runs/{run}")

    def _used(self, run: str, by: str) -> bool:
        """Whether another job that has not ended trains the run."""
        with self.lock:
            others = [id for id in self.unfinished if id != by]
        for id in others:
            try:
                last = self._last(self.jobs.record(id))
            except JobNotFound:
                continue
            if id == run or (last and last.run == run):
                return True
        return False

    def _checkpoints(self, run: str) -> bool:
        return any(name.isdigit() or name == "result" for name in self.store.children(f"runs/{run}"))

    def _last(self, record: JobRecord) -> JobSnapshot | None:
        with self.lock:
            _, live = self.heard.get(record.id, (0.0, None))
        written = record.result.last if record.result else record.newest.snapshot if record.newest else None
        return live if live and (written is None or live.at_s >= written.at_s) else written

    def _silent_s(self, id: str) -> float:
        with self.lock:
            told_s, _ = self.heard.get(id, (self.began_s, None))
        return time.monotonic() - told_s

    def _ray(self, id: str) -> RayJob | None:
        return self.server().state(id)

    def _log(self, id: str, offset: int) -> bytes:
        record = self.jobs.record(id)
        last = self._last(record)
        here = Path(last.log) if last and last.log and last.host == socket.gethostname() else None
        if here is not None and here.name == f"job-driver-{id}.log" and here.is_file():  # Ray's name: no other file is read out
            with here.open("rb") as file:
                file.seek(offset)
                return file.read(LOG_BYTES)
        if record.spec is not None and not record.spec.submitted:
            raise JobNotFound(f"The log of {id} is not here.", "It was started from a shell, and printed there.", "job")
        return self._sent_log(id)[offset : offset + LOG_BYTES]

    def _sent_log(self, id: str) -> bytes:
        """Of a job on another machine, or one that has not begun."""
        kept_s, raw = self.kept_logs.get(id, (float("-inf"), b""))
        if time.monotonic() - kept_s > LOG_S:
            raw = self.server().log(id).encode()
            self.kept_logs = {id: (time.monotonic(), raw)}
        return raw


def stale_s(record: JobRecord) -> float:
    """How long ago the newest object of a record was written, in seconds."""
    written = [record.spec.created_s if record.spec else 0, record.newest.snapshot.at_s if record.newest else 0]
    return time.time() - max(written)
