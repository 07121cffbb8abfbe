"""Tables, bars and messages for people. It decides nothing."""

import json
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from cluster.capacity.fit import Fit, size_words
from cluster.capacity.kv_cache import Slot
from cluster.cli.fit import Fitted
from cluster.client import Answer, Job
from cluster.config import Config
from cluster.pool import local
from cluster.publishing.gate import Verdict
from cluster.publishing.rollout import Rollout
from cluster.store.jobs import JobEvent, JobStatus
from cluster.types import Generation, Manifest

IDS = ("job", "run", "replica", "version", "x-model-version", "base", "canary", "from", "owner", "fleet", "weights")
"""Columns whose cells people copy into the next command."""


def serving(console: Console, config: Config) -> None:
    url = f"{local.gateway(config)}/v1"
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


def answers(console: Console, question: str, given: Sequence[Answer]) -> None:
    table = _table("x-model-version", "answer", title=f"“{question}”")
    for answer in given:
        table.add_row(f"[bold green]{answer.version}[/]", escape(answer.text))
    console.print(table)


def _table(*headers: str, title: str | None = None) -> Table:
    """A table that never splits an id over two lines."""
    return Table(*(Column(name, no_wrap=name in IDS) for name in headers), title=title, title_justify="left")


def status(console: Console, url: str, document: dict[str, Any]) -> None:
    slots = document["slots"]
    used = f"{slots['total'] - slots['free']:g} of {slots['total']:g} slots in use"
    console.print(f"Pool [bold]{url}[/]; {used}")
    aliases = _table("model", "version", "generation", "since", "reason")
    for name, move in sorted(document["aliases"].items()):
        canary = f" · {move['canary']} {move['percent']} %" if move["canary"] else ""
        aliases.add_row(name, move["stable"] + canary, str(move["generation"]), ago(move["time_s"]), escape(move["reason"]))
    console.print(aliases)
    fleets(console, document["fleets"])
    replicas = _table("replica", "base", "holds", "running", "context", "KV cache", "state")
    for r in document["replicas"]:
        state = escape("; ".join(f"refused {id}: {why}" for id, why in r["refused"].items())) or "ready"
        room = (_tokens(r.get("context_tokens", 0)), _tokens(r.get("kv_cache_tokens", 0)))
        replicas.add_row(r["id"], r["base"], ", ".join(r["held"]), str(r["running"]), *room, state)
    for r in document["starting"]:
        replicas.add_row(r["id"], "", "", "", "", "", f"{r['stage']} ({ago(r['since_s'])})")
    if document["asleep"]:
        replicas.add_row(*[""] * 6, f"{document['asleep']} engine{'s' * (document['asleep'] > 1)} asleep, for the next replica")
    console.print(replicas)
    for one in document.get("damaged", []):
        console.print(f"[red]damaged[/] {one['path']}: {escape(one['why'])}", soft_wrap=True)
    for one in document["troubles"]:
        console.print(f"[red]{one['kind']} {one['name']}[/]: {escape(one['error'])} (tried again in {one['retry_in_s']:.0f} s)")
    if document["allocation"]["jobs"]:
        console.print(allocation(document["allocation"]))


def _tokens(count: int) -> str:
    return f"{count:,} tokens" if count else ""


def allocation(document: dict[str, Any]) -> Table:
    """Who has how many slots, since when, and why. There is a row for serving, and one for each job that trains or waits."""
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
    kept = ("eval_loss_before", "eval_loss", "exact_match", "preference_accuracy", "train_loss")
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
    """Print one line: the stage of a rollout, and why."""
    console.print(f"[bold]{one.version}[/] on [bold]{one.alias}[/]: {staged(one)}, {escape(one.reason)}")


def progress(one: Rollout, seen: dict[str, Any]) -> Table:
    """A rollout under way, with canary and stable side by side. ``seen``: see `cluster.client.Watched`."""
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


def jobs(console: Console, listed: Sequence[Job]) -> None:
    table = _table("job", "does", "status", "started", "progress", "last words")
    for job in listed:
        words = (escape(_bar(job)), escape(_last_words(job)))
        table.add_row(job.id, escape(job.verb), job.status, ago(job.created_s), *words)
    console.print(table if listed else "The pool has run no jobs yet.")


def _bar(job: Job) -> str:
    done = job.progress
    if not done or job.waiting:
        return doing(job)
    filled = round(12 * done.step / done.steps) if done.steps else 0
    return f"{'━' * filled}{'╌' * (12 - filled)} {done.step}/{done.steps} {doing(job)}"


def doing(job: Job) -> str:
    """What a job is doing, in a few words: ``waiting for slots: serving has 3``, or how far it is."""
    done = job.progress
    if job.waiting:
        return f"waiting for {job.waiting}"
    if not done:
        return "" if job.status.ended else "starting"
    loss = [] if done.loss is None else [f"loss {done.loss:.4f}"]
    if job.status.ended:
        return ", ".join(loss)
    workers = f"{done.workers} worker{'' if done.workers == 1 else 's'}"
    use = [f"MFU {done.mfu:.0%}"] if done.mfu else []
    return ", ".join([*loss, f"{done.tokens_per_s:.0f} tokens/s", *use, workers, f"{done.eta_s:.0f} s left"])


def _last_words(job: Job) -> str:
    if job.status is JobStatus.SUCCEEDED:
        return str(job.made.get("version", ""))
    return job.message[:120] if job.status.ended else ""


