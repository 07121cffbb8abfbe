"""What an elastic run does next: a total, pure state machine.

`next_actions` gets what the run remembers (`Run`), what the driver sees (`RunFacts`) and the limits, and answers with what to remember and what to do
(`Actions`). It reads no clock, calls no Ray and does no I/O: the driver (`jobs.training.driver`) looks, decides and carries out, ten times a
second. A worker lives like this::

    LOADING ──loaded──▶ IDLE ──form──▶ ACTIVE ──the process group ends──▶ IDLE ──retire──▶ a spare ──place──▶ IDLE
       └──────────────────┴──────────────┴──────────────end──────────────┴──────────────────┴──▶ gone

- The grant rises: the run reserves slots and starts workers. They load beside the training. When they are loaded, the process group stops after
  the step under way, and the next one contains them.
- The grant falls: the process group stops after the step under way, some workers leave, and the rest form the next group. Where all leave, one
  of them writes the newest state to the store first. A group that does not stop within the yield deadline is ended.
- A worker dies or hangs: the run ends it, stops the group, goes on with the others and starts a replacement.

Example: two workers train and the grant falls to one.

>>> limits = Limits(min_workers=1, yield_deadline_s=30)
>>> two = [WorkerFacts(id, Phase.ACTIVE, group=1, trained=1, heard_s=100) for id in (1, 2)]
>>> run, actions = next_actions(Run(group=1, moved_s=100), RunFacts(100, Grant(1, "serving has 2"), workers=tuple(two)), limits)
>>> actions
Actions(stop=1)
>>> idle = tuple(worker._replace(phase=Phase.IDLE) for worker in two)
>>> run, actions = next_actions(run, RunFacts(101, Grant(1, "serving has 2"), workers=idle), limits)
>>> actions
Actions(retire=(2,), form=(1,))
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import NamedTuple

from cluster.capacity.allocator import Grant
from jobs.training.grants import Failure, Heard, hear, no_control

HUNG_S = 30
"""A worker that has not answered for this long is taken for hung."""
NOTICE_S = 10
"""How long workers may take to notice that a worker of their process group is gone."""
KEEP_S = 5
"""How long the driver may try to keep the state before it ends workers that fail."""
STUCK_S = 45
"""A process group of whose workers none ends its step for this long, or for `STUCK_TIMES` the longest step so far, hangs, though they answer."""
STUCK_TIMES = 10
LOAD_S = 900
"""How long a worker may take to load. A large model from a remote store takes its time."""
JOIN_S = 30
"""How long loaded workers wait for a loading one before the group stops to take them in."""
MOST_FAILURES = 3
"""Failures without a step between them."""


class Phase(Enum):
    LOADING = "loading"
    IDLE = "idle"
    """Loaded, and out of the process group or never in one."""
    ACTIVE = "active"
    """Trains in the newest process group."""


NEXT_PHASES: dict[Phase, tuple[Phase, ...]] = {
    Phase.LOADING: (Phase.IDLE,),
    Phase.IDLE: (Phase.ACTIVE,),
    Phase.ACTIVE: (Phase.IDLE,),
}


class WorkerFacts(NamedTuple):
    """One worker, as the driver sees it."""

    id: int
    phase: Phase
    machine: str = ""
    since_s: float = 0.0
    """When it was started."""
    heard_s: float = 0.0
    """When it was last asked a question, having answered the one before."""
    group: int = 0
    """The newest process group that it joined."""
    trained: int = 0
    """The newest process group in which it did a step, as far as is known."""
    step: int = -1
    """Steps that it has done or taken over; -1 before it knows any state."""
    first: int = -1
    """The step with which its newest process group began; -1 until that is known."""
    stepping: bool = False
    """Whether a step is under way. False while it measures or saves the result."""
    broken: str = ""
    """Why its newest process group ended too early, where it did."""
    gone: str = ""
    """Why it does not exist any more, or cannot be used."""
    finished: bool = False
    """Whether it has saved the run's result."""


class SpareFacts(NamedTuple):
    """A loaded process without a slot. It continues as a worker when the job gets a slot on its machine again."""

    id: int
    machine: str
    since_s: float
    heard_s: float
    loaded: bool = True
    gone: str = ""


