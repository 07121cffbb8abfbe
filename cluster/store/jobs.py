"""Jobs in the store: what each was asked to do, what happened, and how it ended. A record survives its driver, control and the head.

::

    jobs/<id>/spec.json         verb, options, owner; written by whoever is first of control (a job over HTTP) and the driver
    jobs/<id>/events/<n>.json   what happened since the one before, and a snapshot: the highest n alone says where the job is
    jobs/<id>/cancel.json       somebody asked for its end
    jobs/<id>/result.json       how it ended; whoever is first of the driver and control

Everything is created once and never changed. A damaged object costs its own job only.
"""

import threading
import time
from enum import StrEnum
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict

from cluster.errors import BadRequest, Conflict, JobNotFound, RecordDamaged
from cluster.store.objects import Store
from cluster.store.readers import READERS, read_all
from cluster.types import NAME, check_name

REMEMBERED = 4096
"""Documents that one `JobStore` keeps in memory: a few megabytes."""
LOOKED_AT = 1000
"""Objects that are read at most for a job's events."""


class JobStatus(StrEnum):
    QUEUED = "queued"
    """Its driver has not said anything yet."""
    WAITING = "waiting"
    """It has no slots; `JobSnapshot.waiting` says what it waits for."""
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    LOST = "lost"
    """Its driver ended without a word: killed, or its machine is gone."""

    @property
    def ended(self) -> bool:
        return self in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.LOST)


class Recorded(BaseModel):
    """A document of this file. A field that a newer release added is ignored, so that an older one can still read the record."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    schema_version: int = 1


class JobSpec(Recorded):
    id: str
    """Ray's submission id where Ray runs the job."""
    verb: str
    options: dict[str, Any]
    owner: str
    created_s: float
    submitted: bool = True
    """Whether Ray knows it by its id. A job that was started from a shell is alive only as long as its driver speaks."""


class JobProgress(Recorded):
    step: int
    steps: int
    loss: float | None = None
    tokens: int = 0
    tokens_per_s: float = 0
    eta_s: float = 0
    workers: int = 0
    mfu: float = 0
    """The part of the processors' peak that the model uses, 0 to 1; 0 where nobody knows."""
    memory_mb: float = 0
    """The most memory that a worker has taken."""


class JobSnapshot(Recorded):
    """Where a job is."""

    at_s: float
    waiting: str = ""
    """What it waits for; empty where it does not."""
    message: str = ""
    """Its newest words."""
    run: str = ""
    """The run that it trains: its checkpoints are under ``runs/<run>``. Empty before the run has begun."""
    progress: JobProgress | None = None
    facts: dict[str, Any] = {}
    """What is known of it by now: ``base``, ``dataset_sha256``, …"""
    log: str = ""
    """The driver's log file, on the machine ``host``."""
    host: str = ""


class JobEvent(Recorded):
    at_s: float
    kind: str
    """``message``, ``waiting``, ``progress``, ``checkpoint``, ``measurement`` or ``fact``."""
    words: str = ""
    data: dict[str, Any] = {}


class JobEvents(Recorded):
    """What happened since the object before, oldest first."""

    n: int
    snapshot: JobSnapshot
    events: tuple[JobEvent, ...] = ()


class JobResult(Recorded):
    status: JobStatus
    ended_s: float
    message: str = ""
    code: str = ""
    """An error's code, as in `cluster.errors`; empty where there is none."""
    made: dict[str, Any] = {}
    """What came out of it: ``version``, ``kind``, ``eval_loss``, ``stage``, …"""
    last: JobSnapshot | None = None
    """Where it was at its end, so that a reader of an ended job needs no events."""


class Cancel(Recorded):
    author: str
    at_s: float


class JobRecord(NamedTuple):
    """One job, as far as it can be read."""

    id: str
    spec: JobSpec | None
    newest: JobEvents | None
    result: JobResult | None
    damage: str = ""
    """What could not be read, and why."""


Kind = TypeVar("Kind", bound=Recorded)


class Damaged(RecordDamaged):
    """An object of a job's record that is not what was written. Nothing can be done about the job until somebody removes that object."""

    status = 409


