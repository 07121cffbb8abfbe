"""The driver's handles on what it has in Ray: workers, spares and slot reservations, each with a number.

If slots are no GPUs, a worker that leaves becomes a spare: a loaded process without a slot and without work. When the job gets a slot on that
machine again, the spare trains at once. On a GPU a spare would keep memory that belongs to somebody else by then, so there the worker ends.

Example: on one machine of two slots, workers 3 and 4 train. The grant falls to one: worker 4 gives its slot back and becomes spare 4. The grant
rises again: the driver makes reservation 5, Ray finds the slot, and spare 4 becomes worker 4 again without loading anything.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from jobs.training.drivers.elasticity import NEXT_PHASES, Phase, ReservationFacts, SpareFacts, WorkerFacts, WorkerPlacement
from jobs.training.drivers.worker import Loaded, Outcome, Reached
from jobs.training.process_group import ProcessGroup
from jobs.training.progress import Committed

ASK_S = 1
"""The driver asks each worker this often how far it is."""
ANSWER_S = 1
"""How long `Crew.keep` waits for the workers to say how far they are."""
RETRY_S = 0.1
"""How long `Crew.keep` waits before it tries again."""


def slots_of(per_worker: int, parts: int) -> int:
    """The slots of a worker that has so many processes: as many as `training.slots_per_worker` says, and the same for each process.

    >>> slots_of(1, 1), slots_of(1, 2), slots_of(4, 2), slots_of(3, 2)
    (1, 2, 4, 4)
    """
    return math.ceil(per_worker / parts) * parts


class SlotReservation:
    """Slots for one worker, all on one machine. It is a placement group, so it needs no process."""

    def __init__(self, id: int, slots: int, resource: str, now_s: float) -> None:
        self.id, self.since_s = id, now_s
        self.group = placement_group([{resource: slots}])

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

    def __init__(
        self, id: int, actors: Sequence[Any], now_s: float, reservation: SlotReservation | None = None, node: str = ""
    ) -> None:
        self.id, self.actors = id, actors
        """The worker's processes, by their place in it."""
        self.reservation = reservation
        """None for a spare, and for an actor that holds its slots itself."""
        self.node, self.host = node, ""
        self.phase = Phase.LOADING
        self.since_s = self.heard_s = now_s
        self.group, self.first, self.trained = 0, -1, 0
        self.reached = Reached(-1)
        self.outcome: Outcome | None = None
        self.gone = ""
        self.task: list[Any] = [actor.load.remote() for actor in actors]
        """The calls of `Worker.load` or `Worker.train` under way; none while the worker is idle."""
        self.question: list[Any] = []
        """The calls of `Worker.reached` under way."""
        self.trains: list[Any] = []
        """The calls of `Worker.trains` under way. They return when the worker has completed a step in its process group."""

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
        if ended := results(self.task):
            self._end_task(ended, now_s)
        if trained := results(self.trains):
            self.trained, self.trains = max(self.trained, min(trained)), []
        if self.phase is Phase.LOADING:
            return
        if reached := results(self.question):
            self.reached, self.question = together(reached), []
            self._note_first(self.reached.first if self.reached.group == self.group else -1)
        if not self.question and now_s - self.heard_s >= ASK_S:
            self.question, self.heard_s = self.ask(), now_s

    def ask(self) -> list[Any]:
        """Call `Worker.reached`."""
        return [actor.reached.remote() for actor in self.actors]

    def _end_task(self, ended: list[Any], now_s: float) -> None:
        self.task = []
        self._enter(Phase.IDLE)
        if isinstance(first := ended[0], Loaded):
            self.host, self.node, self.heard_s = first.host, first.node, now_s
            return
        self.outcome = result = next((one for one in ended if one.broken), first)
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
        parts = len(self.actors)
        self.task = [actor.train.remote(group._replace(part=part, parts=parts)) for part, actor in enumerate(self.actors)]
        self.trains = [actor.trains.remote(group.number) for actor in self.actors]

    def stop(self) -> None:
        """Make the worker's process group end after the current step."""
        for actor in self.actors:
            actor.stop.remote(self.group)

    def keep(self) -> list[Any]:
        """Call `Worker.keep`."""
        return [actor.keep.remote() for actor in self.actors]

    def free(self) -> None:
        """Give the worker's slots back, unless the actor holds them itself. Those it gives back only when it ends."""
        if self.reservation is not None:
            self.reservation.free()
            self.reservation = None

    def end(self) -> None:
        """Kill the processes, and give their slots back. Ray needs some hundredths of a second for it."""
        for actor in self.actors:
            ray.kill(actor)
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

    def __init__(self, start: Callable[..., Any], slots_per_worker: int, gpu: bool, parts: int = 1) -> None:
        """``start(part, **options)`` starts an actor of a worker with these options of Ray's. ``gpu``: whether a slot is a GPU. ``parts``: actors
        of a worker, which share its slots."""
        self.start, self.slots_per_worker, self.gpu, self.parts = start, slots_per_worker, gpu, parts
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
        """Request slots for one more worker. A GPU worker's only actor requests its GPUs itself; any other worker gets a reservation first."""
        self.ids += 1
        if self.gpu and self.parts == 1:
            self.workers[self.ids] = WorkerHandle(self.ids, [self.start(0, num_gpus=self.slots_per_worker)], now_s)
        else:
            resource = "GPU" if self.gpu else "slot"
            self.reservations[self.ids] = SlotReservation(self.ids, self.slots_per_worker, resource, now_s)

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
            handle = WorkerHandle(self.ids, self._actors(reservation, node), now_s, reservation, node)
        self.workers[handle.id] = handle

    def _actors(self, reservation: SlotReservation, node: str) -> list[Any]:
        """Start a worker's actors on the machine that has its slots. GPUs are given to each of them, so that it sees its own."""
        held: dict[str, Any] = {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}
        if self.gpu:
            within = PlacementGroupSchedulingStrategy(reservation.group)
            held = {"scheduling_strategy": within, "num_gpus": self.slots_per_worker // self.parts}
        return [self.start(part, **held) for part in range(self.parts)]

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
            answered = answers({worker: worker.ask() for worker in asked}, min(left_s, ANSWER_S))
            reached = {worker: together(said) for worker, said in answered.items()}
            newest = max(reached, key=lambda worker: reached[worker].step, default=None)
            if newest is not None:
                kept = answers({newest: newest.keep()}, max(0, deadline_s - time.monotonic()) / 2)
                if not kept:
                    asked.remove(newest)  # it is dead or hangs; another worker has the same state, or a slightly older one
                elif min(kept[newest]).step >= reached[newest].step or reached[newest].step <= 0:  # step 0 needs no checkpoint
                    newest.reached = newest.reached._replace(committed=min(kept[newest]))
                    return True
            time.sleep(RETRY_S)
        return False


def results(calls: list[Any]) -> list[Any]:
    """What the calls have returned; none while one of them is under way. Raises what one of them raised, without waiting for the others."""
    done, waiting = ray.wait(calls, num_returns=len(calls), timeout=0) if calls else ([], [])
    returned: list[Any] = ray.get(done)
    return [] if waiting else returned


def together(reached: Sequence[Reached]) -> Reached:
    """How far a worker is whose processes are that far: as far as the last of them."""
    return reached[0]._replace(
        step=min(one.step for one in reached),
        committed=min(one.committed for one in reached),
        memory_mb=sum(one.memory_mb for one in reached),
    )


def answers(asked: dict[WorkerHandle, list[Any]], within_s: float) -> dict[WorkerHandle, list[Any]]:
    """The answers of all processes of a worker that came within this many seconds. A worker that died has none."""
    calls = [call for some in asked.values() for call in some]
    done, _ = ray.wait(calls, num_returns=len(calls), timeout=within_s)
    answered: dict[WorkerHandle, list[Any]] = {}
    for worker, some in asked.items():
        with contextlib.suppress(RayError):  # the worker died
            if all(call in done for call in some):
                answered[worker] = ray.get(some)
    return answered


def wait_all(workers: Sequence[WorkerHandle], within_s: float) -> None:
    """Wait until all of these workers are idle, or this many seconds have passed."""
    if tasks := [call for worker in workers for call in worker.task]:
        ray.wait(tasks, num_returns=len(tasks), timeout=within_s)
