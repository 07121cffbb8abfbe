"""Decides what an elastic run does next. Pure.

`next_actions` takes the run's memory (`Run`), what the driver sees now (`RunFacts`) and the limits. It returns the new memory and what to do
(`Actions`). It answers every input, reads no clock, calls no Ray and does no I/O. The driver (`jobs.training.drivers.driver`) calls it ten times a
second and carries out the actions. A worker goes through these phases::

    LOADING ──loaded──▶ IDLE ──form──▶ ACTIVE ──the process group ends──▶ IDLE ──retire──▶ a spare ──place──▶ IDLE
       └──────────────────┴──────────────┴──────────────end──────────────┴──────────────────┴──▶ gone

- The grant rises: the run reserves slots and starts workers. They load while the training goes on. When they are loaded, the process group
  stops after the current step, and the next group includes them.
- The grant falls: the process group stops after the current step, some workers leave, and the others form the next group. If all leave, one
  of them writes the newest state to the store first. The driver ends a group that does not stop within the yield deadline.
- A worker dies or hangs: the driver ends it and stops its group. The other workers go on, and the run starts a replacement.

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
from jobs.training.drivers.grants import Failure, Heard, hear, no_control

HUNG_S = 30
"""A worker hangs if it has not answered for this long."""
NOTICE_S = 10
"""How long workers may take to notice that their process group has lost a worker."""
KEEP_S = 5
"""How long the driver tries to write the state to the store before it ends workers that fail."""
STUCK_S, STUCK_TIMES = 45, 10
"""A process group is stuck if no worker completes a step for `STUCK_S` and for `STUCK_TIMES` the longest step so far, even if all answer."""
LOAD_S = 900
"""How long a worker may take to load. A large model from a remote store takes minutes."""
JOIN_S = 30
"""How long loaded workers wait for a loading one. Then the group stops and takes them in without it."""
DIVERGED = "Lower the learning rate (--set learning_rate=…), or look for broken examples. The newest checkpoint is kept."
MOST_FAILURES = 3
"""More failures than this without a step between them end the run."""


class Phase(Enum):
    LOADING = "loading"
    IDLE = "idle"
    """Loaded, and in no process group."""
    ACTIVE = "active"
    """Training in the newest process group."""


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
    """When the driver asked its newest question. It asks only after the answer to the one before, so this stays old if the worker hangs."""
    group: int = 0
    """The newest process group that the worker joined."""
    trained: int = 0
    """The newest process group in which it completed a step, as far as the driver knows."""
    step: int = -1
    """Steps that it has done, or taken over from another worker; -1 before it has a state."""
    first: int = -1
    """The step at which its newest process group began; -1 until that is known."""
    stepping: bool = False
    """Whether a step is under way. False while the worker measures, saves the result, or waits for data."""
    broken: str = ""
    """Why its newest process group broke; empty if it did not."""
    gone: str = ""
    """Why the worker is dead or unusable; empty if it is neither."""
    finished: bool = False
    """Whether it has saved the run's result."""
    diverged: str = ""
    """Why the run cannot go on from its state; empty if it can."""


class SpareFacts(NamedTuple):
    """A loaded process without a slot. It becomes a worker again when the job gets a slot on its machine."""

    id: int
    machine: str
    since_s: float
    heard_s: float
    loaded: bool = True
    gone: str = ""


class ReservationFacts(NamedTuple):
    """Slots that the run has requested from Ray."""

    id: int
    since_s: float
    machine: str = ""
    """The machine that has the slots; empty until Ray has found one."""


class RunFacts(NamedTuple):
    """What the driver sees now. Workers and reservations are in the order of their arrival. The first to come are the last to leave."""

    now_s: float
    grant: Grant | None
    """Control's newest answer; None if it has never answered."""
    silent_s: float = 0.0
    """Seconds since control last answered; before its first answer, since the driver started."""
    workers: tuple[WorkerFacts, ...] = ()
    reservations: tuple[ReservationFacts, ...] = ()
    spares: tuple[SpareFacts, ...] = ()


class Limits(NamedTuple):
    """A run's settings. They never change."""

    min_workers: int
    yield_deadline_s: float
    slots_per_worker: int = 1
    spare_s: float = 300.0
    """How long a spare may wait for a slot."""