def events(console: Console, happened: Sequence[JobEvent]) -> None:
    table = _table("when", "what", "")
    for event in happened:
        table.add_row(clock(event.at_s), event.kind, escape(_happened(event)))
    console.print(table if happened else "Nothing is known of what happened to it: it has not begun, or ended long ago.")


def _happened(event: JobEvent) -> str:
    """Its words and its data.

    >>> _happened(JobEvent(at_s=0, kind="progress", data={"step": 3, "steps": 9, "loss": 1.5}))
    'step 3, steps 9, loss 1.5'
    """
    known = [f"{key} {_short(value)}" for key, value in event.data.items() if value not in (None, "", {}, [])]
    return ", ".join([*([event.words] if event.words else []), *known])


def _short(value: Any) -> str:
    """
    >>> _short(1.2345678), _short({"epochs": 3})
    ('1.235', '{"epochs": 3}')
    """
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def fleets(console: Console, listed: Sequence[dict[str, Any]]) -> None:
    table = _table("fleet", "model", "state", "replicas", "slots", "weights", "")
    for one in listed:
        bounds = f"{one['replicas']} of {one.get('min_replicas', '')}–{one.get('max_replicas', '')}"
        weights = ", ".join(one.get("weights", []))
        slots = str(one.get("slots", ""))
        table.add_row(one["name"], one["model"] or "", one["phase"], bounds, slots, weights, escape(one["words"]))
    console.print(table)


def fit(console: Console, name: str, slot: Slot, found: Fit) -> None:
    """What a model needs on one device, and what there is."""
    kept = found.attention
    over = f" over {slot.tensor_parallel_size} devices" if slot.tensor_parallel_size > 1 else ""
    table = _table("", "bytes", "", title=f"{name}, on each device of one slot")
    quantized = f", {slot.quantization}" if slot.quantization else ""
    draft = "" if slot.draft_bytes is None else f", {size_words(slot.draft_bytes)} of the draft model among them"
    table.add_row("weights", size_words(found.weights_bytes), f"dtype {slot.dtype}{quantized}{over}{draft}")
    places = f"{slot.max_loras} places of rank {slot.max_lora_rank}"
    table.add_row(
        "adapters",
        size_words(found.adapters_bytes),
        places if found.takes_adapters else "vLLM has none for this architecture",
    )
    table.add_row("the engine itself", size_words(found.other_bytes), "an allowance for activations, graphs, libraries")
    for layers, count, tokens in (
        (kept.full_layers, found.token_bytes, "each token"),
        (kept.sliding_layers, found.sliding_token_bytes, f"each of the last {kept.window_tokens} tokens"),
    ):
        if layers:
            heads = "a latent vector" if kept.latent else f"keys and values of {kept.kv_heads} heads"
            kind = "" if slot.kv_cache_dtype == "auto" else f", {slot.kv_cache_dtype}"
            table.add_row(
                "KV cache of a token", size_words(count), f"{tokens}: {layers} layers, {heads} of {kept.head_size}{kind}"
            )
    if not kept.unknown:
        words = f"{found.context_tokens} tokens" if kept.layers else "an encoder keeps nothing"
        table.add_row("KV cache of a request", size_words(found.request_bytes), words)
    if found.kv_budget_bytes is not None:
        table.add_row("room for the KV cache", size_words(found.kv_budget_bytes), _kv_source(slot, found))
    if slot.memory_bytes is not None:
        share = f"fleet.gpu_memory_utilization {slot.gpu_memory_utilization:g} of " if slot.kv_cache_bytes is None else ""
        table.add_row(
            "room for everything", size_words(found.engine_bytes or 0), f"{share}{size_words(slot.memory_bytes)} of memory"
        )
    if found.longest_tokens is not None:
        longest = f"{found.longest_tokens} tokens, of {kept.max_tokens} that the model was made for"
        table.add_row("longest context", "", longest)
    console.print(table)


def _kv_source(slot: Slot, found: Fit) -> str:
    if slot.kv_cache_bytes is not None:
        return "fleet.kv_cache_bytes"
    return "what the rest leaves" if found.kv_cache_bytes is None else "chosen: fleet.kv_cache_bytes is not set"


def fits(console: Console, fitted: Sequence[Fitted]) -> None:
    """How the engine of each fleet starts: what its settings say, and what was chosen where they say nothing."""
    table = _table("fleet", "weights", "bytes", "dtype", "context", "KV cache", "at once", "adapters", "needs", "of")
    for fleet, weights, slot, found in fitted:
        held = found.weights_bytes + found.adapters_bytes + found.other_bytes + (found.kv_cache_bytes or 0)
        kv_bytes = found.kv_budget_bytes
        table.add_row(
            fleet,
            str(weights),
            size_words(found.weights_bytes),
            slot.dtype,
            f"{found.context_tokens}{'' if slot.max_model_len else ' (auto)'}",
            "unknown" if kv_bytes is None else f"{size_words(kv_bytes)}{'' if slot.kv_cache_bytes else ' (auto)'}",
            "" if found.requests is None else str(found.requests),
            f"{slot.max_loras} of rank {slot.max_lora_rank}" if found.takes_adapters and slot.max_loras else "none",
            size_words(held),
            "unknown" if slot.memory_bytes is None else size_words(slot.memory_bytes),
        )
    if fitted:
        console.print(table)


def ago(since_s: float) -> str:
    """``75`` seconds ago → ``1 min``."""
    seconds = max(0.0, time.time() - since_s)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