class JobStore:
    """The records of jobs over one `Store`. What never changes is read once: specs, results, numbered events."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._read: dict[str, Recorded] = {}
        self._last: dict[str, int] = {}
        """Id → the highest number of its events that was seen."""
        self._lock = threading.Lock()

    # write

    def create(self, spec: JobSpec) -> JobSpec:
        """Write a job's spec, and return the one that counts: its own, or another's that was there before."""
        return self._first(f"jobs/{check_id(spec.id)}/spec.json", spec)

    def append(self, id: str, events: JobEvents) -> int:
        """Write a batch as the first free number from ``events.n`` on; returns it."""
        n = events.n
        while True:
            mine = events.model_copy(update={"n": n}).model_dump_json().encode()
            try:
                self.store.put_new(_event(id, n), mine)
                return n
            except Conflict:
                if self.store.get(_event(id, n)) == mine:  # written before, and the answer was lost
                    return n
                n += 1

    def ask_to_cancel(self, id: str, author: str) -> Cancel:
        return self._first(f"jobs/{check_id(id)}/cancel.json", Cancel(author=author, at_s=time.time()))

    def finish(self, id: str, result: JobResult) -> JobResult:
        """Write how a job ended, and return what counts: whoever is first is right."""
        return self._first(f"jobs/{check_id(id)}/result.json", result)

    def forget_events(self, id: str) -> None:
        """Delete the events of a job that has ended: its result says where it was."""
        self.store.remove(f"jobs/{id}/events")

    def _first(self, path: str, document: Kind) -> Kind:
        try:
            self.store.put_new(path, document.model_dump_json(indent=1).encode())
            self._keep(path, document)
            return document
        except Conflict:
            return self._get(path, type(document)) or document

    # read

    def ids(self) -> list[str]:
        """Every job's id, the newest last as far as names say so. What no job can be called is left out, such as a copy's temporary file."""
        return sorted((id for id in self.store.children("jobs") if NAME.fullmatch(id)), key=born)

    def by_age(self) -> list[str]:
        """Every job's id, the newest first. Ours say their age; of others the specs are read, once each."""

        def created_s(id: str) -> float:
            try:
                return born(id) or self.spec(id).created_s
            except (Damaged, JobNotFound):
                return 0

        return sorted(self.ids(), key=created_s, reverse=True)

    def spec(self, id: str) -> JobSpec:
        """Raises `JobNotFound`."""
        found = self._get(f"jobs/{check_id(id)}/spec.json", JobSpec)
        if found is None:
            raise JobNotFound(f"There is no job {id[:80]!r}.", "`springtide jobs` lists them.", "job")
        return found

    def cancel_asked(self, id: str) -> Cancel | None:
        return self._get(f"jobs/{id}/cancel.json", Cancel)

    def result(self, id: str) -> JobResult | None:
        return self._get(f"jobs/{id}/result.json", JobResult)

    def newest(self, id: str) -> JobEvents | None:
        """The newest events that can be read; a damaged object costs itself only. Raises `Damaged` where there are no others.

        They are listed once; from then on what comes after the last is asked for by its number.
        """
        n = self._last.get(id) or max(self._numbers(id), default=0)
        while n and self._taken(id, n):
            n += 1
        self._last[id] = last = max(0, n - 1)
        damage: Damaged | None = None
        for number in range(last, max(0, last - LOOKED_AT), -1):
            try:
                return self._get(_event(id, number), JobEvents)
            except Damaged as error:
                damage = damage or error
        if damage is not None:
            raise damage
        return None

    def _taken(self, id: str, n: int) -> bool:
        """Whether the number has events: read at once, because they are wanted next."""
        try:
            return self._get(_event(id, n), JobEvents) is not None
        except Damaged:
            return True

    def _numbers(self, id: str) -> list[int]:
        stems = [name.removesuffix(".json") for name in self.store.children(f"jobs/{id}/events")]
        return sorted(int(stem) for stem in stems if stem.isdigit())

    def events(self, id: str, limit: int = 1000) -> list[JobEvent]:
        """The newest ``limit`` events that can be read, oldest first; fewer where they are not among the newest `LOOKED_AT` objects. A job that
        runs for a week writes tens of thousands of objects."""
        numbers = self._numbers(check_id(id))[-LOOKED_AT:]
        found: list[JobEvent] = []
        while numbers and len(found) < limit:
            numbers, newest = numbers[:-READERS], numbers[-READERS:]
            batches = read_all(lambda number: self._events_of(id, number), newest)
            found = [*(event for batch in batches for event in batch), *found]
        return found[max(0, len(found) - limit) :]

    def _events_of(self, id: str, number: int) -> tuple[JobEvent, ...]:
        """The events in one object, none where it is damaged or missing."""
        try:
            batch = self._get(_event(id, number), JobEvents)
        except Damaged:
            return ()
        return batch.events if batch else ()

    def record(self, id: str, events: bool = True) -> JobRecord:
        """Everything that can be read of a job. ``events``: whether to look for the newest. Raises `JobNotFound` where there is no such job."""
        damage: list[str] = []

        def readable(read: Any) -> Any:
            try:
                return read(id)
            except Damaged as error:
                damage.append(error.message)
                return None

        spec, result = readable(self.spec), readable(self.result)
        newest = readable(self.newest) if events and result is None else None  # a result says where it was
        return JobRecord(id, spec, newest, result, "; ".join(damage))

    def _get(self, path: str, kind: type[Kind]) -> Kind | None:
        """The document at ``path``, None where there is none. Raises `Damaged`."""
        with self._lock:
            known = self._read.get(path)
        if isinstance(known, kind):
            return known
        raw = self.store.get(path)
        if raw is None:
            return None
        try:
            found = kind.model_validate_json(raw)
        except ValueError as error:
            words = f"{path} is damaged: {str(error).splitlines()[0]}."
            raise Damaged(words, "Remove that object from the store, then try again.", param="job") from error
        self._keep(path, found)
        return found

    def _keep(self, path: str, document: Recorded) -> None:
        with self._lock:
            self._read[path] = document
            if len(self._read) > REMEMBERED:
                self._read.pop(next(iter(self._read)))  # the one that was read first