class Run(NamedTuple):
    """The run's memory between two decisions."""

    group: int = 0
    """The newest process group. Groups are numbered from 1."""
    began: int = 0
    """The newest group whose first step is known."""
    stopped: int = 0
    """The newest group that was told to stop."""
    failed: int = 0
    """The newest group that failed."""
    kept: int = 0
    """The newest group whose state was written to the store because the group did not stop."""
    broken_s: float | None = None
    """When the present group broke: it lost a worker, and the others may not have noticed. None while it is whole."""
    yielding_s: float | None = None
    """Since when the run has had more workers than its grant allows; None if it has not."""
    step: int = 0
    """The most steps that any worker has ever done."""
    state_step: int = 0
    """The step of the newest known state. It is below ``step`` while a group repeats steps after a checkpoint."""
    moved_s: float = 0.0
    """When the run last made progress: a step was done, or a group was formed."""
    longest_s: float = 0.0
    """How long the longest step so far took."""
    failures: int = 0
    """Failures since the last step."""
    lost: int = 0
    """Steps that were done twice."""
    heard: Heard = Heard()
    """What the log last said about the grant."""
    over: bool = False


class Began(NamedTuple):
    """A process group has begun to train."""

    workers: int
    step: int


class WorkerPlacement(NamedTuple):
    """A reservation that has its slots, and the spare that takes them. The spare is None where a new worker takes them."""

    reservation: int
    spare: int | None


class Actions(NamedTuple):
    """What the driver does now, in the order of these fields."""

    notes: tuple[str, ...] = ()
    """Messages for the log."""
    began: Began | None = None
    keep_s: float | None = None
    """Write the newest state to the store within this many seconds, before any worker leaves."""
    end: tuple[int, ...] = ()
    """Workers and spares to kill. Their slots become free."""
    cancel: tuple[int, ...] = ()
    """Reservations to cancel."""
    retire: tuple[int, ...] = ()
    """Workers that give their slots back. They become spares where the driver keeps spares."""
    place: tuple[WorkerPlacement, ...] = ()
    reserve: int = 0
    """How many workers to reserve slots for."""
    stop: int | None = None
    """The process group to stop after the current step."""
    form: tuple[int, ...] = ()
    """The workers of the next process group, `Run.group`, by rank."""
    finish: bool = False
    """Whether the result is saved, so that the run is over."""
    fail: Failure | None = None

    def __repr__(self) -> str:
        """Only the fields that say to do something."""
        fields = zip(self._fields, self, self._field_defaults.values(), strict=True)
        return f"Actions({', '.join(f'{name}={value!r}' for name, value, default in fields if value != default)})"


class Decision(NamedTuple):
    run: Run
    actions: Actions


def next_actions(run: Run, facts: RunFacts, limits: Limits) -> Decision:
    """What to do now. A run that is over does nothing."""
    if run.over:
        return Decision(run, Actions())
    run, began = _observe(run, facts)
    if any(worker.finished for worker in facts.workers):
        return Decision(run._replace(over=True), Actions(began=began, finish=True))
    if why := next((worker.diverged for worker in facts.workers if worker.diverged), ""):
        words = f"The training has diverged: at step {run.step + 1} {why}."
        return Decision(run._replace(over=True), Actions(began=began, fail=Failure(words, DIVERGED)))
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
    """The workers of the present process group; none once all of them have left it."""
    joined = [worker for worker in workers if worker.group == run.group]
    return joined if any(worker.phase is Phase.ACTIVE for worker in joined) else []


def _observe(run: Run, facts: RunFacts) -> tuple[Run, Began | None]:
    """Note which steps were done since the last call, and where the newest process group began."""
    began = None
    joined = [worker for worker in facts.workers if worker.group == run.group]
    if run.began < run.group and (known := [worker.first for worker in joined if worker.first >= 0]):
        # A group that goes on from an older state repeats the steps between that state and the newest one.
        lost = run.lost + max(0, run.state_step - known[0])
        run, began = run._replace(began=run.group, lost=lost, state_step=known[0]), Began(len(joined), known[0])
    step = max((worker.step for worker in facts.workers), default=-1)
    if step > run.step:
        took_s = (facts.now_s - run.moved_s) / (step - run.step)
        run = run._replace(step=step, moved_s=facts.now_s, longest_s=max(run.longest_s, took_s), failures=0)
    elif any(worker.phase is Phase.ACTIVE and not worker.stepping for worker in joined):
        run = run._replace(moved_s=facts.now_s)  # no step is under way: measuring and waiting take what they take
    run = run._replace(state_step=max(run.state_step, step))
    return (run if group_workers(run, facts.workers) else run._replace(broken_s=None)), began


