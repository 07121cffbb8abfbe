"""The driver's handles on what it has in Ray: workers, spares and slot reservations, each with a number.

If slots are no GPUs, a worker that leaves becomes a spare: a loaded process without a slot and without work. When the job gets a slot on that
machine again, the spare trains at once. On a GPU a spare would keep memory that belongs to somebody else by then, so there the worker ends.

Example: on one machine of two slots, workers 3 and 4 train. The grant falls to one: worker 4 gives its slot back and becomes spare 4. The grant
rises again: the driver makes reservation 5, Ray finds the slot, and spare 4 becomes worker 4 again without loading anything.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.training.elasticity import NEXT_PHASES, Phase, ReservationFacts, SpareFacts, WorkerFacts, WorkerPlacement
from jobs.training.process_group import ProcessGroup
from jobs.training.progress import Committed
from jobs.training.worker import Loaded, Outcome, Reached

ASK_S = 1
"""The driver asks each worker this often how far it is."""
ANSWER_S = 1
"""How long `Crew.keep` waits for the workers to say how far they are."""
RETRY_S = 0.1
"""How long `Crew.keep` waits before it tries again."""


class SlotReservation:
    """Slots for one worker. It is a placement group, so it needs no process."""

    def __init__(self, id: int, slots: int, now_s: float) -> None:
        self.id, self.since_s = id, now_s
        self.group = placement_group([{"slot": slots}])

    def facts(self) -> ReservationFacts:
        return ReservationFacts(self.id, self.since_s, self._machine())

    def _machine(self) -> str:
        """Ray's id of the machine that has the slots; empty until Ray has found one."""
        known: Any = placement_group_table(self.group)
        return known["bundles_to_node_id"][0] if known["state"] == "CREATED" else ""

    def free(self) -> None:
        remove_placement_group(self.group)


class WorkerHandle:
    """One worker or spare, as the driver knows it."""

    def __init__(self, id: int, actor: Any, now_s: float, reservation: SlotReservation | None = None, node: str = "") -> None:
        self.id, self.actor = id, actor
        self.reservation = reservation
        """None for a spare, and for an actor that holds its slots itself."""
        self.node, self.host = node, ""
        self.phase = Phase.LOADING
        self.since_s = self.heard_s = now_s
        self.group, self.first, self.trained = 0, -1, 0
        self.reached = Reached(-1)
        self.outcome: Outcome | None = None
        self.gone = ""
        self.task: Any = actor.load.remote()
        """The call of `Worker.load` or `Worker.train` under way; None while the worker is idle."""
        self.question: Any = None
        """The call of `Worker.reached` under way."""
        self.trains: Any = None
        """The call of `Worker.trains` under way. It returns when the worker has completed a step in its process group."""

    def listen(self, now_s: float) -> None:
        """Note the worker's answers since the last call, and ask how far it is if `ASK_S` have passed. It does not block and does not raise: an
        error is noted in ``gone``."""
        try:
            self._listen(now_s)
        except RayTaskError as error:  # the worker's own code raised: it cannot load the model, or the store is away
            self.gone = f"{error.cause or error}"
        except RayError as error:  # the process died, or Ray could not start it, or had to kill it
            self.gone = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"

    def _listen(self, now_s: float) -> None:
        if over(self.task):
            self._end_task(ray.get(self.task), now_s)
        if over(self.trains):
            trained: Any = ray.get(self.trains)
            self.trained, self.trains = max(self.trained, trained), None
        if self.phase is Phase.LOADING:
            return
        if over(self.question):
            reached: Any = ray.get(self.question)
            self.reached, self.question = reached, None
            self._note_first(self.reached.first if self.reached.group == self.group else -1)
        if self.question is None and now_s - self.heard_s >= ASK_S:
            self.question, self.heard_s = self.actor.reached.remote(), now_s

    def _end_task(self, result: "Loaded | Outcome", now_s: float) -> None:
        self.task = None
        self._enter(Phase.IDLE)
        if isinstance(result, Loaded):
            self.host, self.node, self.heard_s = result.host, result.node, now_s
            return
        self.outcome = result
        self._note_first(result.first)
        if result.step > result.first >= 0:
            self.trained = self.group

    def _note_first(self, step: int) -> None:
        self.first = max(self.first, step)

    def _enter(self, phase: Phase) -> None:
        assert phase in NEXT_PHASES[self.phase], f"{self.phase} → {phase}"  # noqa: S101 (an invariant)
        self.phase = phase

    def join(self, group: ProcessGroup) -> None:
        """Start the worker's training in the process group."""
        self._enter(Phase.ACTIVE)
        self.group, self.first, self.outcome = group.number, -1, None
        self.task = self.actor.train.remote(group)
        self.trains = self.actor.trains.remote(group.number)

    def stop(self) -> None:
        """Make the worker's process group end after the current step."""
        self.actor.stop.remote(self.group)

    def free(self) -> None:
        """Give the worker's slots back, unless the actor holds them itself. Those it gives back only when it ends."""
        if self.reservation is not None:
            self.reservation.free()
            self.reservation = None

    def end(self) -> None:
        """Kill the process, and give its slots back. Ray needs some hundredths of a second for it."""
        ray.kill(self.actor)
        self.free()

    def facts(self) -> WorkerFacts:
        outcome = self.outcome
        return WorkerFacts(
            id=self.id,
            phase=self.phase,
            machine=self.node,
            since_s=self.since_s,
            heard_s=self.heard_s,
            group=self.group,
            trained=self.trained,
            step=max(self.reached.step, outcome.step if outcome else -1),
            first=self.first,
            stepping=self.reached.stepping and self.reached.group == self.group,
            broken=outcome.broken if outcome else "",
            gone=self.gone,
            finished=outcome is not None and outcome.ended,
            diverged=outcome.diverged if outcome else "",
        )

    def spare_facts(self) -> SpareFacts:
        return SpareFacts(self.id, self.node, self.since_s, self.heard_s, self.phase is not Phase.LOADING, self.gone)