class ReservationFacts(NamedTuple):
    """Slots that the run has asked Ray for."""

    id: int
    since_s: float
    machine: str = ""
    """Where they are; empty until Ray has found them."""


class RunFacts(NamedTuple):
    """What the driver sees now. Workers and reservations are in order of arrival: those that came first stay longest."""

    now_s: float
    grant: Grant | None
    """What control last answered; None where it never did."""
    silent_s: float = 0.0
    """Seconds since control last answered, or since the driver began."""
    workers: tuple[WorkerFacts, ...] = ()
    reservations: tuple[ReservationFacts, ...] = ()
    spares: tuple[SpareFacts, ...] = ()


class Limits(NamedTuple):
    """What does not change during a run."""

    min_workers: int
    yield_deadline_s: float
    slots_per_worker: int = 1
    spare_s: float = 300.0
    """How long a spare stays."""


class Run(NamedTuple):
    """What the run remembers between two decisions."""

    group: int = 0
    """The newest process group. Groups are numbered from 1."""
    began: int = 0
    """The newest group of which the first step is known."""
    stopped: int = 0
    """The newest group that was told to stop."""
    failed: int = 0
    """The newest group that failed."""
    kept: int = 0
    """The newest group whose state was kept because it did not stop."""
    broken_s: float | None = None
    """Since when the present group is broken: a worker of it failed, and the others may not have noticed."""
    yielding_s: float | None = None
    """Since when the run holds more workers than its grant."""
    step: int = 0
    """The most steps that any worker has ever done."""
    state_step: int = 0
    """The step of the newest state that is known. Below ``step`` while a group repeats steps from a checkpoint."""
    moved_s: float = 0.0
    """When a step was last seen to be done, or a group was formed."""
    longest_s: float = 0.0
    """The longest that one step took so far."""
    failures: int = 0
    """Failures since the last step."""
    lost: int = 0
    """Steps that were done twice."""
    heard: Heard = Heard()
    """What was last said about the grant."""
    over: bool = False


class Began(NamedTuple):
    """A process group has begun to train."""

    workers: int
    step: int


class WorkerPlacement(NamedTuple):
    """A reservation whose slots are there, and the spare that takes them; None for a new worker."""

    reservation: int
    spare: int | None


class Actions(NamedTuple):
    """What the driver does now, in the order of these fields."""

    notes: tuple[str, ...] = ()
    """Words for the log."""
    began: Began | None = None
    keep_s: float | None = None
    """Have the newest state written to the store, within this time, before any worker leaves."""
    end: tuple[int, ...] = ()
    """Workers and spares whose processes end, and whose slots go back."""
    cancel: tuple[int, ...] = ()
    """Reservations."""
    retire: tuple[int, ...] = ()
    """Workers that give their slots back in order. They become spares where the driver keeps spares."""
    place: tuple[WorkerPlacement, ...] = ()
    reserve: int = 0
    """Workers for which slots shall be reserved."""
    stop: int | None = None
    """The process group that ends after the step under way."""
    form: tuple[int, ...] = ()
    """Workers of the next process group, `Run.group`, in the order of their ranks."""
    finish: bool = False
    """The result is saved."""
    fail: Failure | None = None

    def __repr__(self) -> str:
        """Only what there is to do."""
        fields = zip(self._fields, self, self._field_defaults.values(), strict=True)
        return f"Actions({', '.join(f'{name}={value!r}' for name, value, default in fields if value != default)})"


class Decision(NamedTuple):
    run: Run
    actions: Actions


