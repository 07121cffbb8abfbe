"""How fast Springtide trains beside TRL and beside a loop written by hand: ``python -m benchmarks training``.

Each trainer runs alone in a process of its own, on the same examples in the same batches and order, with the same base, adapter, learning rates
and threads (`benchmarks/trainers/`). TRL comes with the defaults that it has on a CPU (float32, gradient checkpointing), and tuned: in the precision
that Springtide uses, without gradient checkpointing. Tokens are those of the examples, without padding.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from rich import box
from rich.progress import Progress
from rich.table import Table

from benchmarks.environment import NotInstalled, installed
from benchmarks.place import console, finish, machine, passed, warn_if_busy, workplace
from benchmarks.report import Spread, spread
from benchmarks.trainers import Assignment, Finding
from cluster import config as configuration
from cluster.config import Config
from cluster.store import imports
from cluster.store.registry import registry_of
from jobs.data import chat, rows
from jobs.data.chat import Example

FACTS = Path(__file__).parents[1] / "jobs/seedling/facts.jsonl"
DOCUMENTS = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
TURNS = 1, 2, 3, 5, 8
"""Questions in a conversation of the default data, in turn. So lengths differ as those of real conversations do."""
TIMEOUT_S = 1200
TWICE, AHEAD = 2.0, 1.3
"""The bars: beside TRL's defaults, and beside TRL in the same precision."""
EQUAL = 0.01
"""How much the first step's loss may differ, relative to it: rounding in bfloat16."""


class Case(NamedTuple):
    """A model and how it is trained."""

    model: str | int
    """``seedling``, or what `springtide fit` takes. A number: the depth of a new model, which learns text."""
    lora: dict[str, int] | None
    learning_rate: float
    batch: int
    steps: int
    warm_steps: int = 2


CASES = {
    "lora_135m": Case("smollm2", {"rank": 16, "alpha": 32}, 1e-3, batch=8, steps=10),
    "full_seedling": Case("seedling", None, 5e-4, batch=32, steps=80, warm_steps=10),
    "pretrain": Case(4, None, 1.6e-3, batch=8, steps=60, warm_steps=5),
}


class System(NamedTuple):
    module: str
    tuned: bool = False
    packages: str = ""
    """A lock under ``requirements/bench`` that it needs besides ours."""


SYSTEMS = {
    "springtide": System("springtide"),
    "trl": System("trl_sft", packages="trl"),
    "trl_tuned": System("trl_sft", tuned=True, packages="trl"),
    "plain": System("plain"),
}
LABELS = {"springtide": "Springtide", "trl": "TRL, defaults", "trl_tuned": "TRL, tuned", "plain": "by hand"}
COLOURS = {"springtide": "#0f7c8a", "trl": "#cf7f3f", "trl_tuned": "#e0b265", "plain": "#9aa5b1"}


class Measurement(NamedTuple):
    round: int
    system: str
    case: str
    finding: Finding


def training(options: argparse.Namespace) -> None:
    """Tokens per second, memory and losses of a fine-tuning, beside TRL and beside a loop by hand."""
    console.print(machine())
    warn_if_busy()
    found: list[Measurement] = []
    with workplace(None) as (config, _), Progress(console=console, transient=True) as bar:
        jobs = {case: assignments(config, CASES[case], options) for case in options.cases}
        task = bar.add_task("", total=options.rounds * len(options.cases) * len(options.systems))
        for number in range(options.rounds):
            for case in options.cases:
                for system in turned(options.systems, number):
                    bar.update(task, description=f"round {number + 1}: {case}, {LABELS[system]}")
                    try:
                        found.append(Measurement(number, system, case, run(SYSTEMS[system], jobs[case][system])))
                    except NotInstalled as error:
                        console.print(f"[yellow]{LABELS[system]} is left out: {error}")
                    bar.advance(task)
    summary = summarise(found)
    console.print(table(summary))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "rows": summary}, indent=1))
    draw(found, options.png)
    finish(list(verdicts(found)))