class Crew:
    """The workers, spares and reservations of one run."""

    def __init__(self, start: Callable[..., Any], slots_per_worker: int, gpu: bool) -> None:
        """``start(**options)`` starts a worker's actor with these options of Ray's. ``gpu``: whether a slot is a GPU."""
        self.start, self.slots_per_worker, self.gpu = start, slots_per_worker, gpu
        self.workers: dict[int, WorkerHandle] = {}
        """In the order of their arrival."""
        self.spares: dict[int, WorkerHandle] = {}
        self.reservations: dict[int, SlotReservation] = {}
        self.ids = 0

    @property
    def held(self) -> int:
        """Slots that the run holds or has reserved."""
        return (len(self.workers) + len(self.reservations)) * self.slots_per_worker

    def active(self, group: int) -> list[WorkerHandle]:
        """The workers that train in the process group now."""
        return [worker for worker in self.workers.values() if worker.phase is Phase.ACTIVE and worker.group == group]

    def listen(self, now_s: float) -> None:
        for handle in (*self.workers.values(), *self.spares.values()):
            handle.listen(now_s)

    def reserve(self, now_s: float) -> None:
        """Request slots for one more worker. A GPU worker's actor requests its GPUs itself; any other gets a reservation first."""
        self.ids += 1
        if self.gpu:
            self.workers[self.ids] = WorkerHandle(self.ids, self.start(num_gpus=self.slots_per_worker), now_s)
        else:
            self.reservations[self.ids] = SlotReservation(self.ids, self.slots_per_worker, now_s)

    def cancel(self, reservations: Iterable[int]) -> None:
        for id in reservations:
            self.reservations.pop(id).free()

    def place(self, placement: WorkerPlacement, node: str, now_s: float) -> None:
        """Give the slots of a reservation to a spare, or to a new worker on their ``node``."""
        reservation = self.reservations.pop(placement.reservation)
        if placement.spare is not None:
            handle = self.spares.pop(placement.spare)
            handle.reservation, handle.since_s = reservation, now_s
        else:
            self.ids += 1
            here = NodeAffinitySchedulingStrategy(node, soft=False)
            handle = WorkerHandle(self.ids, self.start(scheduling_strategy=here), now_s, reservation, node)
        self.workers[handle.id] = handle

    def retire(self, workers: Iterable[int], now_s: float) -> None:
        """Give the slots of these workers back. The workers become spares; on GPUs they end."""
        if self.gpu:
            return self.end(workers)
        for id in workers:
            handle = self.spares[id] = self.workers.pop(id)
            handle.free()
            handle.since_s = now_s

    def end(self, ids: Iterable[int]) -> None:
        for id in ids:
            (self.workers if id in self.workers else self.spares).pop(id).end()

    def end_all(self) -> None:
        self.cancel([*self.reservations])
        self.end([*self.workers, *self.spares])

    @property
    def committed(self) -> Committed:
        """The newest checkpoint that any worker has reported."""
        return max((one.reached.committed for one in (*self.workers.values(), *self.spares.values())), default=Committed())

    def keep(self, within_s: float) -> bool:
        """Have a worker write the newest state to the store, within this many seconds. Returns whether the store has it.

        The workers that answer in time say how far they are, and the one with the most steps writes. If it fails, the next one is asked.
        Example: workers at steps 40, 40 and 39. The first hangs while it writes; the second writes step 40.
        """
        deadline_s = time.monotonic() + within_s
        asked = [worker for worker in self.workers.values() if worker.phase is not Phase.LOADING]
        while asked and (left_s := deadline_s - time.monotonic()) > 0:
            reached = answers({worker: worker.actor.reached.remote() for worker in asked}, min(left_s, ANSWER_S))
            newest = max(reached, key=lambda worker: reached[worker].step, default=None)
            if newest is not None:
                kept = answers({newest: newest.actor.keep.remote()}, max(0, deadline_s - time.monotonic()) / 2)
                if not kept:
                    asked.remove(newest)  # it is dead or hangs; another worker has the same state, or a slightly older one
                elif kept[newest].step >= reached[newest].step or reached[newest].step <= 0:  # step 0 needs no checkpoint
                    newest.reached = newest.reached._replace(committed=kept[newest])
                    return True
            time.sleep(RETRY_S)
        return False


def over(call: Any) -> bool:
    """Whether there is a call and it has ended, with a result or an error."""
    return call is not None and bool(ray.wait([call], timeout=0)[0])


def answers(asked: dict[WorkerHandle, Any], within_s: float) -> dict[WorkerHandle, Any]:
    """The answers that came within this many seconds. A worker that died has none."""
    done, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=within_s)
    answered: dict[WorkerHandle, Any] = {}
    for worker, call in asked.items():
        with contextlib.suppress(RayError):  # the worker died
            if call in done:
                answered[worker] = ray.get(call)
    return answered


def wait_all(workers: Sequence[WorkerHandle], within_s: float) -> None:
    """Wait until all of these workers are idle, or this many seconds have passed."""
    if tasks := [worker.task for worker in workers if worker.task is not None]:
        ray.wait(tasks, num_returns=len(tasks), timeout=within_s)
