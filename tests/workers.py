"""Workers of a run in processes of their own, without Ray: the real training loop, real process groups, a small model."""

import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from jobs.training.drivers.worker import Reached, Worker
from jobs.training.process_group import ProcessGroup
from jobs.training.progress import Committed
from jobs.training.schedule import Schedule
from jobs.training.step.flat import FlatParameters
from jobs.training.work import Work

EXAMPLES = 60
PRELOADED = (
    "jobs.training.drivers.worker",
    "jobs.training.objectives.finetune",
    "transformers.models.llama.modeling_llama",
    "peft",
)
"""What takes long to import: one process does so, and the workers are its forks."""
PATIENCE_S = 120


class Small:
    """`jobs.training.work.Work`: a line is fitted through points."""

    def __init__(self, settings: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.schedule = Schedule(EXAMPLES, 12, settings["epochs"], 0, 0.05, 0.1)
        self.model = torch.nn.Linear(3, 1)
        self.hopeless, self.ideal_s_per_token = math.inf, 0.0
        self.device, self.slices, self.parallel = torch.device("cpu"), None, None
        self.flat = FlatParameters(list(self.model.parameters()), 0.05, weight_decay=0.01)
        self.points = torch.randn(EXAMPLES, 3)
        self.values = self.points @ torch.tensor([1.0, -2.0, 0.5]) + 0.3
        self.seen = Path(settings["seen"]) / str(os.getpid()) if "seen" in settings else None
        """Where it writes down the examples of every step."""

    def form(self, rank: int, world: int) -> None: ...

    def gradients(self, batch: list[int], rank: int, world: int) -> tuple[torch.Tensor, int]:
        mine = batch[rank::world]
        if self.seen:
            with self.seen.open("a") as file:
                print(*mine, file=file)
        loss = ((self.model(self.points[mine]).squeeze(1) - self.values[mine]) ** 2).sum() / len(batch)
        loss.backward()
        return loss.detach(), len(batch)

    def measure(self, rank: int, world: int) -> dict[str, float]:
        with torch.no_grad():
            return {"eval_loss": ((self.model(self.points).squeeze(1) - self.values) ** 2).mean().item()}

    def save(self, target: Path) -> None:
        torch.save(self.model.state_dict(), target / "model.pt")


class Waiting(Small):
    """`jobs.training.work.Awaits`: the data of a step is there once the folder ``settings["data"]`` has a file with the step's number."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.data = Path(settings["data"])

    def ready(self, rank: int) -> bool:
        return (self.data / str(self.flat.steps)).exists()


def live(pipe: Connection, work: Callable[[dict[str, Any]], Work], settings: dict[str, Any], store: str, part: int) -> None:
    """A process of a worker. It does as it is told, and can be told to stop while it trains."""
    worker = Worker(work, settings, store, "run", part)
    worker.use(work(worker.settings))
    pipe.send("ready")
    writing = threading.Lock()

    def train(group: ProcessGroup) -> None:
        outcome = worker.train(group)
        with writing:
            pipe.send(outcome)

    while True:
        what, *arguments = pipe.recv()
        if what == "train":
            threading.Thread(target=train, args=arguments).start()
        elif what == "stop":
            worker.stop(*arguments)
        else:
            answer = {"keep": worker.keep, "reached": worker.reached}[what]()
            with writing:
                pipe.send(answer)


class Workers:
    """Up to three workers, by number, and what they are told. Each has as many processes as ``parts``, and the first of them answers for it."""

    def __init__(
        self, folder: Path, epochs: float, work: Callable[[dict[str, Any]], Work] = Small, parts: int = 1, **settings: Any
    ) -> None:
        self.folder, self.work, self.parts = folder, work, parts
        self.settings = {"epochs": epochs, "stage": "small", "checkpoint_s": 3600, "report_s": 3600, **settings}
        self.store = (folder / "store").as_uri()
        self.pipes: dict[int, list[Connection]] = {}
        self.processes: dict[int, list[Any]] = {}
        self.group = 0

    def start(self, *workers: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*PRELOADED])
        for worker in workers:
            self.processes[worker], self.pipes[worker] = [], []
            for part in range(self.parts):
                ours, theirs = context.Pipe()
                process = context.Process(target=live, args=(theirs, self.work, self.settings, self.store, part), daemon=True)
                process.start()
                self.processes[worker].append(process)
                self.pipes[worker].append(ours)
        self.answers(*workers)

    def train(self, *workers: int) -> None:
        self.group += 1
        rendezvous = (self.folder / f"rendezvous-{self.group}").as_uri()
        for rank, worker in enumerate(workers):
            for part, pipe in enumerate(self.pipes[worker]):
                pipe.send(("train", ProcessGroup(self.group, rank, len(workers), rendezvous, part, self.parts)))

    def stop(self, worker: int) -> None:
        self._tell(worker, "stop", self.group)

    def until(self, worker: int, step: int) -> None:
        """Wait until this worker, which trains, has done so many steps."""
        while self.reached(worker).step < step:
            time.sleep(0.01)

    def reached(self, worker: int) -> Reached:
        """Where this worker is, which trains."""
        self._tell(worker, "reached")
        reached = self._answer(worker)
        assert isinstance(reached, Reached), f"the process group ended: {reached}"
        return reached

    def answers(self, *workers: int) -> list[Any]:
        return [self._answer(worker) for worker in workers]

    def keep(self, worker: int) -> Committed:
        self._tell(worker, "keep")
        return self._answer(worker)

    def _tell(self, worker: int, *what: Any) -> None:
        for pipe in self.pipes[worker]:
            pipe.send(what)

    def _answer(self, worker: int) -> Any:
        assert all(pipe.poll(PATIENCE_S) for pipe in self.pipes[worker]), f"worker {worker} says nothing"
        first, *_ = [pipe.recv() for pipe in self.pipes[worker]]
        return first

    def kill(self, worker: int, part: int = 0) -> None:
        process = self.processes[worker][part]
        os.kill(process.pid, signal.SIGKILL)
        process.join()

    def end(self, *workers: int) -> None:
        for worker in workers or list(self.processes):
            for process, pipe in zip(self.processes.pop(worker), self.pipes.pop(worker), strict=True):
                process.kill()
                pipe.close()