def next_actions(run: Run, facts: RunFacts, limits: Limits) -> Decision:
    """What to do now. Every combination of facts has an answer, and a run that is over does nothing."""
    if run.over:
        return Decision(run, Actions())
    run, began = _observe(run, facts)
    if any(worker.finished for worker in facts.workers):
        return Decision(run._replace(over=True), Actions(began=began, finish=True))
    held = (len(facts.workers) + len(facts.reservations)) * limits.slots_per_worker
    heard, notes = hear(run.heard, facts.grant, facts.silent_s, held)
    run = run._replace(heard=heard)
    wanted = _wanted(facts, limits)
    run = run._replace(yielding_s=_since(run.yielding_s, len(facts.workers) > wanted, facts.now_s))
    losses = _find_losses(run, facts, limits, wanted)
    run, failure = _count_failures(run, facts, losses)
    notes += [f"{len(loss.workers)} of {len(facts.workers)} workers lost: {loss.why}" for loss in losses if loss.workers]
    actions = Actions(
        tuple(notes), began, end=(*_ids(lost for loss in losses for lost in loss.workers), *_ended_spares(facts, limits))
    )
    if any(loss.keep_s for loss in losses):
        actions = actions._replace(keep_s=max(loss.keep_s or 0.0 for loss in losses))
        run = run._replace(kept=run.group)
    if (failure := failure or no_control(facts.grant, facts.silent_s)) is not None:
        return Decision(run._replace(over=True), Actions(tuple(notes), began, keep_s=KEEP_S, fail=failure))
    return _resize(run, _without(facts, actions.end), limits, wanted, actions)


# what has happened


def group_workers(run: Run, workers: Iterable[WorkerFacts]) -> list[WorkerFacts]:
    """The workers of the present process group; none once all of them are out of it."""
    joined = [worker for worker in workers if worker.group == run.group]
    return joined if any(worker.phase is Phase.ACTIVE for worker in joined) else []


def _observe(run: Run, facts: RunFacts) -> tuple[Run, Began | None]:
    """Take note of steps that were done, and of where the newest process group began."""
    began = None
    joined = [worker for worker in facts.workers if worker.group == run.group]
    if run.began < run.group and (known := [worker.first for worker in joined if worker.first >= 0]):
        # A group that goes on from an older state than the newest does the steps between them again.
        lost = run.lost + max(0, run.state_step - known[0])
        run, began = run._replace(began=run.group, lost=lost, state_step=known[0]), Began(len(joined), known[0])
    step = max((worker.step for worker in facts.workers), default=-1)
    if step > run.step:
        took_s = (facts.now_s - run.moved_s) / (step - run.step)
        run = run._replace(step=step, moved_s=facts.now_s, longest_s=max(run.longest_s, took_s), failures=0)
    run = run._replace(state_step=max(run.state_step, step))
    return (run if group_workers(run, facts.workers) else run._replace(broken_s=None)), began


def _wanted(facts: RunFacts, limits: Limits) -> int:
    """Workers that the run may have. Before control's first answer: those that it has."""
    if facts.grant is None:
        return len(facts.workers) + len(facts.reservations)
    return facts.grant.slots // limits.slots_per_worker


def _since(before_s: float | None, holds: bool, now_s: float) -> float | None:
    return None if not holds else now_s if before_s is None else before_s


# what has failed


class _Loss(NamedTuple):
    """Workers to end for one reason. ``keep_s``: how long to try and keep the state first. Without workers the state is kept, and all go on."""

    workers: tuple[WorkerFacts, ...]
    why: str = ""
    keep_s: float | None = None


def _find_losses(run: Run, facts: RunFacts, limits: Limits, wanted: int) -> list[_Loss]:
    losses = [_Loss((worker,), worker.gone) for worker in facts.workers if worker.gone]
    alive = [worker for worker in facts.workers if not worker.gone]
    # One reason at a time: to end what hangs may be all that the others need.
    return [*losses, *filter(None, [_find_hung(alive, facts.now_s) or _find_cut(run, alive, facts.now_s, limits, wanted)])]


def _find_hung(alive: Sequence[WorkerFacts], now_s: float) -> _Loss | None:
    loading = [worker for worker in alive if worker.phase is Phase.LOADING]
    if hung := [worker for worker in alive if worker not in loading and now_s - worker.heard_s > HUNG_S]:
        return _Loss(tuple(hung), f"no answer for {HUNG_S} s")
    if late := [worker for worker in loading if now_s - worker.since_s > LOAD_S]:
        return _Loss(tuple(late), f"not loaded after {LOAD_S} s")
    return None


