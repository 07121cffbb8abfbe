"""Springtide's own step, `jobs.training.work`, on one worker without Ray."""

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.trainers import Assignment, Clock, Finding, assignment, tell
from jobs.data.rows import Row
from jobs.training.objectives.finetune import SupervisedFineTuning
from jobs.training.objectives.pretrain import Pretraining
from jobs.training.process_group import ProcessGroup, joined
from jobs.training.work import Work, gather, update


def train(job: Assignment) -> Finding:
    recipe = {"lora": job.lora, "learning_rate": job.learning_rate, "epochs": 1, "precision": job.precision}
    recipe |= {"global_batch": len(job.batches[0]), "schedule": "linear", "warmup_fraction": 0}
    work = made({**job.settings, "recipe": recipe}, job)
    clock, at = Clock(job), 0
    with tempfile.TemporaryDirectory() as folder, joined(ProcessGroup(1, 0, 1, (Path(folder) / "meet").as_uri()), cuda=False):
        for step, batch in enumerate(job.batches):
            found = gather(work, list(range(at, at + len(batch))), 0, 1)
            update(work, step, found.norm)
            at += len(batch)
            clock.step(found.loss)
    return clock.finding()


def made(settings: dict[str, Any], job: Assignment) -> Work:
    if "shards" in settings:
        return Pretraining(settings)
    rows = [Row(example["input_ids"], example["prompt_tokens"]) for batch in job.batches for example in batch]
    return SupervisedFineTuning({**settings, "train": rows, "held_out": []})


if __name__ == "__main__":
    tell(train(assignment()))
