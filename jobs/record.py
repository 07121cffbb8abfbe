"""Writes the record of a job while it runs: what was asked, what happens, and how it ended. It also reports to control where the job is.

>>> with record(config, options) as job:              # doctest: +SKIP
...     job.note("waiting for slots: serving has 3", waiting="slots: serving has 3")  # in the store within `FLUSH_S`, at control within `TELL_S`
...     job.watch(progress)
...     job.made(version="seedling@2")

One thread writes to the store, another reports to control. A store or a control that does not answer never stops the job: what could not be
written is written later.
"""

import contextlib
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from cluster import machine
from cluster.config import Config
from cluster.errors import SpringtideError, StoreUnavailable
from cluster.jobspec import Options, new_id
from cluster.store.jobs import JobEvent, JobEvents, JobProgress, JobResult, JobSnapshot, JobSpec, JobStatus, JobStore
from cluster.store.objects import Store
from jobs.ray_job import submission_id
from jobs.training.progress import Committed, Progress

FLUSH_S = 3
"""Events are written at most this often."""
QUIET_S = 30
"""Something is written at least this often. It shows that the driver lives, also to a control whose Ray did not start the job."""
OFTEN = 1 / 20
"""Progress alone is written after this part of a job's age: every 3 s in its first minute, every 30 s after ten."""
TELL_S = 1
"""The driver reports to control at most this often."""
SIGN_S = 3
"""The driver reports to control at least this often, so that control knows that it lives."""
AGAIN_S = 0.5
"""How soon a write that failed is tried again."""
LAST_S = 15
"""How long a job that ended by itself tries to write its result."""
STOPPED_S = 1
"""How long a job tries that was stopped from outside, because Ray kills it soon, or that ended because the store failed."""
KEPT = 1000
"""Events that wait for the store; above that the oldest are dropped."""
ASKED = (128 + signal.SIGTERM, signal.SIGTERM)
"""The exit status of a job that heard SIGTERM: `jobs.main`'s, and that of Ray's own handler, which replaces it in `ray.init`."""


class JobRecord:
    """The writer. Any thread may call its methods, and they return at once."""

    def __init__(self, store: JobStore, spec: JobSpec) -> None:
        self.store, self.spec, self.id = store, spec, spec.id
        self.snapshot = JobSnapshot(at_s=time.time(), log=log_file(), host=socket.gethostname())
        self.events: list[JobEvent] = []
        self.batch: JobEvents | None = None
        """What is being written. It stays the same until the store has it."""
        self.n, self.created = 1, False
        self.began_s, self.flushed_s = time.monotonic(), float("-inf")
        self.result: dict[str, Any] = {}
        self.ending: JobResult | None = None
        self.trouble = ""
        self.changed, self.done = threading.Condition(), threading.Event()

    # what the job says

    def watch(self, progress: Progress) -> None:
        """Note the progress. `jobs.training.drivers.driver.fit` calls this."""
        loss = progress.loss if math.isfinite(progress.loss) else None
        known = {**progress._asdict(), "loss": loss}
        self._say("progress", "", known, waiting="", progress=JobProgress(**known))

    def note(self, words: str, waiting: str = "") -> None:
        """Note what happened, in words. ``waiting``: what the job waits for now; empty if it waits for nothing."""
        begins = bool(waiting) and waiting != self.snapshot.waiting
        self._say("waiting" if begins else "message", words, waiting=waiting, message=words)

    def checkpoint(self, committed: Committed) -> None:
        """Its run can go on from here."""
        step, seconds, size_bytes = committed
        self._say(
            "checkpoint", f"the state after step {step} is kept", {"step": step, "seconds": seconds, "size_bytes": size_bytes}
        )

    def measured(self, step: int, metrics: dict[str, float]) -> None:
        """Note what was measured on held-out data after so many steps."""
        words = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self._say("measurement", f"after step {step}: {words}", {"step": step, **metrics})

    def sampled(self, step: int, facts: dict[str, float]) -> None:
        """Note how the answers were that a step learns from. Of several between two writes the last one is enough."""
        words = ", ".join(f"{name} {value:.4g}" for name, value in facts.items())
        self._say("rollouts", f"answers for step {step + 1}: {words}", {"step": step, **facts})

    def know(self, **facts: Any) -> None:
        """Note facts about the job: ``base``, ``dataset_sha256``, …"""
        self._say("fact", "", data=facts, facts={**self.snapshot.facts, **facts})

    def begin_run(self, run: str) -> None:
        """Note the run whose checkpoints this job writes from now on."""
        self._say("fact", "", data={"run": run}, run=run)

    def made(self, **result: Any) -> None:
        """Note what the job has made."""
        self.result |= result
        self.know(**result)

    def _say(self, kind: str, words: str, data: dict[str, Any] | None = None, **changed: Any) -> None:
        with self.changed:
            at_s = time.time()
            self.snapshot = self.snapshot.model_copy(update={"at_s": at_s, **changed})
            if kind in ("progress", "rollouts"):  # one of a batch is enough
                self.events = [event for event in self.events if event.kind != kind]
            self.events.append(JobEvent(at_s=at_s, kind=kind, words=words, data=data or {}))
            del self.events[:-KEPT]

    # its life

    def begin(self) -> None:
        threading.Thread(target=self._write, name="job-record", daemon=True).start()
        threading.Thread(target=self._tell, name="job-teller", daemon=True).start()

    def end(self, status: JobStatus, message: str = "", code: str = "", within_s: float = LAST_S) -> None:
        """Write the result, and wait until the store has it, at most ``within_s``."""
        with self.changed:
            self.snapshot = self.snapshot.model_copy(update={"waiting": "", "at_s": time.time()})
            self.ending = JobResult(
                status=status, ended_s=time.time(), message=message, code=code, made=self.result, last=self.snapshot
            )
            self.changed.notify_all()
        self.done.wait(within_s)

    # the threads

    def _write(self) -> None:
        while not self.done.is_set():
            if self._due(time.monotonic()):
                self._try(self._flush)
            if self.ending:
                self.done.wait(AGAIN_S if self.trouble else 0)
                continue
            with self.changed:
                self.changed.wait_for(lambda: self.ending is not None, FLUSH_S)

    def _due(self, now_s: float) -> bool:
        """What is only progress can wait: control hears of it at once."""
        progress_s = min(QUIET_S, max(FLUSH_S, OFTEN * (now_s - self.began_s)))
        with self.changed:
            news = [event.kind for event in self.events if event.kind != "progress"]
            waits = self.batch is not None or bool(news) or self.ending is not None
            return waits or now_s - self.flushed_s >= (progress_s if self.events else QUIET_S)

    def _flush(self) -> None:
        if not self.created:
            self.store.create(self.spec)
            self.created = True
        ending = self.ending
        while batch := self._next():
            self.n = self.store.append(self.id, batch) + 1
            self.batch, self.flushed_s = None, time.monotonic()
            if not ending:
                return  # the next object holds what came in meanwhile
        if ending:
            self.store.finish(self.id, ending)
            self.done.set()

    def _next(self) -> JobEvents | None:
        with self.changed:
            quiet = time.monotonic() - self.flushed_s >= QUIET_S
            if self.batch is None and (self.events or quiet):
                at_s = time.time() if quiet else self.snapshot.at_s
                self.snapshot = self.snapshot.model_copy(update={"at_s": at_s})
                self.batch = JobEvents(n=self.n, snapshot=self.snapshot, events=tuple(self.events))
                self.events = []
            return self.batch

    def _try(self, write: Callable[[], object]) -> None:
        """Write, where the store may be away for a while. The log says once that it is away, and once that it is back."""
        try:
            write()
        except Exception as error:  # noqa: BLE001 (this thread must live: without it the job would have no end)
            if not self.trouble:
                print(f"the job's record cannot be written, trying again: {error}", flush=True)
            self.trouble = str(error)
            return
        if self.trouble:
            print("the job's record is written again", flush=True)
            self.trouble = ""

    def _tell(self) -> None:
        """Report to control where the job is, once this process has joined the pool."""
        told, told_s = None, float("-inf")
        while not self.done.wait(TELL_S):
            ray, snapshot = sys.modules.get("ray"), self.snapshot
            # While another thread imports it, Ray is there and has nothing in it.
            initialized = getattr(ray, "is_initialized", None)
            if initialized is None or not initialized() or (snapshot is told and time.monotonic() - told_s < SIGN_S):
                continue
            # Control may be away, restarting, or of an older release; the record in the store is what counts.
            with contextlib.suppress(Exception):
                asked_to_end = tell(self.id, snapshot)
                told, told_s = snapshot, time.monotonic()
                if asked_to_end and not self.spec.submitted and not self.ending:
                    os.kill(os.getpid(), signal.SIGTERM)  # Ray ends those that it started


