"""A run whose members come and go: the driver's side.

The driver claims slots from control (`cluster.capacity.allocator`) and hears what its job may have by now. Where that is less than it
holds, its members stop after the step that is under way, those who have to leave end, and the others go on at once, since what they have
learnt is in their memory. Where it is more, new members load everything beside the training and are taken in between two steps. Where it is
none, the last state is kept in the store, everybody leaves, and the run goes on from there when slots return. A member that is lost is
replaced while the others go on; one that does not stop within the deadline is ended.

Where a slot is no accelerator, a member that leaves stays as a spare: without a slot, without work, and loaded, so that the next slot on
its machine trains at once. On a GPU it would keep memory that is not its own any more, so there it ends.
"""

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.capacity.arbiter import Job
from cluster.config import Config
from cluster.errors import JobFailed
from jobs.training.heartbeat import Heartbeats
from jobs.training.progress import Meter, Progress
from jobs.training.worker import Outcome, ProcessGroup, Reached, Where, Work, Worker

TURN_S = 0.1
ASK_ALIVE_S = 1
"""How often a worker is asked how far it is."""
WATCH_S = 1
"""At most how often ``watch`` hears of the progress."""
LOST_S = 30
"""A member that has not answered for this long is taken for hung, and ended."""
LEFT_S = 10
"""How long members may take to notice that one of them is gone."""
KEEP_S = 5
ENDING_S = float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", 3)) - 1
"""How long a run that is ended from outside may take to keep its state, before Ray kills it."""
ANSWER_S = 1
"""How long members may take to say how far they are."""
ENDED_S = 0.7
"""Within this time Ray has ended a process that was to be killed, whatever it was writing."""
STUCK_S = 45
"""Members of whom none has ended its step for this long, or for `STUCK_TIMES` the longest before, are taken for hung, though they answer."""
STUCK_TIMES = 10
LOAD_S = 900
"""How long a member may take to load everything; a large model from a remote store takes its time."""
JOIN_S = 30
"""How long those who are ready wait for others who load, before they are taken in without them."""
MOST_FAILURES = 3
"""Without a step in between."""


class Ended(NamedTuple):
    """A run at its end."""

    name: str
    metrics: dict[str, float]


def ignore(_: Any) -> None: ...


def fit(
    config: Config,
    work: Callable[[dict[str, Any]], Work],
    settings: dict[str, Any],
    name: str,
    priority: int = 0,
    watch: Callable[[Progress], None] = ignore,
    note: Callable[[str], None] = ignore,
) -> Ended:
    """Train ``work(settings)`` to its end, on as many slots as there are at the time. Its files are then at `runs.result`.

    ``name``: from `runs.begun` or `runs.resumed`. Both callbacks run in this thread, and must be quick: ``watch`` hears of the progress at most
    once a second, ``note`` hears words such as "training with 3 workers from step 40", which are in the log too.

    ``settings["stage"]`` names the run in its progress lines; the name's first part by default.

    Raises `JobFailed` where it cannot go on. Its checkpoints stay then, and where it is ended from outside, for whoever resumes it;
    `springtide cancel` removes them.
    """
    per_worker = config.training.slots_per_worker
    least, most = (workers * per_worker for workers in (config.training.min_workers, config.training.workers))
    claiming = Heartbeats(Job(name, priority, time.time(), least, most, per_worker), note)
    run = Run(config, work, {"stage": name.rpartition("-")[0], **settings}, claiming, watch, note)
    try:
        while run.ended is None:
            run.turn(time.monotonic())
            time.sleep(TURN_S)
        return Ended(name, {**run.ended.metrics, "steps_lost": float(run.lost)})
    except JobFailed as error:
        run.keep(KEEP_S)
        error.do = f"Mend what the log says, then go on from its newest checkpoint with --resume {name}."
        raise
    except BaseException:  # cancelled, or the pool ends, or Ray is away
        words = "what was learnt is kept" if run.leave_off(ENDING_S) else "its newest checkpoint is kept"
        run.end()
        print(f"{words}: --resume {name}", flush=True)
        time.sleep(ENDED_S)  # nobody writes any more when this process has ended
        raise
    finally:
        run.end()
        claiming.end()


# what is done next: pure