def _wanted(facts: RunFacts, limits: Limits) -> int:
    """How many workers the run may have. Before control's first answer it keeps those that it has."""
    if facts.grant is None:
        return len(facts.workers) + len(facts.reservations)
    return facts.grant.slots // limits.slots_per_worker


def _since(before_s: float | None, holds: bool, now_s: float) -> float | None:
    return None if not holds else now_s if before_s is None else before_s


# what has failed


class _Loss(NamedTuple):
    """Workers to end, and the reason. ``keep_s``: how long to try to write the state first. Without workers, only the state is written."""

    workers: tuple[WorkerFacts, ...]
    why: str = ""
    keep_s: float | None = None


def _find_losses(run: Run, facts: RunFacts, limits: Limits, wanted: int) -> list[_Loss]:
    losses = [_Loss((worker,), worker.gone) for worker in facts.workers if worker.gone]
    alive = [worker for worker in facts.workers if not worker.gone]
    # One reason at a time: ending a worker that hangs may be all that the others need.
    return [*losses, *filter(None, [_find_hung(alive, facts.now_s) or _find_stuck(run, alive, facts.now_s, limits, wanted)])]


def _find_hung(alive: Sequence[WorkerFacts], now_s: float) -> _Loss | None:
    loading = [worker for worker in alive if worker.phase is Phase.LOADING]
    if hung := [worker for worker in alive if worker not in loading and now_s - worker.heard_s > HUNG_S]:
        return _Loss(tuple(hung), f"no answer for {HUNG_S} s")
    if late := [worker for worker in loading if now_s - worker.since_s > LOAD_S]:
        return _Loss(tuple(late), f"not loaded after {LOAD_S} s")
    return None


def _find_stuck(run: Run, alive: Sequence[WorkerFacts], now_s: float, limits: Limits, wanted: int) -> _Loss | None:
    """The workers of a process group that does not end by itself. A worker that has left the group has its state, and stays."""
    group = group_workers(run, alive)
    active = tuple(worker for worker in group if worker.phase is Phase.ACTIVE)
    if not active:
        return None
    if run.broken_s is not None and now_s - run.broken_s > NOTICE_S:
        return _Loss(active, "they did not notice that their group had lost a worker", KEEP_S)
    # No step has been timed before the first one, and the first one may compile kernels.
    patience_s = max(STUCK_S, STUCK_TIMES * run.longest_s) if run.longest_s else LOAD_S
    if now_s - run.moved_s > patience_s and all(worker.stepping for worker in active):
        return _Loss(active, f"no step was done for {now_s - run.moved_s:.0f} s", KEEP_S)
    if len(group) <= wanted or run.yielding_s is None:
        return None
    # The current step gets the first half of the deadline. In the second half the state is written while the group trains on.
    if (since_s := now_s - run.yielding_s) > limits.yield_deadline_s:
        return _Loss(active, f"they did not give their slots back within {limits.yield_deadline_s:.0f} s")
    return (
        _Loss((), keep_s=limits.yield_deadline_s / 2) if since_s > limits.yield_deadline_s / 2 and run.kept < run.group else None
    )


def _count_failures(run: Run, facts: RunFacts, losses: Sequence[_Loss]) -> tuple[Run, Failure | None]:
    """Count at most one failure a turn, and one for each process group: a lost machine takes several workers with it, and is one failure."""
    group = {worker.id for worker in group_workers(run, facts.workers)}
    reasons = [worker.broken for worker in facts.workers if worker.group == run.group and worker.broken]
    reasons += [loss.why for loss in losses if not group.isdisjoint(_ids(loss.workers))]
    outside = [loss.why for loss in losses if loss.workers and group.isdisjoint(_ids(loss.workers))]
    counts = (reasons and run.failed < run.group) or (outside and run.broken_s is None)
    run = run._replace(failures=run.failures + bool(counts))
    if reasons:
        run = run._replace(failed=run.group, broken_s=_since(run.broken_s, bool(group), facts.now_s))
    if not counts or run.failures <= MOST_FAILURES:
        return run, None
    return run, Failure(f"The training failed {run.failures} times at step {run.step}: {[*reasons, *outside][0]}")


