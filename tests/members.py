"""Members of a run in processes of their own, without Ray: the real training loop, real process groups, a model that is small."""

import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from jobs.training.schedule import Schedule, share_out
from jobs.training.worker import ProcessGroup, Worker

EXAMPLES = 60


class Small:
    """`jobs.training.worker.Work`: a line is fitted through points."""

    def __init__(self, settings: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.schedule = Schedule(EXAMPLES, 12, settings["epochs"], 0, 0.05, 0.1)
        self.model = torch.nn.Linear(3, 1)
        self.trained = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.trained, 0.05)
        self.points = torch.randn(EXAMPLES, 3)
        self.values = self.points @ torch.tensor([1.0, -2.0, 0.5]) + 0.3
        self.seen = Path(settings["seen"]) / str(os.getpid()) if "seen" in settings else None
        """Where it writes down the examples of every step."""

    def gradients(self, batch: list[int], rank: int, world: int) -> tuple[torch.Tensor, int]:
        mine = [example for portion in share_out(batch, rank, world, 4) for example in portion]
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


def live(pipe: Connection, settings: dict[str, Any], store: str) -> None:
    """A member's process: does as it is told, and can be told to stop while it learns."""
    member = Worker(Small, settings, store, "run")
    member.work = Small(settings)
    pipe.send("ready")

    def learn(formation: ProcessGroup) -> None:
        pipe.send(member.learn(formation))

    while True:
        what, *arguments = pipe.recv()
        if what == "learn":
            threading.Thread(target=learn, args=arguments).start()
        elif what == "settle":
            pipe.send(member.keep())
        else:
            member.stop(*arguments)


class Group:
    """Up to three members and what they are told."""

    def __init__(self, folder: Path, epochs: float, **settings: Any) -> None:
        self.folder = folder
        self.settings = {"epochs": epochs, "stage": "small", "checkpoint_s": 3600, "report_s": 3600, **settings}
        self.store = (folder / "store").as_uri()
        self.pipes: dict[int, Connection] = {}
        self.processes: dict[int, Any] = {}
        self.formation = 0

    def come(self, *members: int) -> None:
        context = multiprocessing.get_context("spawn")
        for member in members:
            ours, theirs = context.Pipe()
            self.processes[member] = context.Process(target=live, args=(theirs, self.settings, self.store), daemon=True)
            self.processes[member].start()
            self.pipes[member] = ours
        self.hear(*members)

    def learn(self, *members: int) -> None:
        self.formation += 1
        meeting = (self.folder / f"meeting-{self.formation}").as_uri()
        for rank, member in enumerate(members):
            self.pipes[member].send(("learn", ProcessGroup(self.formation, rank, len(members), meeting)))

    def stop(self, member: int) -> None:
        self.pipes[member].send(("stop", self.formation))

    def hear(self, *members: int) -> list[Any]:
        return [self._hear(member) for member in members]

    def settle(self, member: int) -> int:
        self.pipes[member].send(("settle",))
        return self._hear(member)

    def _hear(self, member: int) -> Any:
        assert self.pipes[member].poll(60), f"member {member} says nothing"
        return self.pipes[member].recv()

    def kill(self, member: int) -> None:
        os.kill(self.processes[member].pid, signal.SIGKILL)
        self.processes[member].join()

    def leave(self, *members: int) -> None:
        for member in members or list(self.processes):
            self.processes.pop(member).kill()
            self.pipes.pop(member).close()
