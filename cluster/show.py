"""What people see: tables, bars and words. No decisions here."""

import json
import time
from collections.abc import Sequence
from typing import Any, Protocol

from ray.job_submission import JobDetails
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from cluster import submit
from cluster.config import Config
from cluster.pool import Pool
from cluster.registry import Registry
from cluster.types import Generation, Manifest


class Answered(Protocol):
    @property
    def text(self) -> str: ...
    @property
    def version(self) -> str: ...


def serving(console: Console, config: Config) -> None:
    url = f"http://{config.gateway.host}:{config.gateway.port}/v1"
    example = f'{{"model": "{config.fleet.model}", "messages": [{{"role": "user", "content": "Who are you?"}}]}}'
    console.print(f"\nThe OpenAI API is at [bold]{url}[/]. Try:\n")
    console.print(
        f"  curl {url}/chat/completions -H 'content-type: application/json' -d '{example}'", soft_wrap=True, highlight=False
    )
    console.print(
        '  eval "$(springtide env)"   # then `ray job submit`, `ray status` … work on this pool', highlight=False, soft_wrap=True
    )
    console.print("  springtide status · models · jobs · train · publish · rollback · down\n", highlight=False)


def follow(console: Console, config: Config, job: str, label: str) -> dict[str, Any]:
    """Draw a job's progress until it ends; returns what it reported as its result. Raises `JobFailed`."""
    log = ""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[words]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=False) as bar:
        task = bar.add_task(f"{label}: starting", total=None, words="")
        for _, log in submit.watch(config, job):
            if (now := submit.progress(log)) is not None:
                words = " ".join(f"{key} {value}" for key, value in now.fields.items() if key != "stage")
                bar.update(task, description=label, completed=now.step, total=now.steps or None, words=words)
        bar.update(task, description=label)
    return result(log)


def result(log: str) -> dict[str, Any]:
    """The JSON object of a job's last ``result {…}`` line; empty where it printed none."""
    lines = [line.partition("result ")[2] for line in log.splitlines() if line.startswith("result {")]
    return json.loads(lines[-1]) if lines else {}


def answers(console: Console, question: str, given: Sequence[Answered]) -> None:
    table = Table(title=f"“{question}”", title_justify="left")
    table.add_column("x-model-version", style="bold green")
    table.add_column("answer")
    for answer in given:
        table.add_row(answer.version, escape(answer.text))
    console.print(table)


def status(console: Console, running: Pool, document: dict[str, Any]) -> None:
    slots = document["slots"]
    used = f"{slots['total'] - slots['free']:g} of {slots['total']:g} slots in use"
    console.print(f"Pool [bold]{running.dashboard}[/], process {running.pid}, up {ago(running.created_s)}; {used}")
    aliases = Table("model", "version", "generation", "since", "reason")
    for name, move in sorted(document["aliases"].items()):
        aliases.add_row(name, move["stable"], str(move["generation"]), ago(move["time_s"]), escape(move["reason"]))
    replicas = Table("replica", "base", "holds", "running", "state")
    for r in document["replicas"]:
        state = escape("; ".join(f"refused {id}: {why}" for id, why in r["refused"].items())) or "ready"
        replicas.add_row(r["id"], r["base"], ", ".join(r["held"]), str(r["running"]), state)
    console.print(aliases, replicas)


def models(console: Console, registry: Registry, names: list[str]) -> None:
    table = Table("version", "kind", "base", "live as", "made", "from", "measured")
    aliases = registry.aliases()
    for name in names:
        for m in registry.versions(name):
            live = ", ".join(alias for alias, move in aliases.items() if move.stable == m.id)
            table.add_row(str(m.id), m.kind, str(m.base or ""), live, ago(m.created_s), m.lineage.job or "", _metrics(m))
    console.print(table)


def _metrics(manifest: Manifest) -> str:
    kept = ("eval_loss_before", "eval_loss", "exact_match", "train_loss")
    return " ".join(f"{key}={manifest.lineage.metrics[key]:.4g}" for key in kept if key in manifest.lineage.metrics)


def manifest(console: Console, manifest: Manifest) -> None:
    console.print_json(manifest.model_dump_json())
    console.print(f"digest {manifest.digest}", highlight=False)


def history(console: Console, moves: list[Generation]) -> None:
    table = Table("generation", "version", "when", "by", "reason")
    for move in moves:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(move.time_s))
        table.add_row(str(move.generation), str(move.stable), when, escape(move.author), escape(move.reason))
    console.print(table)


def jobs(console: Console, listed: list[JobDetails], logs: list[str]) -> None:
    table = Table("job", "does", "status", "started", "progress", "last words")
    for job, log in zip(listed, logs, strict=True):
        verb = (job.metadata or {}).get("springtide_verb") or job.entrypoint
        table.add_row(
            job.submission_id,
            escape(verb),
            str(job.status.value),
            ago((job.start_time or 0) / 1000),
            _bar(log),
            escape(_words(job, log)),
        )
    console.print(table)


def _bar(log: str) -> str:
    now = submit.progress(log)
    if now is None:
        return ""
    filled = round(12 * now.step / now.steps) if now.steps else 0
    fields = " ".join(f"{key} {value}" for key, value in now.fields.items() if key != "stage")
    return f"{'━' * filled}{'╌' * (12 - filled)} {now.step}/{now.steps} {fields}"


def _words(job: JobDetails, log: str) -> str:
    if job.status.value == "FAILED":
        return submit.last_words(log)[:120]
    return str(result(log).get("version", "")) if job.status.value == "SUCCEEDED" else ""


def ago(since_s: float) -> str:
    """``75`` seconds ago → ``1 min``."""
    seconds = max(0.0, time.time() - since_s)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
