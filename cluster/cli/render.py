"""What people see: tables, bars and words. No decisions here."""

import json
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

from ray.job_submission import JobDetails
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from cluster.client import Answer
from cluster.config import Config
from cluster.pool import submit
from cluster.publishing.gate import Verdict
from cluster.publishing.rollout import Rollout
from cluster.types import Generation, Manifest

IDS = ("job", "run", "replica", "version", "x-model-version", "base", "canary", "from", "owner")
"""Columns whose cells are copied into the next command."""


def serving(console: Console, config: Config) -> None:
    url = f"http://{config.gateway.host}:{config.gateway.port}/v1"
    question = '[{"role": "user", "content": "Who are you?"}]'
    example = f'{{"model": "{config.default_model}", "messages": {question}, "temperature": 0}}'
    console.print(f"\nThe OpenAI API is at [bold]{url}[/]. Try:\n")
    console.print(
        f"  curl {url}/chat/completions -H 'content-type: application/json' -d '{example}'", soft_wrap=True, highlight=False
    )
    console.print(
        '  eval "$(springtide env)"   # then `ray job submit`, `ray status` … work on this pool', highlight=False, soft_wrap=True
    )
    if shutil.which("springtide") is None:
        console.print(f"  . {sys.prefix}/bin/activate   # puts springtide and ray on your path", highlight=False, soft_wrap=True)
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
            if why := submit.waiting(log):
                bar.update(task, words=f"waiting for slots: {why}")
            elif (now := submit.progress(log)) is not None:
                words = " ".join(f"{key} {value}" for key, value in now.fields.items() if key != "stage")
                bar.update(task, description=label, completed=now.step, total=now.steps or None, words=words)
        bar.update(task, description=label)
    return result(log)


def result(log: str) -> dict[str, Any]:
    """The JSON object of a job's last ``result {…}`` line; empty where it printed none."""
    lines = [line.partition("result ")[2] for line in log.splitlines() if line.startswith("result {")]
    return json.loads(lines[-1]) if lines else {}


def answers(console: Console, question: str, given: Sequence[Answer]) -> None:
    table = _table("x-model-version", "answer", title=f"“{question}”")
    for answer in given:
        table.add_row(f"[bold green]{answer.version}[/]", escape(answer.text))
    console.print(table)


def _table(*headers: str, title: str | None = None) -> Table:
    """A table that keeps ids on one line, wherever it is printed."""
    return Table(*(Column(name, no_wrap=name in IDS) for name in headers), title=title, title_justify="left")


def status(console: Console, url: str, document: dict[str, Any]) -> None:
    slots = document["slots"]
    used = f"{slots['total'] - slots['free']:g} of {slots['total']:g} slots in use"
    console.print(f"Pool [bold]{url}[/]; {used}")
    aliases = _table("model", "version", "generation", "since", "reason")
    for name, move in sorted(document["aliases"].items()):
        canary = f" · {move['canary']} {move['percent']} %" if move["canary"] else ""
        aliases.add_row(name, move["stable"] + canary, str(move["generation"]), ago(move["time_s"]), escape(move["reason"]))
    replicas = _table("replica", "base", "holds", "running", "state")
    for r in document["replicas"]:
        state = escape("; ".join(f"refused {id}: {why}" for id, why in r["refused"].items())) or "ready"
        replicas.add_row(r["id"], r["base"], ", ".join(r["held"]), str(r["running"]), state)
    for r in document["starting"]:
        replicas.add_row(r["id"], "", "", "", f"{r['stage']} ({ago(r['since_s'])})")
    if document["asleep"]:
        replicas.add_row(
            "", "", "", "", f"{document['asleep']} engine{'s' * (document['asleep'] > 1)} asleep, for the next replica"
        )
    console.print(aliases, replicas)
    if document["allocation"]["jobs"]:
        console.print(allocation(document["allocation"]))


def allocation(document: dict[str, Any]) -> Table:
    """Who has how many slots, since when, and why: serving, and each job that trains or waits, also one that never had a slot."""
    changes = {change["owner"]: change for change in document["changes"]}
    jobs = {job["id"]: job for job in document["jobs"]}
    table = _table("owner", "slots", "holds", "since", "why")
    for owner in dict.fromkeys([*document["grants"], *jobs]):
        job, change = jobs.get(owner, {}), changes.get(owner, {})
        slots, held = document["grants"].get(owner, 0), str(job.get("held", ""))
        since_s = change.get("at_s") or job.get("since_s")
        why = job.get("reason") or change.get("reason") or ("waits for slots" if job else "")
        table.add_row(owner, str(slots), held, ago(since_s) if since_s else "", escape(why))
    return table


