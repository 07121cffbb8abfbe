"""Direct preference optimisation: trains a base version on pairs of answers, and registers the next version.

``python -m jobs.dpo --data FILE_OR_URL --base support@3 --publish`` teaches a model which of two answers is preferred (Rafailov et al. 2023), and
measures on held-out pairs how often it agrees. It registers the result with its lineage and asks control to make it live. It checks the whole
request before it starts anything in Ray.
"""

from typing import Any

from cluster.config import load
from cluster.jobspec import Dpo, command_line, with_workers
from cluster.store.registry import registry_of
from jobs import main, tuning
from jobs.record import record
from jobs.training.base import PAIRS


def run() -> None:
    options: Dpo = command_line("dpo")
    config = load()
    config = config.model_copy(update={"training": with_workers(config.training, options.workers)})
    with record(config, options) as job:
        registry = registry_of(config)
        plan = tuning.prepare(config, registry, options, options.recipe, PAIRS)
        # The held-out pairs count too: what the base makes of them is kept with the run.
        inputs = {**plan.inputs, "eval_data": plan.eval_sha256}
        tuning.tune(config, registry, plan, options, work, inputs, f"learnt the preferences of {plan.source}", job)


def work() -> Any:
    from jobs.training.objectives.dpo import PreferenceOptimization

    return PreferenceOptimization


if __name__ == "__main__":
    main(run)
