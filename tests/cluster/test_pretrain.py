"""A new model from a text, as a job on the real pool: its tokens by Ray Data, its best weights by the held-out loss, and its answers."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster import client
from cluster.types import Manifest, VersionId
from tests.conftest import ROOT, SHARED, Running
from tests.waiting import when

POEMS = ROOT / "tests/data/tang.txt"
SMALL = ("--depth=2", "--context-tokens=128")


def trained(pool: Running, *arguments: str) -> tuple[Manifest, list[dict[str, Any]]]:
    """`springtide pretrain …`, and the measurements on the way."""
    done = pool.command("pretrain", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    operator = client.of(pool.config)
    job = operator.jobs(1)[0]
    measured = [event.data for event in operator.events(job.id, limit=1000) if event.kind == "measurement"]
    print(done.stdout.splitlines()[-1], *(f"{one['step']:.0f}: {one['bits_per_byte']:.3f}" for one in measured), sep="\n")
    return pool.registry.manifest(VersionId.parse(job.made["version"])), measured


def is_sound(manifest: Manifest, measured: list[dict[str, Any]], falls: float) -> None:
    """The curve falls, and the result has the weights of its lowest point. ``falls``: to which part of where it began."""
    metrics = manifest.lineage.metrics
    best = min(measured, key=lambda one: one["eval_loss"])
    assert metrics["bits_per_byte"] < falls * metrics["bits_per_byte_before"]
    assert metrics["eval_loss"] <= best["eval_loss"] and metrics.get("best_step", best["step"]) == best["step"]
    assert metrics["bits_per_byte"] <= best["bits_per_byte"]
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))
    assert len(measured) >= 19


@pytest.mark.chaos
def test_shakespeare_becomes_a_model_that_answers(pool: Running) -> None:
    text = SHARED / "data/tinyshakespeare.txt"
    if not text.exists():
        pytest.skip(f"{text} is not here")
    manifest, measured = trained(pool, "--data", str(text), "--name=shakespeare", "--steps=250", *SMALL)
    is_sound(manifest, measured, falls=0.75)
    assert manifest.lineage.metrics["bits_per_byte"] < 3
    assert pool.command("fleets", "add", "shakespeare").returncode == 0
    try:
        when(lambda: bool(written(pool, "JULIET:\n")), timeout_s=120)
        answer = written(pool, "ROMEO:\n")
    finally:
        client.of(pool.config).remove_fleet("shakespeare", force=True)
    print(answer)
    assert sum(letter.isalpha() or letter.isspace() for letter in answer) > len(answer) / 2


def written(pool: Running, prompt: str) -> str:
    """How the model goes on; empty while nothing serves it."""
    import httpx

    body = {"model": "shakespeare", "prompt": prompt, "max_tokens": 40, "temperature": 0}
    answer = httpx.post(f"{pool.url}/v1/completions", json=body, timeout=60)
    return answer.json()["choices"][0]["text"] if answer.status_code == 200 else ""


def test_a_chinese_text_in_two_files_becomes_a_model(pool: Running, tmp_path: Path) -> None:
    poems = POEMS.read_text("utf-8").split("\n\n")
    (tmp_path / "poems").mkdir()
    (tmp_path / "poems/a.txt").write_text("\n\n".join(poems[::2]), "utf-8")
    lines = [json.dumps({"text": poem}, ensure_ascii=False) for poem in poems[1::2]]
    (tmp_path / "poems/b.jsonl").write_text("\n".join(lines), "utf-8")
    manifest, measured = trained(
        pool, "--data", str(tmp_path / "poems"), "--name=tang", "--steps=100", "--depth=2", "--context-tokens=64"
    )
    is_sound(manifest, measured, falls=0.95)
    assert manifest.lineage.metrics["best_step"] < 90, "36 poems are soon learnt by heart"
    config = json.loads((pool.registry.fetch(manifest, pool.config.home / "cache") / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"], config["max_position_embeddings"]) == (2, 128, 64)
    names = {file.path for file in manifest.files}
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json"} <= names


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_two_workers_that_share_a_model_take_less_memory_each_and_learn_the_same(pool: Running) -> None:
    """The figure is the most that the process has taken, with the whole model that it has in memory while it loads."""
    memory_mb, losses = {}, {}
    for weights in ("whole", "fsdp"):
        manifest, _ = trained(
            pool, f"--data={POEMS}", f"--name=poems-{weights}", "--steps=4", "--depth=10", "--context-tokens=64", "--workers=2",
            f"--set=sharding={weights}", "--set=precision=float32", "--set=measure_every_steps=2",
        )  # fmt: skip
        at = client.of(pool.config).jobs(1)[0].progress
        assert at is not None and at.workers == 2
        memory_mb[weights], losses[weights] = at.memory_mb, manifest.lineage.metrics["eval_loss"]
        print(f"{weights}: {at.memory_mb:,.0f} MB, {at.tokens_per_s:.0f} tokens/s, loss {losses[weights]:.4f}")
    assert losses["fsdp"] == pytest.approx(losses["whole"], rel=1e-3)
    assert memory_mb["fsdp"] < 0.8 * memory_mb["whole"]


def test_what_is_no_text_is_named_and_leaves_no_run(pool: Running, tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("The tide comes in. " * 100)
    (tmp_path / "worse.txt").write_bytes(b"The tide \xff")
    before = set(pool.registry.store.children("runs"))
    line = [
        sys.executable,
        "-m",
        "jobs.pretrain",
        "--name=none",
        "--tokenizer=seedling",
        "--context-tokens=32",
        f"--data={tmp_path}",
    ]
    home = {**os.environ, "SPRINGTIDE_HOME": str(pool.config.home)}
    done = subprocess.run(line, env=home, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and "worse.txt: byte 10 is not UTF-8 text" in done.stderr, done.stderr
    assert set(pool.registry.store.children("runs")) == before and pool.registry.versions("none") == []