def _event(id: str, n: int) -> str:
    return f"jobs/{id}/events/{n:08d}.json"


def check_id(id: str) -> str:
    """Return ``id``, or raise `JobNotFound` where it could not be a job's: ids become paths."""
    try:
        return check_name(id)
    except BadRequest:
        raise JobNotFound(f"There is no job {id[:80]!r}.", "`springtide jobs` lists them.", "job") from None


def born(id: str) -> int:
    """When a job was named, in seconds since the epoch, where `cluster.jobspec.new_id` named it; else 0.

    >>> born("finetune-0000000c4f2a"), born("raysubmit_0123456789abcdef")
    (12, 0)
    """
    _, dash, digits = id.rpartition("-")
    try:
        return int(digits[:8], 16) if dash and len(digits) == 12 else 0
    except ValueError:
        return 0


# what a reader makes of it: pure


def status(spec: JobSpec | None, newest: JobEvents | None, result: JobResult | None, alive: bool | None) -> JobStatus:
    """What a job is doing. ``alive``: whether its driver lives, None where that is not known yet.

    A result is final. Without one a job whose driver is gone is lost, whatever it said last.
    """
    if result is not None:
        return result.status
    if alive is False or spec is None:
        return JobStatus.LOST
    if newest is None:
        return JobStatus.QUEUED
    return JobStatus.WAITING if newest.snapshot.waiting else JobStatus.RUNNING


def document(record: JobRecord, alive: bool | None, live: JobSnapshot | None = None) -> dict[str, Any]:
    """A job as `GET /admin/jobs/ID` answers it. ``live``: what its driver told control, which is newer than its events."""
    spec, result, newest = record.spec, record.result, record.newest
    at = (result.last if result else None) or live or (newest.snapshot if newest else None) or JobSnapshot(at_s=0)
    now = status(spec, newest.model_copy(update={"snapshot": at}) if newest else started(live), result, alive)
    return {
        "id": record.id,
        "verb": spec.verb if spec else record.id.rpartition("-")[0],
        "status": now.value,
        "owner": spec.owner if spec else "",
        "created_s": spec.created_s if spec else float(born(record.id)),
        "options": spec.options if spec else {},
        "run": at.run,
        "progress": at.progress.model_dump(mode="json", exclude={"schema_version"}) if at.progress else None,
        "waiting": at.waiting if now == JobStatus.WAITING else "",
        "message": (result.message if result else at.message) or record.damage,
        "facts": at.facts,
        "result": result.model_dump(mode="json", exclude={"schema_version", "last"}) if result else None,
    }


def started(live: JobSnapshot | None) -> JobEvents | None:
    """A driver that has told control something has begun, though it has not written events yet."""
    return JobEvents(n=0, snapshot=live) if live else None
