"""What many adapters cost: ``python -m benchmarks adapters``.

The same streams, spread over more and more adapters of one replica. A batch takes ``fleet.max_loras`` of them; beyond that requests for one
adapter wait for those of another to end, and the engine copies matrices from one place to another. Beyond ``fleet.max_cpu_loras`` an
adapter has no place: the longest idle one makes room, so there is nothing to measure there but a 404.
"""

import argparse
import asyncio
import json
from statistics import median
from typing import Any

from rich.progress import track
from rich.table import Table

from benchmarks import load
from benchmarks.load import Sample, percentile
from benchmarks.place import changes, console, finish, machine, passed, springtide, warn_if_busy, workplace
from benchmarks.publish import STREAMS, adapter
from cluster import client
from cluster.config import Config
from cluster.store.objects import Store
from cluster.store.registry import Registry
from cluster.types import VersionId

DURATION_S = 8
ROUNDS = 3


def adapters(options: argparse.Namespace) -> None:
    """Spread the same streams over 1, 2, 4, … adapters, print a table, write the rows that were asked for."""
    console.print(machine())
    warn_if_busy()
    with workplace(options.model) as (place, model), springtide(place, changes()):
        registry = Registry(Store(place.store))
        base = registry.versions(place.default_model)[-1].id
        counts = tuple(n for n in (1, 2, 4, 8, 16, 32) if n <= min(place.fleet.max_cpu_loras, STREAMS))
        made = [adapter(registry, base, model, seed).id for seed in range(max(counts))]
        for id in track(made, "publishing"):
            client.of(place).publish(id, place.default_model, "to be measured")
        turns = [n for _ in range(ROUNDS) for n in counts]
        found = [(n, measure(place, made[:n])) for n in track(turns, "measuring")]
    rows = [row(n, [samples for m, samples in found if m == n]) for n in counts]
    console.print(table(rows, place))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    failed = sum(row["failed"] for row in rows)
    finish([f"{failed} requests failed; {passed(failed == 0)}"])


def measure(config: Config, ids: list[VersionId]) -> list[Sample]:
    """`STREAMS` streams for `DURATION_S`, the same number for each of ``ids``."""
    url = f"http://{config.gateway.host}:{config.gateway.port}/v1"

    async def all_at_once() -> list[list[Sample]]:
        return await asyncio.gather(*(load.run(url, str(id), STREAMS // len(ids), duration_s=DURATION_S) for id in ids))

    return [sample for samples in asyncio.run(all_at_once()) for sample in samples]


def row(adapters: int, rounds: list[list[Sample]]) -> dict[str, Any]:
    """Medians over rounds, and the spread of the rate."""
    rates = sorted(len(samples) / DURATION_S for samples in rounds)
    waits_ms = [sample.ttft_s * 1000 for samples in rounds for sample in samples if sample.ok]
    return {
        "adapters": adapters,
        "requests_per_s": round(median(rates), 1),
        "lowest_per_s": round(rates[0], 1),
        "highest_per_s": round(rates[-1], 1),
        "ttft_p50_ms": round(percentile(waits_ms, 50) or 0, 1),
        "ttft_p99_ms": round(percentile(waits_ms, 99) or 0, 1),
        "failed": sum(not sample.ok for samples in rounds for sample in samples),
    }


def table(rows: list[dict[str, Any]], config: Config) -> Table:
    places = f"{config.fleet.max_loras} adapters in a batch, {config.fleet.max_cpu_loras} resident"
    shown = Table(
        "adapters in use", "requests/s", "of one adapter's", "first token ms", "failed", title=places, title_justify="left"
    )
    for one in rows:
        rate = f"{one['requests_per_s']:g} ({one['lowest_per_s']:g}–{one['highest_per_s']:g})"
        share = f"{one['requests_per_s'] / rows[0]['requests_per_s']:.2f}×"
        shown.add_row(str(one["adapters"]), rate, share, f"{one['ttft_p50_ms']:g} / {one['ttft_p99_ms']:g}", str(one["failed"]))
    return shown