def tell(id: str, snapshot: JobSnapshot) -> bool:
    """Report to control. Returns whether somebody cancelled the job."""
    from cluster.control import client  # imports Ray, whose network must have been set up before

    return client.connect().progress(id, snapshot.model_dump(mode="json"))


@contextlib.contextmanager
def record(config: Config, options: Options) -> Iterator[JobRecord]:
    """Record the block as a job. An exception becomes the job's result, and is raised again."""
    job = JobRecord(JobStore(Store(config.store)), spec(options))
    job.begin()
    try:
        yield job
    except StoreUnavailable as error:
        job.end(JobStatus.FAILED, str(error), error.code, within_s=STOPPED_S)
        raise
    except SpringtideError as error:
        job.end(JobStatus.FAILED, str(error), error.code)
        raise
    except SystemExit as error:
        if error.code in ASKED or cancelled_by(job):  # Ray's own code, too, may end a process that is asked to
            job.end(JobStatus.CANCELLED, stopped(job), within_s=STOPPED_S)
        else:
            job.end(JobStatus.FAILED, f"It exited with {error.code}.")
        raise
    except KeyboardInterrupt:
        job.end(JobStatus.CANCELLED, stopped(job), within_s=STOPPED_S)
        raise
    except BaseException as error:
        job.end(JobStatus.FAILED, f"{type(error).__name__}: {error}", SpringtideError.code)
        raise
    job.end(JobStatus.SUCCEEDED)


def cancelled_by(job: JobRecord) -> str:
    """Who cancelled the job; empty where nobody did, or the store does not say."""
    with contextlib.suppress(SpringtideError):
        if asked := job.store.cancel_asked(job.id):
            return asked.author
    return ""


def stopped(job: JobRecord) -> str:
    """Why a job was stopped from outside, and what to do."""
    if author := cancelled_by(job):
        return f"Cancelled by {author}."
    go_on = f" Continue with --resume {job.snapshot.run}." if job.snapshot.run else ""
    return f"It was stopped from outside: the pool stopped, or somebody ended its process.{go_on}"


def spec(options: Options) -> JobSpec:
    """The job's spec. Its id is Ray's submission id if Ray started it, and a new one if a shell did."""
    id = submission_id()
    return JobSpec(
        id=id or new_id(options.verb),
        verb=options.verb,
        options=options.recorded(),
        owner=machine.user(),
        created_s=time.time(),
        submitted=bool(id),
    )


def log_file() -> str:
    """The file that this process's output goes to, which is Ray's log of the job; empty if it is no file."""
    path = os.path.realpath("/proc/self/fd/1")
    return path if os.path.isfile(path) else ""
