"""Jobs that misbehave, through the real driver: ``python -m tests.unwilling stubborn``, ``greedy``."""

import sys
import time
from typing import Any

import torch

from cluster import config as configuration
from cluster.registry import Registry
from cluster.store import Store
from jobs import main, reach
from jobs.tuning import Tuning


class Stubborn(Tuning):
    """Does not end its tenth step while it has company, whatever it is asked."""

    def gradients(self, batch: list[int], rank: int, world: int) -> tuple[torch.Tensor, int]:
        self.steps = getattr(self, "steps", 0) + 1
        while world > 1 and self.steps > 10:
            time.sleep(0.01)
        return super().gradients(batch, rank, world)


class Greedy(Tuning):
    """Asks for more memory than there is."""

    def gradients(self, batch: list[int], rank: int, world: int) -> tuple[torch.Tensor, int]:
        torch.zeros(1 << 46)
        return super().gradients(batch, rank, world)


def run() -> None:
    import argparse

    from jobs import elastic, finetune, loop

    line = ["--data", "jobs/seedling/tide.jsonl", "--base", "seedling@1", "--epochs", "300"]
    sys.argv[1:], kind = line, {"stubborn": Stubborn, "greedy": Greedy}[sys.argv[1]]
    arguments: argparse.Namespace = finetune.parse_arguments()
    config = configuration.load()
    reach(config)
    plan = finetune.prepare(config, Registry(Store(config.store)), arguments)
    loop.connect()
    settings: dict[str, Any] = {"config": config.dump(), "recipe": plan.recipe.model_dump(), "base": str(plan.base.id)}
    settings |= {"train": plan.train, "held_out": plan.held_out}
    name = elastic.begun(Store(config.store), "unwilling", {})
    print("ended", elastic.fit(config, kind, settings, name).metrics)


if __name__ == "__main__":
    main(run)