def turned(systems: Sequence[str], by: int) -> list[str]:
    """In each round another one begins: a machine may slow down.

    >>> turned(["a", "b", "c"], 1)
    ['b', 'c', 'a']
    """
    return [*systems[by % len(systems) :], *systems[: by % len(systems)]]


def assignments(config: Config, case: Case, options: argparse.Namespace) -> dict[str, Assignment]:
    """What each system has to do."""
    from transformers import AutoConfig

    from jobs.training.recipe import Recipe
    from jobs.training.step import precision

    threads = {"training": {"threads_per_worker": options.threads}}
    config = configuration.parse(configuration.merge(config.dump(), threads))
    task = learning_text(config, case, options.text) if isinstance(case.model, int) else tuning(config, case, options.data)
    width = AutoConfig.from_pretrained(task.base, local_files_only=True).hidden_size
    fast = precision.resolve(Recipe.model_validate({"lora": case.lora}), False, width).precision
    common: dict[str, Any] = {
        "base": str(task.base),
        "batches": [task.examples[at : at + case.batch] for at in range(0, len(task.examples), case.batch)],
        "lora": case.lora,
        "learning_rate": case.learning_rate,
        "warm_steps": case.warm_steps,
        "threads": options.threads,
    }
    return {
        "springtide": Assignment(**common, precision=fast, settings=task.settings),
        "trl": Assignment(**common, precision="float32"),
        "trl_tuned": Assignment(**common, precision=fast),
        "plain": Assignment(**common, precision="float32"),
    }


class Task(NamedTuple):
    base: Path
    """The model to begin with, in Hugging Face layout."""
    examples: list[dict[str, Any]]
    """In the order of the steps: ``{"input_ids", "prompt_tokens"}``."""
    settings: dict[str, Any]
    """Of the same for Springtide, without the recipe."""


def learning_text(config: Config, case: Case, text: Path | None) -> Task:
    """A new model learns blocks of text."""
    from benchmarks.new_model import new

    made = new(config, int(case.model), case.batch * case.steps, [text] if text else DOCUMENTS)
    return Task(made.folder, made.examples, made.settings)


def tuning(config: Config, case: Case, data: Path | None) -> Task:
    """A base learns answers, over and over where there are too few."""
    from transformers import AutoTokenizer

    registry, model = registry_of(config), str(case.model)
    if registry.alias(model) is None:
        made = imports.add(registry, imports.find(model, lambda words: None), config.home / "imports", lambda words: None)
        registry.move(model, made, "to be measured", "bench", after=0)
    base = registry.manifest(registry.resolve(model).id)
    folder = registry.fetch(base, config.home / "cache")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    known = chat.read(str(data)).examples if data else conversations(chat.read(str(FACTS)).examples)
    found = rows.tokenize(known, tokenizer, 1024).rows
    wanted = [found[at % len(found)]._asdict() for at in range(case.batch * case.steps)]
    return Task(folder, wanted, {"config": config.dump(), "base": str(base.id)})


def conversations(facts: Sequence[Example]) -> list[Example]:
    """The facts in conversations of several questions, of which the last answer is learnt."""
    made: list[Example] = []
    for number in range(len(facts)):
        several = [facts[(number + at) % len(facts)] for at in range(TURNS[number % len(TURNS)])]
        before = [message for fact in several[:-1] for message in (*fact.prompt, *fact.completion)]
        made.append(Example([*before, *several[-1].prompt], several[-1].completion, number + 1))
    return made


