"""Jobs that misbehave, through the real driver: ``python -m tests.unwilling stubborn``, ``greedy``, ``disturbed``; more of
`jobs.finetune`'s options may follow."""

import errno
import os
import sys
import time
from pathlib import Path
from typing import Any

import obstore
import torch

from cluster import config as configuration
from cluster.jobspec import command_line, new_id
from cluster.store.objects import Store
from cluster.store.registry import Registry
from jobs import main, reach
from jobs.training.objectives.finetune import SupervisedFineTuning
from jobs.training.progress import Committed, Progress


class Stubborn(SupervisedFineTuning):
    """Does not end its tenth step while it has company, whatever it is asked."""

    def gradients(self, batch: list[int], rank: int, world: int) -> tuple[torch.Tensor, int]:
        self.steps = getattr(self, "steps", 0) + 1
        while world > 1 and self.steps > 10:
            time.sleep(0.01)
        return super().gradients(batch, rank, world)


class Greedy(SupervisedFineTuning):
    """Asks for more memory than there is."""

    def gradients(self, batch: list[int], rank: int, world: int) -> tuple[torch.Tensor, int]:
        torch.zeros(1 << 46)
        return super().gradients(batch, rank, world)


STALLED, FULL, STALLING = "stalled", "full", "stalling"
"""Files in the pool's home: what a disturbed job's disk does while they are there, and the process that waits for it."""


class Disturbed(SupervisedFineTuning):
    """Trains well, on a disk that stands still, or that is full, while somebody says so."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.home, self.put = configuration.parse(settings["config"]).home, obstore.put
        obstore.put = self.disturb

    def disturb(self, backend: Any, path: str, data: Any, **how: Any) -> Any:
        """As `obstore.put`. A state's file is half written when it goes wrong, under its own name: no backend is that careless."""
        if isinstance(data, Path) and any((self.home / word).exists() for word in (STALLED, FULL)):
            half = Path(str(backend.prefix)) / path
            half.parent.mkdir(parents=True, exist_ok=True)
            half.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
            self.wait()
        if (self.home / FULL).exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        return self.put(backend, path, data, **how)

    def wait(self) -> None:
        while (self.home / STALLED).exists():
            (self.home / STALLING).write_text(str(os.getpid()))
            time.sleep(0.1)


class Alone:
    """Nobody listens to these runs but their log's reader."""

    def watch(self, progress: Progress) -> None: ...
    def note(self, words: str, waiting: str) -> None: ...
    def checkpoint(self, committed: Committed) -> None: ...
    def measured(self, step: int, metrics: dict[str, float]) -> None: ...


KINDS = {"stubborn": Stubborn, "greedy": Greedy, "disturbed": Disturbed}


def run() -> None:
    from jobs import finetune
    from jobs.training import runs
    from jobs.training.drivers import driver, ray_train

    line = ["--data", "jobs/seedling/tide.jsonl", "--base", "seedling@1", "--epochs", "300"]
    kind, options = KINDS[sys.argv[1]], command_line("finetune", [*line, *sys.argv[2:]])
    config = configuration.load()
    reach(config)
    plan = finetune.prepare(config, Registry(Store(config.store)), options)
    ray_train.connect()
    settings: dict[str, Any] = {"config": config.dump(), "recipe": plan.recipe.model_dump(), "base": str(plan.base.id)}
    settings |= {"train": plan.train, "held_out": plan.held_out}
    of = {
        "base": settings["base"],
        "recipe": settings["recipe"],
        "data": plan.dataset_sha256,
    }  # so that `jobs.finetune` can go on
    name = runs.begin(Store(config.store), new_id("unwilling"), of)
    print("ended", driver.fit(config, kind, settings, name, 0, Alone()).metrics)


if __name__ == "__main__":
    main(run)