def _find_cut(run: Run, alive: Sequence[WorkerFacts], now_s: float, limits: Limits, wanted: int) -> _Loss | None:
    """A process group that does not end by itself. A worker that is out of it has its state and stays."""
    group = group_workers(run, alive)
    active = tuple(worker for worker in group if worker.phase is Phase.ACTIVE)
    if not active:
        return None
    if run.broken_s is not None and now_s - run.broken_s > NOTICE_S:
        return _Loss(active, "they did not notice that another was gone", KEEP_S)
    # Before the first step nothing says how long one takes: the first may compile kernels.
    patience_s = max(STUCK_S, STUCK_TIMES * run.longest_s) if run.longest_s else LOAD_S
    if now_s - run.moved_s > patience_s and all(worker.stepping for worker in active):
        return _Loss(active, f"no step was done for {now_s - run.moved_s:.0f} s", KEEP_S)
    if len(group) <= wanted or run.yielding_s is None:
        return None
    # Half of the deadline is for the step under way, half to keep the state while the group trains on.
    if (since_s := now_s - run.yielding_s) > limits.yield_deadline_s:
        return _Loss(active, f"they did not give their slots back within {limits.yield_deadline_s:.0f} s")
    return (
        _Loss((), keep_s=limits.yield_deadline_s / 2) if since_s > limits.yield_deadline_s / 2 and run.kept < run.group else None
    )


def _count_failures(run: Run, facts: RunFacts, losses: Sequence[_Loss]) -> tuple[Run, Failure | None]:
    """One failure a turn at most, and one for each process group, however many of its workers are lost or say that it is broken: a machine that
    is lost takes several workers with it."""
    group = {worker.id for worker in group_workers(run, facts.workers)}
    whys = [worker.broken for worker in facts.workers if worker.group == run.group and worker.broken]
    whys += [loss.why for loss in losses if not group.isdisjoint(_ids(loss.workers))]
    outside = [loss.why for loss in losses if loss.workers and group.isdisjoint(_ids(loss.workers))]
    counts = (whys and run.failed < run.group) or (outside and run.broken_s is None)
    run = run._replace(failures=run.failures + bool(counts))
    if whys:
        run = run._replace(failed=run.group, broken_s=_since(run.broken_s, bool(group), facts.now_s))
    if not counts or run.failures <= MOST_FAILURES:
        return run, None
    return run, Failure(f"The training failed {run.failures} times at step {run.step}: {[*whys, *outside][0]}")


def _ended_spares(facts: RunFacts, limits: Limits) -> tuple[int, ...]:
    def useless(spare: SpareFacts) -> bool:
        hung = spare.loaded and facts.now_s - spare.heard_s > HUNG_S
        return bool(spare.gone) or hung or facts.now_s - spare.since_s > limits.spare_s

    return _ids(spare for spare in facts.spares if useless(spare))


def _without(facts: RunFacts, ended: tuple[int, ...]) -> RunFacts:
    workers = tuple(worker for worker in facts.workers if worker.id not in ended)
    return facts._replace(workers=workers, spares=tuple(spare for spare in facts.spares if spare.id not in ended))


# how many workers there are


class Counts(NamedTuple):
    """Workers, counted."""

    wanted: int
    active: int
    """In the present process group."""
    idle: int
    """Loaded, and waiting for the next process group."""
    loading: int
    """Loading, or waiting for slots."""
    least: int = 1
    awaited: int | None = None
    """Of those that load, those that are worth waiting for; all by default."""


class Balance(NamedTuple):
    reserve: int = 0
    dismiss: int = 0
    """Of the workers that are in no process group, and of the reservations."""
    stop: bool = False
    form: bool = False


def balance(counts: Counts) -> Balance:
    """
    >>> balance(Counts(wanted=1, active=2, idle=0, loading=1))
    Balance(reserve=0, dismiss=1, stop=True, form=False)
    >>> balance(Counts(wanted=1, active=0, idle=2, loading=0))
    Balance(reserve=0, dismiss=1, stop=False, form=True)
    """
    outside = counts.idle + counts.loading
    dismissed = min(outside, max(0, counts.active + outside - counts.wanted))
    awaited = max(0, (counts.loading if counts.awaited is None else counts.awaited) - dismissed)
    idle = counts.idle - max(0, dismissed - counts.loading)
    return Balance(
        reserve=max(0, counts.wanted - counts.active - outside),
        dismiss=dismissed,
        stop=counts.active > 0 and (counts.active > counts.wanted or (idle > 0 and awaited == 0)),
        form=counts.active == 0 and idle >= counts.least,
    )


