"""``python -m tests.judging ALIAS``: what `jobs.finetune` does when the rollout of what it has trained waits for a verdict."""

import sys

from cluster.config import load
from cluster.jobspec import Finetune
from cluster.store.objects import Store
from cluster.store.registry import Registry
from jobs import finetune, main
from jobs.data import chat
from jobs.record import record
from jobs.training import recipe


def run(alias: str) -> None:
    config = load()
    registry = Registry(Store(config.store))
    waiting = registry.rollout(alias)
    assert waiting is not None
    examples = chat.read("jobs/seedling/facts.jsonl").examples
    plan = finetune.Plan(registry.manifest(waiting.version), recipe.load("lora", []), [], [], examples, "", "facts.jsonl")
    with record(config, Finetune(data="facts.jsonl")) as job:
        print(finetune.judged(config, registry, plan, waiting, 0, job).stage)


if __name__ == "__main__":
    main(lambda: run(sys.argv[1]))