def models(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    table = _table("version", "kind", "base", "live as", "made", "from", "measured")
    for row in rows:
        live, made = ", ".join(row["live_as"]), ago(row["created_s"])
        table.add_row(row["version"], row["kind"], row["base"] or "", live, made, row["job"] or "", _metrics(row["metrics"]))
    console.print(table if rows else "The pool's store holds no versions yet.")


def _metrics(measured: dict[str, float]) -> str:
    kept = ("eval_loss_before", "eval_loss", "exact_match", "train_loss")
    return " ".join(f"{key}={measured[key]:.4g}" for key in kept if key in measured)


def manifest(console: Console, manifest: Manifest, verdicts: Sequence[Verdict]) -> None:
    console.print_json(manifest.model_dump_json())
    console.print(f"digest {manifest.digest}", highlight=False)
    for one in verdicts:
        verdict(console, one)


def verdict(console: Console, one: Verdict) -> None:
    against = f" against {one.against}" if one.against else ""
    table = _table("check", "", "found", title=f"verdict on {one.version}{against}, {clock(one.time_s)}")
    for check in one.checks:
        table.add_row(check.name, "[green]passed[/]" if check.passed else "[red]failed[/]", escape(check.words))
    console.print(table)


def history(console: Console, moves: list[Generation], rollouts: list[list[Rollout]]) -> None:
    table = _table("generation", "version", "canary", "when", "by", "reason", title="moves of the alias")
    for move in moves:
        canary = f"{move.canary} {move.percent} %" if move.canary else ""
        words = (clock(move.time_s), escape(move.author), escape(move.reason))
        table.add_row(str(move.generation), str(move.stable), canary, *words)
    console.print(table)
    steps = _table("rollout", "version", "stage", "when", "reason", title="rollouts")
    for records in rollouts:
        for one in records:
            number = str(one.number) if one.n == 1 else ""
            steps.add_row(number, str(one.version) if number else "", staged(one), clock(one.since_s), escape(one.reason))
    if rollouts:
        console.print(steps)


def clock(time_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_s))


COLOURS = {"live": "green", "rolled_back": "red", "canary": "yellow"}


def staged(one: Rollout) -> str:
    words = f"{one.stage.replace('_', ' ')}{f' {one.percent} %' if one.percent else ''}"
    return f"[{COLOURS[one.stage]}]{words}[/]" if one.stage in COLOURS else words


def rollout(console: Console, one: Rollout) -> None:
    """Where a rollout stands, in a line."""
    console.print(f"[bold]{one.version}[/] on [bold]{one.alias}[/]: {staged(one)}, {escape(one.reason)}")


def progress(one: Rollout, seen: dict[str, Any]) -> Table:
    """A rollout that is watched: canary and stable side by side. ``seen``: as in `cluster.client.Watched`."""
    waiting = seen.get("waiting_for") or "control"
    title = f"{one.version} on {one.alias}: {staged(one)}, waiting for {waiting}"
    table = _table("", "requests", "failed", "first token", "between tokens", "answers end", title=title)
    for side, version in (("canary", one.version), ("stable", one.incumbent)):
        tally = seen.get(side)
        if tally is None:
            table.add_row(f"{side} {version}", *[""] * 5)
            continue
        ends = " ".join(f"{reason} {count}" for reason, count in sorted(tally["finish"].items()))
        times = (f"{tally['ttft_p50_ms'] or '–'} ms", f"{tally['itl_p50_ms'] or '–'} ms")
        table.add_row(f"{side} {version}", str(tally["requests"]), str(tally["errors"]), *times, ends)
    return table


def jobs(console: Console, listed: list[JobDetails], logs: list[str]) -> None:
    """Beneath each job's name is its run's, not beside it: a narrow terminal has no room for both."""
    table = _table("job", "does", "status", "started", "progress", "last words")
    for job, log in zip(listed, logs, strict=True):
        verb = (job.metadata or {}).get("springtide_verb") or job.entrypoint
        table.add_row(
            "\n".join(filter(None, (job.submission_id, submit.run(log)))),
            escape(verb),
            str(job.status.value),
            ago((job.start_time or 0) / 1000),
            escape(_bar(job, log)),
            escape(_words(job, log)),
        )
    console.print(table)


def _bar(job: JobDetails, log: str) -> str:
    now, runs = submit.progress(log), job.status.value == "RUNNING"
    if runs and (why := submit.waiting(log)):
        return f"waiting for slots: {why}"
    if now is None:
        return "starting" if runs else ""
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
