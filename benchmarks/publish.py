"""How long a publish takes, and what traffic notices of it: ``python -m benchmarks publish``.

Adapters and weights are published in turn under concurrent streams, on a pool of its own. What is timed is what a user sees: from the
command's HTTP request until the first answer whose header names the new version, and until every replica holds it and every gateway
routes to it (the command's answer). The pause of a weights swap is what the replica itself measured (its log), and the time to first
token is compared with that of the second before each publish, when the same streams had answers from the same kind of version.
"""

import argparse
import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
from rich.progress import track
from rich.table import Table
from safetensors.numpy import load_file, save_file

from benchmarks import load
from benchmarks.load import Sample, percentile
from benchmarks.place import changes, console, finish, machine, passed, springtide, warn_if_busy, workplace
from cluster import client
from cluster.config import Config
from cluster.store.objects import Store
from cluster.store.registry import Registry
from cluster.types import Lineage, Manifest, VersionId

STREAMS = 16
QUIET_S = 10
SETTLE_S = 1.5
"""Between one publish and the next."""
BEFORE_S = 1.0
"""How long before a publish requests are those it is compared with: the one before it has been forgotten by then."""
RANK = 8


@dataclass(frozen=True)
class Published:
    """One publish. Times in seconds."""

    kind: str
    began_s: float
    first_answer_s: float
    all_replicas_s: float
    pause_s: float | None
    """Of a weights swap, as the replica reports it."""

    def over(self, sample: Sample) -> bool:
        """Whether the publish was going on while this request waited for its first token."""
        return sample.start_s < self.began_s + self.all_replicas_s and sample.first_byte_s > self.began_s

    def follows(self, sample: Sample) -> bool:
        """Whether the request had its first token shortly before the publish."""
        return self.began_s - BEFORE_S < sample.start_s and sample.first_byte_s <= self.began_s


def publish(options: argparse.Namespace) -> None:
    """Publish adapters and weights under streams, print tables, write the files that were asked for."""
    console.print(f"{machine()}\n{options.adapters} adapters and {options.weights} sets of weights under {STREAMS} streams")
    warn_if_busy()
    with workplace(options.model) as (place, model), springtide(config := swapping(place, options.swap), changes()):
        registry, name = Registry(Store(config.store)), config.default_model
        url = f"http://{config.gateway.host}:{config.gateway.port}/v1"
        with load.background(url, name, STREAMS) as samples:
            time.sleep(QUIET_S)
            # Weights first: on CPUs an answer by an adapter takes more than twice as long, and a swap waits for answers.
            seeds = track(range(options.weights), "weights ")
            done = [one(config, weights(registry, name, model, seed)) for seed in seeds]
            base = registry.versions(name)[-1].id
            seeds = track(range(options.adapters), "adapters")
            done += [one(config, adapter(registry, base, model, seed)) for seed in seeds]
    found = summarise(samples, done)
    console.print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.png:
        draw(done, samples, options.png)
    finish(verdicts(found))


def swapping(config: Config, how: str) -> Config:
    return config.model_copy(update={"fleet": config.fleet.model_copy(update={"swap": how})})


def one(config: Config, made: Manifest) -> Published:
    """Publish, and watch from outside for the first answer by the new version."""
    first_s: list[float] = []
    watcher = threading.Thread(target=lambda: first_s.append(first_answer_s(config, made.id)))
    began_s = time.monotonic()
    watcher.start()
    client.of(config).publish(made.id, config.default_model, "measured")
    all_s = time.monotonic() - began_s
    watcher.join()
    replicas = client.of(config).status()["replicas"]
    pause_s = max(replica["pause_s"] for replica in replicas) if made.kind == "weights" else None
    time.sleep(SETTLE_S)
    return Published(made.kind, began_s, first_s[0] - began_s, all_s, pause_s)


def first_answer_s(config: Config, id: VersionId) -> float:
    """When the first answer by ``id`` was complete, asking for one token again and again."""
    url = f"http://{config.gateway.host}:{config.gateway.port}/v1/chat/completions"
    body = {"model": config.default_model, "messages": [{"role": "user", "content": "Now?"}], "max_tokens": 1}
    with httpx.Client(timeout=60) as client:
        while client.post(url, json=body).headers.get("x-model-version") != str(id):
            pass
    return time.monotonic()


def adapter(registry: Registry, base: VersionId, model: Path, seed: int) -> Manifest:
    """A LoRA on the attention projections with small random numbers, registered."""
    shape = json.loads((model / "config.json").read_text())
    tensors = load_file(next(model.glob("*.safetensors")))
    random, names = np.random.default_rng(seed), ("q_proj", "v_proj")
    matrices: dict[str, np.ndarray] = {}
    for layer in range(shape["num_hidden_layers"]):
        for name in names:
            outer, inner = tensors[f"model.layers.{layer}.self_attn.{name}.weight"].shape
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            matrices[f"{prefix}.lora_A.weight"] = random.normal(0, 0.05, (RANK, inner)).astype(np.float32)
            matrices[f"{prefix}.lora_B.weight"] = random.normal(0, 0.05, (outer, RANK)).astype(np.float32)
    folder = registry.store.local_root
    assert folder is not None  # noqa: S101 (the workplace's store is a folder)
    folder = folder.parent / f"adapter-{seed}"
    folder.mkdir()
    save_file(matrices, folder / "adapter_model.safetensors")
    lora = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "target_modules": list(names)}
    (folder / "adapter_config.json").write_text(json.dumps({**lora, "lora_dropout": 0.0, "bias": "none"}))
    return registry.register(base.name, "adapter", base, folder, Lineage())


