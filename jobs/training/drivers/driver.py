"""An elastic run, from the driver's side: the one loop that owns Ray and the time.

Ten times a second the driver looks at its workers, its reservations and the grant. `jobs.training.drivers.elasticity.next_actions` says what to do,
and the driver does it. That file explains the decisions, and `jobs.training.drivers.worker` the workers.
"""

import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import ray
from ray.exceptions import RayError

from cluster.capacity.arbiter import Job
from cluster.config import Config
from cluster.errors import JobFailed
from jobs.training.drivers.elasticity import HUNG_S, Actions, Began, Limits, Run, RunFacts, next_actions
from jobs.training.drivers.handles import Crew, slots_of, wait_all
from jobs.training.drivers.heartbeat import Heartbeats
from jobs.training.drivers.worker import Outcome, Reached, Worker
from jobs.training.process_group import ProcessGroup
from jobs.training.progress import Committed, Meter, Progress
from jobs.training.state.state import Measured
from jobs.training.work import Work

TURN_S = 0.1
WATCH_S = 1
"""``watch`` is called at most this often."""
ENDING_S = float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", 3)) - 1
"""How long a run that is stopped from outside may take to write its state. Ray kills it a second later."""
ENDED_S = 0.7
"""Ray ends a process within this time after the kill, whatever the process was writing."""


class Listener(Protocol):
    """Hears how a run goes. It must be quick."""

    def watch(self, progress: Progress) -> None:
        """The progress, at most once a second."""
        ...

    def note(self, words: str, waiting: str) -> None:
        """A message such as "training with 3 workers from step 40", which is in the log too, and what the run waits for; empty if it waits for
        nothing."""
        ...

    def checkpoint(self, committed: Committed) -> None:
        """The newest checkpoint."""
        ...

    def measured(self, step: int, metrics: dict[str, float]) -> None:
        """A measurement while the run goes on: what `Work.measure` found after ``step`` steps."""
        ...


class Ended(NamedTuple):
    """A run at its end."""

    name: str
    metrics: dict[str, float]


def fit(
    config: Config,
    work: Callable[[dict[str, Any]], Work],
    settings: dict[str, Any],
    name: str,
    priority: int,
    listener: Listener,
    check: Callable[[], None] = lambda: None,
    parts: int = 1,
) -> Ended:
    """Train ``work(settings)`` to its end, on as many slots as the grant allows at the time. `runs.result` then has its files.

    ``name``: from `runs.begin` or `runs.resume`. ``settings["stage"]`` names the run in its progress lines; by default it is the first part of
    the name. The ``listener`` is called in this thread, and so is ``check``, ten times a second: what it raises ends the run. ``parts``: processes
    of a worker, see `jobs.training.sharding.parts`.

    Raises `JobFailed` if the run cannot go on. Its checkpoints stay, so that another job can resume it; the same holds for a run that is stopped
    from outside. `springtide cancel` removes them.
    """
    driver = Driver(config, work, {"stage": name.rpartition("-")[0], **settings}, name, priority, Reporter(listener), parts)
    try:
        while driver.result is None:
            check()
            driver.turn(time.monotonic())
            time.sleep(TURN_S)
        return Ended(name, {**driver.result.metrics, "steps_lost": float(driver.run.lost)})
    except JobFailed as error:
        error.do = error.do or f"Fix what the log says, then continue from the newest checkpoint with --resume {name}."
        raise
    except BaseException:  # cancelled, or the pool ends, or Ray is away
        words = "the newest state is kept" if driver.leave_off(ENDING_S) else "the newest checkpoint is kept"
        driver.crew.end_all()
        print(f"{words}: --resume {name}", flush=True)
        time.sleep(ENDED_S)  # when this process ends, no worker still writes
        raise
    finally:
        driver.crew.end_all()
        driver.heartbeats.end()


