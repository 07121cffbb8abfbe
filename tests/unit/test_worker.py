"""Workers come and go, and the run learns the same: real processes and process groups, no Ray."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from jobs.training.drivers.handles import Crew
from jobs.training.drivers.worker import Reached, Worker
from jobs.training.process_group import ProcessGroup
from jobs.training.progress import Committed
from jobs.training.state.checkpoints import Checkpoints
from jobs.training.state.state import Counters
from tests.workers import EXAMPLES, Small, Waiting, Workers

EPOCHS = 600
STEPS = EPOCHS * 5


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Workers]:
    workers = Workers(tmp_path, EPOCHS)
    yield workers
    workers.end()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> float:
    """The loss at the end of a run that nobody disturbs."""
    workers = Workers(tmp_path_factory.mktemp("alone"), EPOCHS)
    workers.start(0)
    workers.train(0)
    [end] = workers.answers(0)
    workers.end()
    assert end.ended and end.step == STEPS
    return end.metrics["eval_loss"]


def test_three_then_one_then_two_then_three_learn_what_one_alone_does(workers: Workers, alone: float, tmp_path: Path) -> None:
    """From every example once an epoch."""
    (tmp_path / "seen").mkdir()
    workers.settings["seen"] = str(tmp_path / "seen")
    workers.start(0, 1, 2)
    first = 0
    for some, told in (((0, 1, 2), 1), ((0,), 0), ((0, 2), 2)):
        workers.train(*some)
        workers.until(told, first + 50)
        workers.stop(told)
        outcomes = workers.answers(*some)
        assert {one.first for one in outcomes} == {first} and len({one.step for one in outcomes}) == 1
        first = outcomes[0].step
        assert 0 < first < STEPS
    workers.end(1)
    workers.start(1)  # it knows nothing, and takes over what the others know
    workers.train(0, 1, 2)
    ends = workers.answers(0, 1, 2)
    assert {one.first for one in ends} == {first} and [one.ended for one in ends] == [True, False, False]
    assert {one.metrics["eval_loss"] for one in ends} == {ends[0].metrics["eval_loss"]}
    seen = Counter(example for file in (tmp_path / "seen").iterdir() for example in file.read_text().split())
    assert seen == {str(example): EPOCHS for example in range(EXAMPLES)}
    assert ends[0].metrics["eval_loss"] == pytest.approx(alone, rel=1e-3)


def test_a_worker_that_is_killed_within_a_step_costs_no_step(workers: Workers, alone: float) -> None:
    workers.start(0, 1, 2)
    workers.train(0, 1, 2)
    workers.until(2, 50)
    workers.kill(2)
    broken = workers.answers(0, 1)
    assert all(one.broken for one in broken) and max(one.step for one in broken) > 0
    workers.train(0, 1)
    ends = workers.answers(0, 1)
    assert ends[0].first == max(one.step for one in broken)
    assert ends[0].metrics["eval_loss"] == pytest.approx(alone, rel=1e-3)


def test_everybody_leaves_and_others_go_on_from_what_was_kept(workers: Workers, alone: float) -> None:
    workers.start(0, 1)
    workers.train(0, 1)
    workers.until(1, 50)
    workers.stop(1)
    stopped = workers.answers(0, 1)
    assert workers.keep(0).step == stopped[0].step
    workers.end(0, 1)
    workers.start(2)
    workers.train(2)
    [end] = workers.answers(2)
    assert end.first == stopped[0].step and end.metrics["eval_loss"] == pytest.approx(alone, rel=1e-3)


def test_who_comes_back_alone_goes_on_from_what_others_did_meanwhile(workers: Workers, alone: float) -> None:
    workers.start(0, 1)
    workers.train(0, 1)
    workers.until(1, 50)
    workers.stop(1)
    left = workers.answers(0, 1)[1].step
    workers.train(0)
    workers.until(0, left + 50)
    workers.stop(0)
    [kept] = workers.answers(0)
    assert workers.keep(0).step == kept.step > left
    workers.end(0)
    workers.train(1)
    [end] = workers.answers(1)
    assert end.first == kept.step and end.metrics["eval_loss"] == pytest.approx(alone, rel=1e-3)


def waits(workers: Workers, worker: int) -> bool:
    """Whether it waits for data at step 20, for longer than any step takes."""
    workers.until(worker, 20)
    time.sleep(0.3)
    return workers.reached(worker)[:2] == (20, False)


def test_workers_wait_for_data_together_and_leave_at_once_when_one_is_told_to(workers: Workers, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for step in range(20):
        (data / str(step)).touch()
    workers.work = Waiting
    workers.settings |= {"epochs": 8, "data": str(data)}
    workers.start(0, 1)
    workers.train(0, 1)
    assert waits(workers, 0) and waits(workers, 1), "nobody takes them for stuck"
    began_s = time.monotonic()
    workers.stop(1)
    assert [one.step for one in workers.answers(0, 1)] == [20, 20]
    assert time.monotonic() - began_s < 1
    workers.train(0, 1)
    assert waits(workers, 0)
    for step in range(20, 40):
        (data / str(step)).touch()
    assert [one.step for one in workers.answers(0, 1)] == [40, 40]


def test_a_worker_that_is_killed_while_all_wait_for_data_costs_no_step(workers: Workers, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for step in range(20):
        (tmp_path / "data" / str(step)).touch()
    workers.work = Waiting
    workers.settings |= {"epochs": 8, "data": str(tmp_path / "data")}
    workers.start(0, 1)
    workers.train(0, 1)
    assert waits(workers, 0)
    workers.kill(1)
    [broken] = workers.answers(0)
    assert broken.broken and broken.step == 20


def test_the_rendezvous_is_gone_before_anybody_leaves(tmp_path: Path) -> None:
    """If its file vanished while a worker leaves, PyTorch would wait for it: for ten minutes, and with the slots."""
    settings = {"epochs": 2, "stage": "small", "checkpoint_s": 3600, "report_s": 3600}
    worker = Worker(Small, settings, (tmp_path / "store").as_uri(), "run")
    work, seen = Small(settings), list[bool]()
    worker.use(work)
    work.flat.optimizer.register_step_post_hook(lambda *_: seen.append(folder.exists()))
    rendezvous = worker.meet(one_machine=True)
    folder = Path(rendezvous.removeprefix("file://")).parent
    assert folder.exists() and worker.reached()[:2] == (-1, False)
    assert worker.train(ProcessGroup(1, 0, 1, rendezvous)).ended and worker.reached()[:2] == (10, False) and worker.trains(1)
    assert seen == [False] * 10


class Broken(Small):
    """Its data has a number that is none in the twentieth step."""

    def gradients(self, batch: list[int], rank: int, world: int) -> tuple[torch.Tensor, int]:
        loss, tokens = super().gradients(batch, rank, world)
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps == 20:
            self.flat.gradient[0] = torch.nan
        return loss, tokens


def test_a_step_that_would_spoil_the_weights_is_not_done(tmp_path: Path) -> None:
    worker = Worker(Broken, {"epochs": 60, "stage": "small", "checkpoint_s": 3600, "report_s": 3600}, tmp_path.as_uri(), "run")
    work = Broken(worker.settings)
    worker.use(work)
    outcome = worker.train(ProcessGroup(1, 0, 1, worker.meet(one_machine=True)))
    assert (outcome.step, outcome.diverged, outcome.ended) == (19, "the gradient is not finite", False)
    assert work.flat.vector.isfinite().all() and not work.flat.exchanged.any()


class Overfitting(Small):
    """Its held-out loss is the least after 20 steps."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.schedule = self.schedule._replace(measure_every_steps=10)
        self.flat.optimizer.register_step_post_hook(lambda *_: setattr(self, "done", self.done + 1))
        self.done = 0

    def measure(self, rank: int, world: int) -> dict[str, float]:
        return {"eval_loss": 1 + abs(self.done - 20) / 10}

    def save(self, target: Path) -> None:
        (target / "weights").write_text(f"of step {self.done}")