class Now(NamedTuple):
    """Members, counted."""

    wanted: int
    learning: int
    """Train at this moment."""
    ready: int
    """Could train, and wait to be taken in."""
    preparing: int
    """Load what they need."""
    least: int = 1
    awaited: int | None = None
    """Of those who load, those that are worth waiting for; all by default."""


class Next(NamedTuple):
    start: int = 0
    """New members."""
    dismiss: int = 0
    """Of those who do not train, the newest first."""
    stop: bool = False
    """After the step that is under way."""
    learn: bool = False
    """Begin, with all who are ready."""


def decide(now: Now) -> Next:
    """
    >>> decide(Now(wanted=1, learning=2, ready=0, preparing=1))
    Next(start=0, dismiss=1, stop=True, learn=False)
    >>> decide(Now(wanted=1, learning=0, ready=2, preparing=0))
    Next(start=0, dismiss=1, stop=False, learn=True)
    """
    idle = now.ready + now.preparing
    dismissed = min(idle, max(0, now.learning + idle - now.wanted))
    preparing = max(0, (now.preparing if now.awaited is None else now.awaited) - dismissed)
    ready = now.ready - max(0, dismissed - now.preparing)
    return Next(
        start=max(0, now.wanted - now.learning - idle),
        dismiss=dismissed,
        stop=now.learning > 0 and (now.learning > now.wanted or (ready > 0 and preparing == 0)),
        learn=now.learning == 0 and ready >= now.least,
    )


# carrying it out


class SlotReservation:
    """Slots that are being got for a member, or that one has: a placement group, which takes no process."""

    def __init__(self, slots: int) -> None:
        self.group = placement_group([{"slot": slots}])
        self.since_s = time.monotonic()

    def node(self) -> str | None:
        """Where they are; None until they are there."""
        known: Any = placement_group_table(self.group)
        return known["bundles_to_node_id"][0] if known["state"] == "CREATED" else None

    def free(self) -> None:
        remove_placement_group(self.group)


class WorkerHandle:
    """One member, as the driver knows it."""

    def __init__(self, actor: Any, place: SlotReservation | None = None, node: str = "") -> None:
        self.actor = actor
        self.place, self.node = place, node
        """None where the actor itself holds its slots, and for a spare."""
        self.phase: Literal["preparing", "ready", "learning"] = "preparing"
        self.call = actor.prepare.remote()
        """What it does now; None where it has said how that ended."""
        self.where: Where | None = None
        self.alive = self.call
        """The newest question whether it is there."""
        self.heard_s = time.monotonic()
        self.left_s = 0.0
        """When it became a spare."""
        self.trained = 0
        """The last formation in which it has done a step, as far as is known."""
        self.trains: Any = None
        """The question whether it has in this one."""
        self.stepping = False

    @property
    def machine(self) -> str:
        return self.where.node if self.where else self.node