class Driver:
    """Looks, decides, carries out."""

    def __init__(
        self,
        config: Config,
        work: Callable[[dict[str, Any]], Work],
        settings: dict[str, Any],
        name: str,
        priority: int,
        tell: "Reporter",
        parts: int,
    ) -> None:
        training, per_worker = config.training, slots_of(config.training.slots_per_worker, parts)
        shared = ray.put({**settings, "checkpoint_s": training.checkpoint_s, "report_s": training.report_s})

        def start(part: int, **held: Any) -> Any:
            actor = ray.remote(Worker).options(num_cpus=0, max_concurrency=8, **held)
            return actor.remote(work, shared, config.store, name, part)

        self.tell = tell
        self.limits = Limits(training.min_workers, training.yield_deadline_s, per_worker, config.fleet.warm_pool_s)
        self.crew = Crew(start, per_worker, config.pool.accelerator == "gpu", parts)
        self.run = Run(moved_s=time.monotonic())
        self.result: Outcome | None = None
        least, most = training.min_workers * per_worker, training.workers * per_worker
        self.heartbeats = Heartbeats(Job(name, priority, time.time(), least, most, per_worker))

    def turn(self, now_s: float) -> None:
        """Look, decide and act once. Raises `JobFailed` if the run cannot go on."""
        self.crew.listen(now_s)
        facts = self._facts(now_s)
        self.run, actions = next_actions(self.run, facts, self.limits)
        self._carry_out(actions, facts, now_s)
        self.tell.committed(self.crew.committed)
        active = self.crew.active(self.run.group)
        trained = [worker for worker in active if worker.trained == self.run.group]
        self.heartbeats.holds = self.crew.held, len(trained) * self.crew.slots_per_worker
        if active and active[0].reached.group == self.run.group:
            self.tell.progress(active[0].reached, len(active), now_s)

    def _facts(self, now_s: float) -> RunFacts:
        return RunFacts(
            now_s,
            self.heartbeats.grant,
            now_s - self.heartbeats.answered_s,
            tuple(worker.facts() for worker in self.crew.workers.values()),
            tuple(reservation.facts() for reservation in self.crew.reservations.values()),
            tuple(spare.spare_facts() for spare in self.crew.spares.values()),
        )

    def _carry_out(self, do: Actions, facts: RunFacts, now_s: float) -> None:
        """In the order of the fields of `Actions`."""
        for words in do.notes:
            self.tell.say(words, self.run.heard.waits_for)
        if do.began:
            self.tell.began(do.began)
        if do.keep_s is not None:
            self._keep(do.keep_s)
        self.crew.end(do.end)
        self.crew.cancel(do.cancel)
        self.crew.retire(do.retire, now_s)
        machines = {reservation.id: reservation.machine for reservation in facts.reservations}
        for placement in do.place:
            self.crew.place(placement, machines[placement.reservation], now_s)
        for _ in range(do.reserve):
            self.crew.reserve(now_s)
        if do.stop is not None:
            self._stop(do.stop)
        if do.form:
            self._form(do.form)
        if do.finish:
            self._finish()
        if do.fail:
            raise JobFailed(*do.fail)

    def _keep(self, within_s: float) -> bool:
        kept = self.crew.keep(within_s)
        self.tell.committed(self.crew.committed)
        if not kept and self.run.step > 0:
            self.tell.say(
                f"the state could not be written within {within_s:.0f} s; the newest checkpoint counts", self.run.heard.waits_for
            )
        return kept

    def _stop(self, group: int) -> None:
        for worker in self.crew.active(group):
            worker.stop()

    def _form(self, ids: tuple[int, ...]) -> None:
        workers = [self.crew.workers[id] for id in ids]
        one_machine = len({worker.host for worker in workers}) == 1
        try:
            rendezvous: Any = ray.get(workers[0].actors[0].meet.remote(one_machine), timeout=HUNG_S)
        except RayError as error:
            workers[0].gone = f"it made no rendezvous: {error}"
            return
        for rank, worker in enumerate(workers):
            worker.join(ProcessGroup(self.run.group, rank, len(workers), rendezvous))

    def _finish(self) -> None:
        outcomes = [worker.outcome for worker in self.crew.workers.values() if worker.outcome]
        self.result = next(outcome for outcome in outcomes if outcome.ended)
        self.tell.finished(self.result, len(outcomes))

    def leave_off(self, within_s: float) -> bool:
        """Stop after the current step, unless that takes too long, and write the state to the store. Returns whether it was written."""
        self._stop(self.run.group)
        wait_all(self.crew.active(self.run.group), within_s / 2)
        return self._keep(within_s / 2)


class Reporter:
    """Tells the log and the listener how the run goes."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.newest, self.measured = Committed(), -1
        self.meter: Meter | None = None
        """Of the newest process group."""
        self.told_s, self.told_step = float("-inf"), -1

    def say(self, words: str, waiting: str) -> None:
        print(words, flush=True)
        self.listener.note(words, waiting)

    def began(self, began: Began) -> None:
        """The first worker of the group has printed the same."""
        self.listener.note(f"training with {began.workers} workers from step {began.step}", "")

    def committed(self, newest: Committed) -> None:
        """Once of each checkpoint that is newer than the last; a worker has printed it."""
        if newest.step > self.newest.step:
            self.newest = newest
            self.listener.checkpoint(newest)

    def progress(self, reached: Reached, workers: int, now_s: float) -> None:
        """Report at most once a second, and only new steps. ``reached``: from a worker of the newest process group."""
        if reached.first < 0:  # the workers are not level yet
            return
        self.tell_measured(reached.measured)
        if self.meter is None or self.meter.group != reached.group:
            self.meter = Meter(reached.group, reached.step, reached.tokens, now_s)
            self.told_step = reached.step
        if now_s - self.told_s >= WATCH_S and reached.step > self.told_step:
            self.told_s, self.told_step = now_s, reached.step
            cost = reached.ideal_s_per_token, reached.memory_mb
            self.listener.watch(
                self.meter.progress(reached.step, reached.steps, reached.loss, reached.tokens, workers, now_s, *cost)
            )

    def tell_measured(self, measured: tuple[Measured, ...]) -> None:
        """Once of each that is newer than the last."""
        for one in measured:
            if one.step > self.measured:
                self.measured = one.step
                self.listener.measured(one.step, one.metrics)

    def finished(self, outcome: Outcome, workers: int) -> None:
        self.tell_measured(outcome.measured)
        if self.meter is None:  # shorter than a second
            self.meter = Meter(0, 0, 0, time.monotonic() - outcome.metrics["seconds"])
        loss, tokens = outcome.metrics["train_loss"], int(outcome.metrics["tokens"])
        self.listener.watch(self.meter.progress(outcome.step, outcome.step, loss, tokens, workers, time.monotonic()))