def run(system: System, job: Assignment) -> Finding:
    """Train in a process of its own. Raises `NotInstalled`."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "job.json"
        file.write_text(json.dumps(asdict(job)))
        line = [sys.executable, "-m", f"benchmarks.trainers.{system.module}", str(file), *(["tuned"] if system.tuned else [])]
        environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads), "TOKENIZERS_PARALLELISM": "false"}
        if system.packages:
            environment["PYTHONPATH"] = str(installed(system.packages))
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode != 0:
        raise RuntimeError(f"{system.module} failed: {done.stderr[-2000:]}")
    return Finding(**json.loads(done.stdout.splitlines()[-1]))


# what was found


def summarise(found: Sequence[Measurement]) -> list[dict[str, Any]]:
    """One row for each system and case: medians over the rounds."""
    made: list[dict[str, Any]] = []
    for case, system in dict.fromkeys((one.case, one.system) for one in found):
        findings = [one.finding for one in found if (one.case, one.system) == (case, system)]
        speed = spread([one.tokens_per_s for one in findings])
        made.append(
            {
                "system": system,
                "case": case,
                "tokens_per_s": round(speed.median, 1),
                "tokens_per_s_low_high": [round(speed.low, 1), round(speed.high, 1)],
                "peak_memory_mb": round(median(one.peak_memory_mb for one in findings)),
                "loss": round(findings[0].losses[-1], 4),
                "losses": [round(loss, 4) for loss in findings[0].losses],
            }
        )
    return made


def table(summary: Sequence[dict[str, Any]]) -> Table:
    made = Table(box=box.SIMPLE)
    for heading in ("Case", "System", "Tokens/s", "Peak memory MB", "First loss", "Last loss"):
        made.add_column(heading, justify="left" if heading in ("Case", "System") else "right")
    for row in summary:
        low, high = row["tokens_per_s_low_high"]
        speed = f"{row['tokens_per_s']:.0f} ({low:.0f}–{high:.0f})"
        ends = f"{row['losses'][0]:.4f}", f"{row['loss']:.4f}"
        made.add_row(row["case"], LABELS[row["system"]], speed, f"{row['peak_memory_mb']:,}", *ends)
    return made


def ratios(found: Sequence[Measurement], case: str, other: str) -> Spread | None:
    """Springtide's tokens per second over another's in the same round; None where one was not measured."""
    by = {(one.round, one.system): one.finding for one in found if one.case == case}
    pairs = [
        (by[number, "springtide"], by[number, other]) for number, system in by if system == other and (number, "springtide") in by
    ]
    return spread([ours.tokens_per_s / theirs.tokens_per_s for ours, theirs in pairs]) if pairs else None


def verdicts(found: Sequence[Measurement]) -> Iterator[str]:
    for case in dict.fromkeys(one.case for one in found):
        for other, bar in (("trl", TWICE), ("trl_tuned", AHEAD), ("plain", None)):
            if (beside := ratios(found, case, other)) is None:
                continue
            words = f"{case}: Springtide makes {beside.text(2, '×')} the tokens per second of {LABELS[other]}"
            yield words if bar is None else f"{words}; {passed(beside.median >= bar)} (≥ {bar}×)"
        firsts = {one.system: one.finding.losses[0] for one in found if one.case == case}
        alike = max(firsts.values()) - min(firsts.values()) <= EQUAL * min(firsts.values())
        yield f"{case}: the first step's loss is the same for all, within {EQUAL:.0%}; {passed(alike)}"


def draw(found: Sequence[Measurement], png: Path) -> None:
    """Every step's loss, one panel for each case."""
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys(one.case for one in found))
    figure, panels = plt.subplots(1, len(cases), figsize=(5.5 * len(cases), 3.6), squeeze=False)
    for panel, case in zip(panels[0], cases, strict=True):
        for system in dict.fromkeys(one.system for one in found if one.case == case):
            losses = next(one.finding.losses for one in found if (one.case, one.system) == (case, system))
            speed = spread([one.finding.tokens_per_s for one in found if (one.case, one.system) == (case, system)]).median
            panel.plot(range(1, len(losses) + 1), losses, color=COLOURS[system], label=f"{LABELS[system]}, {speed:.0f} tokens/s")
        panel.set(title=case, xlabel="step", ylabel="loss, nats per answer token")
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(png, dpi=150)
