"""Supervised fine-tuning: trains a base version on a data file, and registers the next version.

``python -m jobs.finetune --data FILE_OR_URL --base seedling --publish`` trains a LoRA adapter (or all the weights with
``--full``) on as many slots as there are (`jobs.training.drivers.driver`), measures the loss on held-out examples before and after, registers the
result with its lineage and asks control to make it live. It checks the whole request before it starts anything in Ray.
"""

from typing import Any

from cluster.config import Config, load
from cluster.jobspec import Finetune, command_line, with_workers
from cluster.store.registry import Registry, registry_of
from jobs import main, tuning
from jobs.record import record
from jobs.training.base import EXAMPLES


def run() -> None:
    options: Finetune = command_line("finetune")
    config = load()
    config = config.model_copy(update={"training": with_workers(config.training, options.workers)})
    with record(config, options) as job:
        registry = registry_of(config)
        plan = prepare(config, registry, options)
        tuning.tune(config, registry, plan, options, work, plan.inputs, f"fine-tuned on {plan.source}", job)


def prepare(config: Config, registry: Registry, options: Finetune) -> tuning.Plan:
    """See `jobs.tuning.prepare`."""
    return tuning.prepare(config, registry, options, "full" if options.full else options.recipe, EXAMPLES)


def work() -> Any:
    from jobs.training.objectives.finetune import SupervisedFineTuning

    return SupervisedFineTuning


if __name__ == "__main__":
    main(run)
