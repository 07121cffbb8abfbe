"""What the driver has in Ray: workers, spares and slot reservations, by number.

Where a slot is no accelerator, a worker that leaves becomes a spare: a loaded process without a slot and without work. The next slot on its
machine trains at once. On a GPU a spare would keep memory that is not its own any more, so there the worker ends.
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
"""How often a worker is asked how far it is."""
ANSWER_S = 1
"""How long workers may take to say how far they are before one of them is asked to keep its state."""
RETRY_S = 0.1


class SlotReservation:
    """Slots for one worker: a placement group, which takes no process."""

    def __init__(self, id: int, slots: int, now_s: float) -> None:
        self.id, self.since_s = id, now_s
        self.group = placement_group([{"slot": slots}])

    def facts(self) -> ReservationFacts:
        return ReservationFacts(self.id, self.since_s, self._machine())

    def _machine(self) -> str:
        """The node of the slots; empty until Ray has found them."""
        known: Any = placement_group_table(self.group)
        return known["bundles_to_node_id"][0] if known["state"] == "CREATED" else ""

    def free(self) -> None:
        remove_placement_group(self.group)


class WorkerHandle:
    """One worker or spare, as the driver knows it."""

    def __init__(self, id: int, actor: Any, now_s: float, reservation: SlotReservation | None = None, node: str = "") -> None:
        self.id, self.actor = id, actor
        self.reservation = reservation
        """None where the actor itself holds its slots, and for a spare."""
        self.node, self.host = node, ""
        self.phase = Phase.LOADING
        self.since_s = self.heard_s = now_s
        self.group, self.first, self.trained = 0, -1, 0
        self.reached = Reached(-1)
        self.outcome: Outcome | None = None
        self.gone = ""
        self.task: Any = actor.load.remote()
        """What it does now; None while it is idle."""
        self.question: Any = None
        """How far it is."""
        self.trains: Any = None
        """Answers when it has done a step in its process group."""

    def listen(self, now_s: float) -> None:
        """Take up what it has answered, and ask again."""
        try:
            self._listen(now_s)
        except RayTaskError as error:  # the work itself raised: it cannot be loaded, or its store is away
            self.gone = f"{error.cause or error}"
        except RayError as error:  # the process died, or Ray could not start it, or had to end it
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

    def _end_task(self, said: "Loaded | Outcome", now_s: float) -> None:
        self.task = None
        self._enter(Phase.IDLE)
        if isinstance(said, Loaded):
            self.host, self.node, self.heard_s = said.host, said.node, now_s
            return
        self.outcome = said
        self._note_first(said.first)
        if said.step > said.first >= 0:
            self.trained = self.group

    def _note_first(self, step: int) -> None:
        self.first = max(self.first, step)

    def _enter(self, phase: Phase) -> None:
        assert phase in NEXT_PHASES[self.phase], f"{self.phase} → {phase}"  # noqa: S101 (an invariant)
        self.phase = phase

    def join(self, group: ProcessGroup) -> None:
        self._enter(Phase.ACTIVE)
        self.group, self.first, self.outcome = group.number, -1, None
        self.task = self.actor.train.remote(group)
        self.trains = self.actor.trains.remote(group.number)

    def stop(self) -> None:
        """End its process group after the step under way."""
        self.actor.stop.remote(self.group)

    def free(self) -> None:
        """Give its slots back, where it does not hold them itself."""
        if self.reservation is not None:
            self.reservation.free()
            self.reservation = None

    def end(self) -> None:
        """Ray has ended the process within some hundredths of a second."""
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
        )

    def spare_facts(self) -> SpareFacts:
        return SpareFacts(self.id, self.node, self.since_s, self.heard_s, self.phase is not Phase.LOADING, self.gone)


class Crew:
    """The workers, spares and reservations of one run."""

    def __init__(self, start: Callable[..., Any], slots_per_worker: int, gpu: bool) -> None:
        """``start(**options)``: start an actor, with these options for Ray."""
        self.start, self.slots_per_worker, self.gpu = start, slots_per_worker, gpu
        self.workers: dict[int, WorkerHandle] = {}
        """In order of arrival."""
        self.spares: dict[int, WorkerHandle] = {}
        self.reservations: dict[int, SlotReservation] = {}
        self.ids = 0

    @property
    def held(self) -> int:
        """Slots."""
        return (len(self.workers) + len(self.reservations)) * self.slots_per_worker

    def active(self, group: int) -> list[WorkerHandle]:
        return [worker for worker in self.workers.values() if worker.phase is Phase.ACTIVE and worker.group == group]

    def listen(self, now_s: float) -> None:
        for handle in (*self.workers.values(), *self.spares.values()):
            handle.listen(now_s)

    def reserve(self, now_s: float) -> None:
        """Get slots for one more worker."""
        self.ids += 1
        if self.gpu:
            self.workers[self.ids] = WorkerHandle(self.ids, self.start(num_gpus=self.slots_per_worker), now_s)
        else:
            self.reservations[self.ids] = SlotReservation(self.ids, self.slots_per_worker, now_s)

    def cancel(self, reservations: Iterable[int]) -> None:
        for id in reservations:
            self.reservations.pop(id).free()

    def place(self, placement: WorkerPlacement, node: str, now_s: float) -> None:
        """Have a spare or a new worker take the slots of a reservation."""
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
        """The newest checkpoint, as far as the workers have said."""
        return max((one.reached.committed for one in (*self.workers.values(), *self.spares.values())), default=Committed())

    def keep(self, within_s: float) -> bool:
        """Have the newest state among the workers that answer written to the store, tried again while there is time. Returns whether it is."""
        deadline_s = time.monotonic() + within_s
        asked = [worker for worker in self.workers.values() if worker.phase is not Phase.LOADING]
        while asked and (left_s := deadline_s - time.monotonic()) > 0:
            said = answers({worker: worker.actor.reached.remote() for worker in asked}, min(left_s, ANSWER_S))
            newest = max(said, key=lambda worker: said[worker].step, default=None)
            if newest is not None:
                kept = answers({newest: newest.actor.keep.remote()}, max(0, deadline_s - time.monotonic()) / 2)
                if not kept:
                    asked.remove(newest)  # it is gone, or hangs; another has as much, or nearly
                elif kept[newest].step >= said[newest].step or said[newest].step <= 0:  # nothing to keep before the first step
                    newest.reached = newest.reached._replace(committed=kept[newest])
                    return True
            time.sleep(RETRY_S)
        return False


def over(call: Any) -> bool:
    """Whether there is a call, and it has ended."""
    return call is not None and bool(ray.wait([call], timeout=0)[0])


def answers(asked: dict[WorkerHandle, Any], within_s: float) -> dict[WorkerHandle, Any]:
    """The answers that came in time."""
    done, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=within_s)
    said: dict[WorkerHandle, Any] = {}
    for worker, call in asked.items():
        with contextlib.suppress(RayError):  # it is gone
            if call in done:
                said[worker] = ray.get(call)
    return said


def wait_all(workers: Sequence[WorkerHandle], within_s: float) -> None:
    """Until all have ended what they do, or the time is over."""
    if tasks := [worker.task for worker in workers if worker.task is not None]:
        ray.wait(tasks, num_returns=len(tasks), timeout=within_s)
