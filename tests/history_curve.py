"""``python -m tests.history_curve [file] [s3] [LENGTH …]``: what control's rounds and an engine's start ask of the store,
by the length of one alias's history, on a folder and on a bucket. Prints a table in Markdown.

Times are the median of several; a bucket here is an HTTP server on this machine, whose answers take about a millisecond.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from cluster.store.registry import Registry
from cluster.types import VersionId
from tests.stores import KINDS, Counting, lived, opened

LENGTHS = (10, 100, 1000, 10_000, 100_000)


def control_round(registry: Registry) -> None:
    registry.aliases()
    registry.rollout("m")


def control_start(url: str) -> Counting:
    store = Counting(url)
    control_round(Registry(store))
    return store


def engine_start(url: str) -> Counting:
    store = Counting(url)
    registry = Registry(store)
    registry.alias("m")
    registry.resident_adapters(VersionId("m", 1), 16)
    return store


def rollback(url: str) -> Counting:
    store = Counting(url)
    Registry(store).previous("m")
    return store


def median_ms(act: Callable[[], object], times: int) -> float:
    spans: list[float] = []
    for _ in range(times):
        began_s = time.perf_counter()
        act()
        spans.append((time.perf_counter() - began_s) * 1000)
    return statistics.median(spans)


def row(url: str) -> list[str]:
    known = Counting(url)
    registry = Registry(known)
    control_round(registry)
    known.asked.clear()
    control_round(registry)
    cells = [f"{known.total} / {median_ms(lambda: control_round(registry), 20):.1f}"]
    return cells + [
        f"{act(url).total} / {median_ms(partial(act, url), 5):.1f}" for act in (control_start, engine_start, rollback)
    ]


def main(kinds: Sequence[str], lengths: Sequence[int]) -> None:
    print("| store | generations | control round | control start | engine start | rollback |\n|---|---:|---:|---:|---:|---:|")
    for kind in kinds:
        for count in lengths:
            with tempfile.TemporaryDirectory() as folder, opened(kind, Path(folder)) as store:
                lived(store, "m", count)
                print(f"| {kind} | {count:,} | {' | '.join(row(store.url))} |", flush=True)
    print("\nEach cell: calls to the store / median ms.")


if __name__ == "__main__":
    words = sys.argv[1:]
    main([word for word in words if word in KINDS] or KINDS, [int(word) for word in words if word not in KINDS] or LENGTHS)
