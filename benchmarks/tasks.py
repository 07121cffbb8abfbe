"""A real model on real tasks, end to end: ``python -m benchmarks tasks --data FOLDER``.

The folder has ``gsm8k_train.jsonl`` and ``sst2_train.tsv``. For each task a pool serves SmolLM2-135M-Instruct. The base answers held-out questions
through the gateway; a job trains an adapter and publishes it; then the model's name answers the same questions. The job is started once by
``springtide train --publish``, and once by ``ray job submit``.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.progress import Progress
from rich.table import Table

from benchmarks.place import changes, console, finish, machine, passed, springtide, warn_if_busy
from benchmarks.real import CHAT, real_models
from cluster import client
from cluster import config as configuration
from cluster.config import Config
from cluster.errors import PoolUnavailable
from cluster.pool import local
from cluster.store.registry import registry_of
from cluster.types import Manifest, VersionId
from jobs.data import chat
from jobs.data.chat import Example
from jobs.data.convert import convert

ROOT = Path(__file__).parents[1]
AT_ONCE = 8
"""Questions under way."""
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


class Task(NamedTuple):
    file: str
    labels: tuple[str, ...]
    answer_tokens: int
    right: Callable[[str, str], bool]
    """Whether an answer is right, by the answer in the data."""


def same_number(answer: str, reference: str) -> bool:
    """Whether the last number of both is the same.

    >>> same_number("She has 1,072 left. #### 1,072", "... #### 1072"), same_number("No idea.", "#### 3")
    (True, False)
    """
    last = [found[-1].replace(",", "") if (found := NUMBER.findall(text)) else None for text in (answer, reference)]
    return last[0] is not None and last[0] == last[1]


def same_word(answer: str, reference: str) -> bool:
    """
    >>> same_word(" Positive.", "positive"), same_word("not positive", "positive")
    (True, False)
    """
    return answer.strip().strip(".").lower() == reference.lower()


TASKS = {
    "sst2": Task("sst2_train.tsv", ("negative", "positive"), 4, same_word),
    "gsm8k": Task("gsm8k_train.jsonl", (), 160, same_number),
}
WAYS = ("springtide train", "ray job submit")


class Found(NamedTuple):
    task: str
    way: str
    base: float
    """Accuracy of the base, 0 to 1."""
    trained: float
    """Accuracy of what was published."""
    manifest: Manifest
    minutes: float
    """From the command until the new version answers."""


def tasks(options: argparse.Namespace) -> None:
    """A real model learns GSM8K and SST-2 and is published; accuracy through the gateway, before and after."""
    console.print(machine())
    warn_if_busy()
    found: list[Found] = []
    with real_models() as (config, _), Progress(console=console, transient=True) as bar:
        config = arranged(config)
        line = bar.add_task("", total=len(options.tasks) * len(options.ways))
        with springtide(config, changes()):
            for name in options.tasks:
                train, test = written(TASKS[name], options, config.home)
                questions = chat.read(str(test)).examples
                bar.update(line, description=f"{name}: the base answers")
                base = accuracy(config, f"{CHAT}@1", TASKS[name], questions)
                for way in options.ways:
                    bar.update(line, description=f"{name}: {way}")
                    found.append(learnt(config, name, way, base, (train, test), questions, options.epochs))
                    client.of(config).rollback(CHAT, VersionId(CHAT, 1), "the next one begins with the base")
                    bar.advance(line)
    console.print(table(found))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "rows": [row(one) for one in found]}, indent=1))
    finish(list(verdicts(found)))


def arranged(config: Config) -> Config:
    """The chat model alone, with the rest of the machine's slots for training."""
    values = config.dump()
    values["fleets"] = {CHAT: values["fleets"][CHAT]}
    values["training"] = {**values["training"], "checkpoint_s": 120}
    return configuration.parse(values)


def written(task: Task, options: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """The task's data as chat lines: what is learnt, and what is asked afterwards."""
    source = options.data / task.file
    lines = list(islice(convert(str(source), list(task.labels)), options.examples + options.questions))
    files = folder / f"{source.stem}-train.jsonl", folder / f"{source.stem}-test.jsonl"
    for file, part in zip(files, (lines[options.questions :], lines[: options.questions]), strict=True):
        file.write_text("".join(f"{one}\n" for one in part), "utf-8")
    return files


def accuracy(config: Config, model: str, task: Task, questions: Sequence[Example]) -> float:
    pool = client.of(config)

    def right(example: Example) -> bool:
        body = {"model": model, "messages": example.prompt, "temperature": 0, "max_tokens": task.answer_tokens}
        answer = pool.chat(body).choice["message"]["content"] or ""
        return task.right(answer, example.completion[0]["content"])

    with ThreadPoolExecutor(AT_ONCE) as threads:
        return sum(threads.map(right, questions)) / len(questions)


def learnt(
    config: Config, name: str, way: str, base: float, files: tuple[Path, Path], questions: Sequence[Example], epochs: float
) -> Found:
    """Train and publish, in one of the `WAYS`, and ask again."""
    train, test = files
    options = [f"--data={train}", f"--eval-data={test}", f"--base={CHAT}@1", f"--name={CHAT}", f"--epochs={epochs}", "--publish"]
    began_s = time.monotonic()
    environment = {**os.environ, **local.client_environment(config), "SPRINGTIDE_HOME": str(config.home)}
    line = ["cluster", "train", *options] if way == "springtide train" else ["jobs.finetune", *options]
    command = [sys.executable, "-m", *line]
    if way == "ray job submit":
        runtime = json.dumps({"env_vars": {"SPRINGTIDE_HOME": str(config.home)}})
        command = [str(Path(sys.executable).with_name("ray")), "job", "submit", f"--runtime-env-json={runtime}", "--", *command]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise PoolUnavailable(f"{way} ended with {done.returncode}: {(done.stdout + done.stderr)[-1000:]}")
    minutes = (time.monotonic() - began_s) / 60
    live = client.of(config).history(CHAT).moves[-1].stable
    return Found(name, way, base, accuracy(config, CHAT, TASKS[name], questions), registry_of(config).manifest(live), minutes)


# what was found


def row(found: Found) -> dict[str, Any]:
    metrics = found.manifest.lineage.metrics
    return {
        "task": found.task,
        "way": found.way,
        "examples": metrics["examples"],
        "loss_before": metrics["eval_loss_before"],
        "loss": metrics["eval_loss"],
        "accuracy_before": found.base,
        "accuracy": found.trained,
        "minutes": found.minutes,
    }


def table(found: Sequence[Found]) -> Table:
    shown = Table("Task", "By", "Examples", "Held-out loss", "Accuracy", "Minutes", box=box.MARKDOWN)
    for one in map(row, found):
        loss, right = f"{one['loss_before']:.3f} → {one['loss']:.3f}", f"{one['accuracy_before']:.1%} → {one['accuracy']:.1%}"
        shown.add_row(one["task"], one["way"], f"{one['examples']:.0f}", loss, right, f"{one['minutes']:.1f}")
    return shown


def verdicts(found: Sequence[Found]) -> Iterator[str]:
    for one in map(row, found):
        better = one["loss"] < one["loss_before"]
        yield f"{one['task']} by {one['way']}: the held-out loss falls; {passed(better)}"