def _resize(run: Run, facts: RunFacts, limits: Limits, wanted: int, actions: Actions) -> Decision:
    """Add what follows from the number of workers to the ``actions``. ``facts``: without the workers that end."""
    group = group_workers(run, facts.workers)
    loading = [worker for worker in facts.workers if worker.phase is Phase.LOADING]
    idle = [worker for worker in facts.workers if worker.phase is not Phase.LOADING and worker not in group]
    started_s = [one.since_s for one in (*loading, *facts.reservations)]
    awaited = sum(facts.now_s - since_s < JOIN_S for since_s in started_s)
    do = balance(Counts(wanted, len(group), len(idle), len(started_s), limits.min_workers, awaited))
    cancelled = facts.reservations[max(0, len(facts.reservations) - do.dismiss) :]
    leaving = _choose_leaving(idle, loading, facts.workers, do.dismiss - len(cancelled))
    if leaving and _takes_the_newest_state(leaving, facts.workers):
        left_s = limits.yield_deadline_s - (facts.now_s - (facts.now_s if run.yielding_s is None else run.yielding_s))
        actions = actions._replace(keep_s=max(KEEP_S, left_s))
    waiting = [reservation for reservation in facts.reservations if reservation not in cancelled and reservation.machine]
    actions = actions._replace(
        cancel=_ids(cancelled), retire=_ids(leaving), place=_place(waiting, facts.spares), reserve=do.reserve
    )
    # A worker of a machine that Ray has lost may go on for a while, and the others with it: a broken group stops too.
    if group and (do.stop or run.broken_s is not None) and run.stopped < run.group:
        run, actions = run._replace(stopped=run.group), actions._replace(stop=run.group)
    if do.form:
        run = run._replace(group=run.group + 1, moved_s=facts.now_s)
        actions = actions._replace(form=_ids(worker for worker in idle if worker not in leaving))
    return Decision(run, actions)


def _choose_leaving(
    idle: Sequence[WorkerFacts], loading: Sequence[WorkerFacts], all_: Sequence[WorkerFacts], count: int
) -> list[WorkerFacts]:
    """Workers that leave: the loading ones first, the newest before the others; then those whose state is older; then those that are alone on
    their machine, because a replica may need a whole machine.

    >>> old, new = (WorkerFacts(id, Phase.IDLE, trained=trained) for id, trained in ((1, 4), (2, 3)))
    >>> loads = WorkerFacts(3, Phase.LOADING)
    >>> [worker.id for worker in _choose_leaving([old, new], [loads], [old, new, loads], 2)]
    [2, 3]
    """
    on_machine = Counter(worker.machine for worker in all_)
    staying_first = [*sorted(idle, key=lambda worker: (-worker.trained, -on_machine[worker.machine])), *loading]
    return staying_first[len(staying_first) - count :]


def _takes_the_newest_state(leaving: Sequence[WorkerFacts], workers: Sequence[WorkerFacts]) -> bool:
    """Whether no worker that stays has what was learnt last."""
    loaded = [worker for worker in workers if worker.phase is not Phase.LOADING]
    newest = max((worker.trained for worker in loaded), default=0)
    return bool(loaded) and all(worker in leaving for worker in loaded if worker.trained == newest)


def _place(reservations: Sequence[ReservationFacts], spares: Sequence[SpareFacts]) -> tuple[WorkerPlacement, ...]:
    """Give slots that are there to a spare of their machine, or to a new worker."""
    left, placed = list(spares), list[WorkerPlacement]()
    for reservation in reservations:
        spare = next((spare for spare in left if spare.machine == reservation.machine), None)
        if spare is not None:
            left.remove(spare)
        placed.append(WorkerPlacement(reservation.id, spare and spare.id))
    return tuple(placed)


def _ids(some: Iterable[WorkerFacts | SpareFacts | ReservationFacts]) -> tuple[int, ...]:
    return tuple(one.id for one in some)