def _ended_spares(facts: RunFacts, limits: Limits) -> tuple[int, ...]:
    """The spares to end: those that are dead, hang, or have waited too long."""

    def useless(spare: SpareFacts) -> bool:
        hung = spare.loaded and facts.now_s - spare.heard_s > HUNG_S
        return bool(spare.gone) or hung or facts.now_s - spare.since_s > limits.spare_s

    return _ids(spare for spare in facts.spares if useless(spare))


def _without(facts: RunFacts, ended: tuple[int, ...]) -> RunFacts:
    """The facts without the workers and spares that end."""
    workers = tuple(worker for worker in facts.workers if worker.id not in ended)
    return facts._replace(workers=workers, spares=tuple(spare for spare in facts.spares if spare.id not in ended))


# how many workers there are


class Counts(NamedTuple):
    """Numbers of workers."""

    wanted: int
    active: int
    """In the present process group."""
    idle: int
    """Loaded, and waiting for the next process group."""
    loading: int
    """Loading, or waiting for slots."""
    least: int = 1
    """The fewest that may form a process group."""
    awaited: int | None = None
    """The loading workers that are worth waiting for; None means all of them."""


class Balance(NamedTuple):
    """What changes the number of workers."""

    reserve: int = 0
    """Workers to reserve slots for."""
    dismiss: int = 0
    """Workers outside the process group, and reservations, to give up."""
    stop: bool = False
    form: bool = False


def balance(counts: Counts) -> Balance:
    """How to come from the present numbers to the wanted one.

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
    """Add to the ``actions`` what brings the run to ``wanted`` workers. ``facts`` leaves out the workers that end now."""
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
    # A worker on a machine that Ray has lost may train on for a while, and its group with it. So a broken group is stopped too.
    if group and (do.stop or run.broken_s is not None) and run.stopped < run.group:
        run, actions = run._replace(stopped=run.group), actions._replace(stop=run.group)
    if do.form:
        run = run._replace(group=run.group + 1, moved_s=facts.now_s)
        actions = actions._replace(form=_ids(worker for worker in idle if worker not in leaving))
    return Decision(run, actions)


def _choose_leaving(
    idle: Sequence[WorkerFacts], loading: Sequence[WorkerFacts], all_: Sequence[WorkerFacts], count: int
) -> list[WorkerFacts]:
    """The ``count`` workers to let go. Loading ones go first, the newest first. Then come those with an older state. Then come those that are
    alone on their machine, because a replica may need a whole machine.

    >>> old, new = (WorkerFacts(id, Phase.IDLE, trained=trained) for id, trained in ((1, 4), (2, 3)))
    >>> loads = WorkerFacts(3, Phase.LOADING)
    >>> [worker.id for worker in _choose_leaving([old, new], [loads], [old, new, loads], 2)]
    [2, 3]
    """
    on_machine = Counter(worker.machine for worker in all_)
    staying_first = [*sorted(idle, key=lambda worker: (-worker.trained, -on_machine[worker.machine])), *loading]
    return staying_first[len(staying_first) - count :]


def _takes_the_newest_state(leaving: Sequence[WorkerFacts], workers: Sequence[WorkerFacts]) -> bool:
    """Whether every worker that has the newest state leaves."""
    loaded = [worker for worker in workers if worker.phase is not Phase.LOADING]
    newest = max((worker.trained for worker in loaded), default=0)
    return bool(loaded) and all(worker in leaving for worker in loaded if worker.trained == newest)


def _place(reservations: Sequence[ReservationFacts], spares: Sequence[SpareFacts]) -> tuple[WorkerPlacement, ...]:
    """Assign each reservation that has its slots to a spare on that machine, or to a new worker."""
    left, placed = list(spares), list[WorkerPlacement]()
    for reservation in reservations:
        spare = next((spare for spare in left if spare.machine == reservation.machine), None)
        if spare is not None:
            left.remove(spare)
        placed.append(WorkerPlacement(reservation.id, spare and spare.id))
    return tuple(placed)


def _ids(some: Iterable[WorkerFacts | SpareFacts | ReservationFacts]) -> tuple[int, ...]:
    return tuple(one.id for one in some)