def test_the_result_has_the_weights_that_were_the_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    worker = Worker(Overfitting, {"epochs": 10, "stage": "s", "checkpoint_s": 3600, "report_s": 3600}, tmp_path.as_uri(), "run")
    worker.use(Overfitting(worker.settings))
    outcome = worker.train(ProcessGroup(1, 0, 1, worker.meet(one_machine=True)))
    assert outcome.ended and (outcome.metrics["eval_loss"], outcome.metrics["best_step"]) == (1, 20)
    assert (tmp_path / "runs/run/result/weights").read_text() == "of step 20"
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("measured")]
    assert said == [
        "measured step=10 eval_loss=2.0000 best",
        "measured step=20 eval_loss=1.0000 best",
        "measured step=30 eval_loss=2.0000",
        "measured step=40 eval_loss=3.0000",
    ]
    worker.writer.flush()  # the newest snapshot may still be on its way
    kept = Checkpoints(worker.store, "run").newest()
    assert kept is not None and Counters.read(kept.meta).best == (20, {"eval_loss": 1.0})
    assert [one.step for one in worker.reached().measured] == [10, 20, 30, 40]


class Slow(Small):
    """Its optimizer takes a moment between the tensors and the end of the step; remembers what every step began with."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.began = list[torch.Tensor]()
        self.flat.optimizer.register_step_post_hook(lambda *_: time.sleep(0.002))

    def gradients(self, batch: list[int], rank: int, world: int) -> tuple[torch.Tensor, int]:
        self.began.append(self.flat.vector.detach().clone())
        return super().gradients(batch, rank, world)


def test_what_is_kept_while_it_trains_is_the_state_of_one_moment(tmp_path: Path) -> None:
    worker = Worker(Slow, {"epochs": 60, "stage": "small", "checkpoint_s": 3600, "report_s": 3600}, tmp_path.as_uri(), "run")
    work = Slow(worker.settings)
    worker.use(work)
    training = threading.Thread(target=worker.train, args=(ProcessGroup(1, 0, 1, worker.meet(one_machine=True)),))
    training.start()
    seen = dict[int, torch.Tensor]()
    while training.is_alive():
        worker.keep()
        if newest := Checkpoints(worker.store, "run").newest():
            seen[newest.step] = newest.tensors["parameters"]
    training.join()
    assert worker.reached().committed == worker.keep() and worker.keep().step >= max(seen)
    assert len(seen) > 10 and all(torch.equal(weights, work.began[step]) for step, weights in seen.items() if step < 300)


def test_the_newest_checkpoint_is_that_of_whichever_worker_or_spare_wrote_it() -> None:
    def handle(step: int) -> Any:
        return SimpleNamespace(reached=Reached(step, committed=Committed(step, 0.1, 8)))

    crew = Crew(lambda **_: None, 1, gpu=False)
    assert crew.committed == Committed()
    crew.workers, crew.spares = {1: handle(-1), 2: handle(40)}, {3: handle(55)}
    assert crew.committed == Committed(55, 0.1, 8)