class Run:
    def __init__(
        self,
        config: Config,
        work: Callable[[dict[str, Any]], Work],
        settings: dict[str, Any],
        claiming: Heartbeats,
        watch: Callable[[Progress], None],
        note: Callable[[str], None],
    ) -> None:
        self.watch, self.note = watch, note
        self.meter: Meter | None = None
        """Of the present process group, once a worker of it has answered."""
        self.watched: tuple[float, int] = (float("-inf"), -1)
        """When ``watch`` was last told, and of which step."""
        self.config = config
        self.claiming = claiming
        self.per_worker = config.training.slots_per_worker
        self.spare = config.pool.accelerator == "slot"
        """Whether those who leave stay as spares."""
        shared = ray.put({**settings, "checkpoint_s": config.training.checkpoint_s, "report_s": config.training.report_s})
        self.member = lambda **held: (
            ray.remote(Worker).options(num_cpus=0, max_concurrency=8, **held).remote(work, shared, config.store, claiming.job.id)
        )
        self.places: list[SlotReservation] = []
        """Those that are not there yet."""
        self.seats: list[WorkerHandle] = []
        """Those who have been there the longest first: they stay the longest."""
        self.spares: list[WorkerHandle] = []
        self.formation = 0
        self.told, self.kept = 0, 0
        """The last formation that was told to end, and the last one whose state was kept because it did not."""
        self.yielding_s: float | None = None
        """Since when it holds more than it may have."""
        self.broken_s: float | None = None
        """Since when one of its members is gone."""
        self.failures, self.step = 0, 0
        self.begun, self.lost = 0, 0
        """Steps that were done when this formation began, and those that had to be done again so far."""
        self.moved_s, self.longest_s = time.monotonic(), 0.0
        """When a step was last seen to be done, or could begin, and the longest that one took so far."""
        self.ended: Outcome | None = None

    def turn(self, now_s: float) -> None:
        """Look at everybody, then do what is next."""
        self._place()
        self._hear(now_s)
        if self.ended is not None:  # nobody begins once more what is done
            return
        wanted = self.claiming.wanted(self.held) // self.per_worker
        self.yielding_s = (self.yielding_s or now_s) if len(self.seats) > wanted else None
        learning, ready, preparing = (len(self._in(phase)) for phase in ("learning", "ready", "preparing"))
        since_s = [*(seat.heard_s for seat in self._in("preparing")), *(place.since_s for place in self.places)]
        awaited = sum(now_s - at_s < JOIN_S for at_s in since_s)
        do = decide(Now(wanted, learning, ready, preparing + len(self.places), self.config.training.min_workers, awaited))
        if do.dismiss:
            self._leave(do.dismiss)
        for _ in range(do.start):
            self._start()
        self._claim()
        if do.stop:
            self._stop()
        if do.learn:
            self._learn()
        self._enforce(wanted, now_s)
        self._claim()

    @property
    def held(self) -> int:
        return (len(self.seats) + len(self.places)) * self.per_worker

    def _claim(self) -> None:
        training = [seat for seat in self._in("learning") if seat.trained == self.formation]
        self.claiming.holds = self.held, len(training) * self.per_worker

    def _in(self, phase: str) -> list[WorkerHandle]:
        return [seat for seat in self.seats if seat.phase == phase]

    # hearing

    def _hear(self, now_s: float) -> None:
        """What has ended since the last turn, and who is still there."""
        for seat in [*self.seats, *self.spares]:
            try:
                self._listen(seat, now_s)
            except RayTaskError as error:  # the work cannot even be loaded
                self._lost([seat], f"{error.cause or error}", now_s)
            except RayError as error:  # it died, or Ray could not start it, or had to end it
                self._lost([seat], f"{type(error).__name__}: {str(error).splitlines()[0]}", now_s)
        learning = self._in("learning")
        if not any(seat.call for seat in learning):  # the next formation begins when everybody is out of this one
            self.broken_s = None
            for seat in learning:
                seat.phase = "ready"

    def _listen(self, seat: WorkerHandle, now_s: float) -> None:
        if over(seat.call):
            self._heard(seat, ray.get(seat.call), now_s)
        if over(seat.trains):
            trained: Any = ray.get(seat.trains)
            seat.trained, seat.trains = trained, None
        if not over(seat.alive):
            return
        if isinstance(said := ray.get(seat.alive), Reached):
            seat.stepping = said.stepping
            self._reached(said.step)
            self._watch(said, now_s)
        if now_s - seat.heard_s > ASK_ALIVE_S or seat.phase == "preparing":
            seat.alive, seat.heard_s = seat.actor.reached.remote(), now_s

    def _watch(self, said: Reached, now_s: float) -> None:
        """Tell ``watch`` and ``note`` what a worker answered."""
        workers = len(self._in("learning"))
        if said.group != self.formation or not workers:
            return
        if self.meter is None or self.meter.group != said.group:
            self.meter = Meter(said.group, said.step, said.tokens, now_s)
            self.note(f"training with {workers} workers from step {said.first}")
        if now_s - self.watched[0] >= WATCH_S and said.step > max(self.watched[1], self.meter.step):
            self.watched = now_s, said.step
            self.watch(self.meter.progress(said.step, said.steps, said.loss, said.tokens, workers, now_s))

    def _heard(self, seat: WorkerHandle, said: "Where | Outcome", now_s: float) -> None:
        seat.call = None
        if isinstance(said, Where):
            seat.where, seat.phase = said, "ready"
            return
        self.ended = said if said.ended else self.ended
        if said.first >= 0:
            self.lost, self.begun = self.lost + max(0, self.begun - said.first), 0  # each formation's loss counts once
        self._reached(said.step)
        if said.step > said.first:
            seat.trained = self.formation
        if said.broken and self.broken_s is None:
            self._failed(said.broken)
            self.broken_s = now_s

    def _reached(self, step: int) -> None:
        if step > self.step:
            now_s = time.monotonic()
            self.longest_s = max(self.longest_s, (now_s - self.moved_s) / (step - self.step))
            self.step, self.failures, self.moved_s = step, 0, now_s

    def _lost(self, seats: list[WorkerHandle], why: str, now_s: float) -> None:
        if not seats:
            return
        if all(seat in self.spares for seat in seats):
            return self.dismiss(seats)
        self._say(f"{len(seats)} of {len(self.seats)} workers lost: {why}")
        if self.broken_s is None:
            self._failed(why)
        if any(seat.phase == "learning" for seat in seats):
            self.broken_s = self.broken_s or now_s
            self._stop()  # a process of a machine that Ray has lost may go on for a while, and the others with it
        self.dismiss(seats)

    def _failed(self, why: str) -> None:
        self.failures += 1
        if self.failures > MOST_FAILURES:
            raise JobFailed(f"The training failed {self.failures} times at step {self.step}: {why}")

    # doing

    def _learn(self) -> None:
        """A new formation of all who are ready."""
        seats = self._in("ready")
        hosts = {seat.where.host for seat in seats if seat.where}
        try:
            meeting: Any = ray.get(seats[0].actor.meeting.remote(len(hosts) == 1), timeout=LOST_S)
        except RayError as error:
            return self._lost(seats[:1], str(error), time.monotonic())
        self.formation, self.begun, self.moved_s = self.formation + 1, self.step, time.monotonic()
        for rank, seat in enumerate(seats):
            seat.phase = "learning"
            seat.call = seat.actor.learn.remote(ProcessGroup(self.formation, rank, len(seats), meeting))
            seat.trains = seat.actor.trains.remote(self.formation)

    def _stop(self) -> None:
        """Have the formation end after the step that is under way."""
        if self.told < self.formation:
            self.told = self.formation
            for seat in self._in("learning"):
                seat.actor.stop.remote(self.formation)

    def _start(self) -> None:
        """One more member, or a spare, once there is a slot."""
        if self.spare:
            self.places.append(SlotReservation(self.per_worker))
        else:
            self.seats.append(WorkerHandle(self.member(num_gpus=self.per_worker)))

    def _place(self) -> None:
        """Who is there for the slots that have come: a spare of that machine, or a new member."""
        for place in list(self.places):
            if (node := place.node()) is None:
                continue
            self.places.remove(place)
            seat = next((spare for spare in self.spares if spare.node == node), None)
            if seat is None:
                here = NodeAffinitySchedulingStrategy(node, soft=False)
                seat = WorkerHandle(self.member(scheduling_strategy=here), node=node)
            else:
                self.spares.remove(seat)
            seat.place = place
            self.seats.append(seat)

    def _leave(self, count: int) -> None:
        """The last that came, in order, and of those who have what was learnt the last: where none of them stays, it is kept first."""
        for place in self.places[-count:]:
            self.places.remove(place)
            place.free()
            count -= 1
        among = Counter(seat.machine for seat in self.seats)
        # A replica may need a whole machine.
        ready = sorted(self._in("ready"), key=lambda seat: (-seat.trained, -among[seat.machine]))
        idle = [*ready, *self._in("preparing")]
        seats, loaded = idle[len(idle) - count :], [seat for seat in self.seats if seat.where]
        newest = max((seat.trained for seat in loaded), default=0)
        if loaded and not any(seat.trained == newest for seat in loaded if seat not in seats):
            left_s = self.config.training.yield_deadline_s - (time.monotonic() - (self.yielding_s or time.monotonic()))
            self.keep(max(KEEP_S, left_s))
        if not self.spare:
            return self.dismiss(seats)
        for seat in seats:
            self._free(seat)
            seat.left_s = time.monotonic()
            self.seats.remove(seat)
            self.spares.append(seat)

    def _free(self, seat: WorkerHandle) -> None:
        if seat.place is not None:
            seat.place.free()
            seat.place = None

    def leave_off(self, within_s: float) -> bool:
        """Stop after the step that is under way, unless that takes too long, and keep what was learnt. Whether that was possible."""
        self._stop()
        if calls := [seat.call for seat in self._in("learning") if seat.call]:
            ray.wait(calls, num_returns=len(calls), timeout=within_s / 2)
        return self.keep(within_s / 2)

    def keep(self, within_s: float) -> bool:
        """Have the newest state that anybody has who answers written to the store, tried again while there is time. Whether it is."""
        deadline_s = time.monotonic() + within_s
        seats = [seat for seat in self.seats if seat.where]
        while seats and (left_s := deadline_s - time.monotonic()) > 0:
            said = answers({seat: seat.actor.reached.remote() for seat in seats}, min(left_s, ANSWER_S))
            newest = max(said, key=lambda seat: said[seat].step, default=None)
            if newest is not None:
                kept = answers({newest: newest.actor.keep.remote()}, max(0, deadline_s - time.monotonic()) / 2)
                if not kept:
                    seats.remove(newest)  # it is gone, or hangs; another has as much, or nearly
                elif kept[newest] >= said[newest].step or said[newest].step == 0:  # nothing to keep before the first step
                    return True
            time.sleep(TURN_S)
        if self.step > 0:
            self._say(f"the state could not be kept within {within_s:.0f} s; the newest checkpoint counts")
        return False

    def _say(self, words: str) -> None:
        print(words, flush=True)
        self.note(words)

    def dismiss(self, seats: list[WorkerHandle]) -> None:
        """End members, and give their slots back. Ray sees the processes end within some hundredths of a second."""
        for seat in seats:
            ray.kill(seat.actor)
            self._free(seat)
            (self.spares if seat in self.spares else self.seats).remove(seat)

    def end(self) -> None:
        """End everybody."""
        for place in self.places:
            place.free()
        self.places.clear()
        self.dismiss([*self.seats, *self.spares])

    def _enforce(self, wanted: int, now_s: float) -> None:
        """End those who do not answer, who do not stop in time, or who cannot notice that another is gone."""
        learning = self._in("learning")
        self.dismiss([spare for spare in self.spares if now_s - spare.left_s > self.config.fleet.standby_s])
        if hung := [seat for seat in [*self.seats, *self.spares] if now_s - seat.heard_s > LOST_S and seat.where]:
            self._lost(hung, f"no answer for {LOST_S} s", now_s)
        elif late := [seat for seat in self.seats if not seat.where and now_s - seat.heard_s > LOAD_S]:
            self._lost(late, f"not ready after {LOAD_S} s", now_s)
        elif self.broken_s is not None and now_s - self.broken_s > LEFT_S:
            self.keep(KEEP_S)
            self._cut("they did not notice that another was gone", now_s)
        elif learning and self._stuck(now_s):
            self.keep(KEEP_S)
            self._cut(f"no step was done for {now_s - self.moved_s:.0f} s", now_s)
        elif len(learning) > wanted and self.yielding_s is not None:
            self._press(now_s - self.yielding_s, now_s)

    def _stuck(self, now_s: float) -> bool:
        """Whether a step takes far longer than any before, on members that answer: one of them, or their network, hangs."""
        patience_s = max(STUCK_S, STUCK_TIMES * self.longest_s) if self.longest_s else LOAD_S
        return now_s - self.moved_s > patience_s and all(seat.stepping for seat in self._in("learning"))

    def _press(self, since_s: float, now_s: float) -> None:
        """They were asked for slots ``since_s`` ago, and train on: half of their time is for the step under way, half to keep the state."""
        deadline_s = self.config.training.yield_deadline_s
        if since_s > deadline_s / 2 and self.kept < self.formation:
            self.kept = self.formation
            self.keep(deadline_s / 2)
        if since_s > deadline_s:
            self._cut(f"they did not give their slots back within {deadline_s:.0f} s", now_s)

    def _cut(self, why: str, now_s: float) -> None:
        """End those who are still in a formation: who is out of it has what was learnt."""
        self._lost([seat for seat in self._in("learning") if seat.call], why, now_s)


def over(call: Any) -> bool:
    """Whether there is one, and it has ended."""
    return call is not None and bool(ray.wait([call], timeout=0)[0])


def answers(asked: dict[WorkerHandle, Any], within_s: float) -> dict[WorkerHandle, Any]:
    """What those said who answered in time."""
    done, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=within_s)
    said: dict[WorkerHandle, Any] = {}
    for seat, call in asked.items():
        with contextlib.suppress(RayError):  # it is gone
            if call in done:
                said[seat] = ray.get(call)
    return said