def weights(registry: Registry, name: str, model: Path, seed: int) -> Manifest:
    """The model with a little noise on every matrix, registered as weights of their own."""
    root = registry.store.local_root
    assert root is not None  # noqa: S101 (the workplace's store is a folder)
    folder, random = root.parent / f"weights-{seed}", np.random.default_rng(seed)
    folder.mkdir()
    for path in model.iterdir():
        if path.suffix == ".safetensors":
            noisy = {n: t + random.normal(0, 0.002, t.shape).astype(t.dtype) for n, t in load_file(path).items()}
            save_file(noisy, folder / path.name, metadata={"format": "pt"})
        elif path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    return registry.register(name, "weights", None, folder, Lineage())


# results


def summarise(samples: list[Sample], done: list[Published]) -> dict[str, float | int | None]:
    adapters, swaps = ([p for p in done if p.kind == kind] for kind in ("adapter", "weights"))
    truncated = sum("truncated" in sample.error for sample in samples)
    return {
        "adapter_first_answer_p50_ms": _ms([p.first_answer_s for p in adapters], 50),
        "adapter_first_answer_p99_ms": _ms([p.first_answer_s for p in adapters], 99),
        "adapter_all_replicas_p50_ms": _ms([p.all_replicas_s for p in adapters], 50),
        "adapter_all_replicas_p99_ms": _ms([p.all_replicas_s for p in adapters], 99),
        "weights_first_answer_p50_ms": _ms([p.first_answer_s for p in swaps], 50),
        "weights_all_replicas_p50_ms": _ms([p.all_replicas_s for p in swaps], 50),
        "weights_pause_p50_ms": _ms([p.pause_s or 0 for p in swaps], 50),
        "weights_pause_p99_ms": _ms([p.pause_s or 0 for p in swaps], 99),
        **first_tokens(samples, done, ""),
        **first_tokens(samples, adapters, "_adapters"),
        **first_tokens(samples, swaps, "_weights"),
        "publishes": len(done),
        "requests": len(samples),
        "failed": sum(not sample.ok for sample in samples) - truncated,
        "truncated": truncated,
    }


def first_tokens(samples: list[Sample], publishes: list[Published], suffix: str) -> dict[str, float | None]:
    """The time to first token before these publishes, and during them."""
    before = [s.ttft_s for s in samples if s.ok and any(p.follows(s) for p in publishes)]
    during = [s.ttft_s for s in samples if s.ok and any(p.over(s) for p in publishes)]
    return {f"ttft_p99_before{suffix}_ms": _ms(before, 99), f"ttft_p99_during{suffix}_ms": _ms(during, 99)}


def _ms(values_s: list[float], percent: float) -> float | None:
    found = percentile([value * 1000 for value in values_s], percent)
    return None if found is None else round(found, 1)


def table(found: dict[str, float | int | None]) -> Table:
    shown = Table("measured", "", title=f"{found['publishes']} publishes under {STREAMS} streams", title_justify="left")
    for key, value in found.items():
        words = key.removesuffix("_ms").replace("_", " ")
        shown.add_row(words, "–" if value is None else f"{value:g}{' ms' if key.endswith('_ms') else ''}")
    return shown


def verdicts(found: dict[str, float | int | None]) -> list[str]:
    lost = (found["failed"] or 0) + (found["truncated"] or 0)
    bars = [
        ("an adapter's first answer, p50", found["adapter_first_answer_p50_ms"], 500),
        ("a replica's pause for weights, p99", found["weights_pause_p99_ms"], 1000),
    ]
    lines = [f"{what}: {value:g} ms; {passed(value <= limit)} (≤ {limit} ms)" for what, value, limit in bars if value is not None]
    lines += [waited(found, kind) for kind in ("adapters", "weights") if found[f"ttft_p99_during_{kind}_ms"] is not None]
    return [*lines, f"{lost:g} of {found['requests']} requests failed or truncated; {passed(lost == 0)}"]


def waited(found: dict[str, float | int | None], kind: str) -> str:
    before, during = (found[f"ttft_p99_{when}_{kind}_ms"] or 0 for when in ("before", "during"))
    words = f"time to first token, p99, {kind}: {during:g} ms during, {before:g} ms before"
    return f"{words}: {during / max(before, 1e-9):.2f}×; {passed(during <= 2 * before)} (≤ 2×)"


def draw(done: list[Published], samples: list[Sample], path: Path) -> None:
    """Two panels: how long each publish took, and every request's time to first token while they went on."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (took, traffic) = pyplot.subplots(1, 2, figsize=(13, 4.2), width_ratios=(1, 1.6), layout="constrained")
    for kind, colour in (("adapter", "#0f7c8a"), ("weights", "#cf7f3f")):
        first = sorted(p.first_answer_s * 1000 for p in done if p.kind == kind)
        took.step(first, np.linspace(0, 1, len(first)), color=colour, label=f"{kind} ({len(first)})", where="post")
    took.set_title("Publish to first answer, ms: share of publishes", loc="left")
    took.legend(frameon=False)
    start_s = min(sample.start_s for sample in samples)
    points = [(sample.start_s - start_s, sample.ttft_s * 1000) for sample in samples if sample.ok]
    traffic.scatter(*zip(*points, strict=True), s=2, color="#9aa5b1")
    for p in done:
        traffic.axvline(p.began_s - start_s, color="#0f7c8a" if p.kind == "adapter" else "#cf7f3f", linewidth=0.5)
    traffic.set_yscale("log")
    traffic.set_title("Each request's time to first token, ms, over seconds; lines are publishes", loc="left")
    for axes in (took, traffic):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
