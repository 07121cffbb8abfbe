"""``python -m tests.judging ALIAS``: what a job does when the rollout of what it has trained waits for a verdict."""

import sys

from cluster.config import load
from cluster.jobspec import Finetune
from cluster.store.objects import Store
from cluster.store.registry import Registry
from jobs import main
from jobs.data import chat
from jobs.record import record
from jobs.release import judged


def run(alias: str) -> None:
    config = load()
    registry = Registry(Store(config.store))
    waiting = registry.rollout(alias)
    assert waiting is not None
    examples = chat.read("jobs/seedling/facts.jsonl").examples
    with record(config, Finetune(data="facts.jsonl")) as job:
        print(judged(config, registry, waiting, examples, 0, job).stage)


if __name__ == "__main__":
    main(lambda: run(sys.argv[1]))
