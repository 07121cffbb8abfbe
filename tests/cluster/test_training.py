"""Real training on the real pool: Ray Train, TRL and peft in submitted jobs, from data to a registered version."""

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cluster.pool import submit
from cluster.types import Manifest, VersionId
from jobs.data.chat import read
from jobs.data.convert import convert
from tests.cluster.test_api import exposed
from tests.conftest import ROOT, SHARED, Running

TIDE = "jobs/seedling/tide.jsonl"


class Trained(NamedTuple):
    manifest: Manifest
    folder: Path
    log: str
    progress: dict[str, Any]


@pytest.fixture(scope="module")
def trained(pool: Running) -> Iterator[dict[str, Trained]]:
    """An adapter and a full set of weights from the same data, trained side by side."""
    common: dict[str, Any] = {"data": TIDE, "base": "seedling@1"}
    adapter = submit.start(pool.config, "finetune", **common, name="lesson-adapter", epochs=15)
    full = submit.start(pool.config, "finetune", **common, name="lesson-full", full=True, epochs=8)
    yield {"adapter": finish(pool, adapter), "full": finish(pool, full)}


def finish(pool: Running, job: str) -> Trained:
    *_, last = submit.follow(pool.config, job)
    made = last["result"]["made"]
    manifest = pool.registry.manifest(VersionId.parse(made["version"]))
    assert manifest.lineage.job == job
    assert made["eval_loss"] == manifest.lineage.metrics["eval_loss"]
    assert made["stage"] is None
    assert last["progress"]["step"] == last["progress"]["steps"] > 0
    folder = pool.registry.fetch(manifest, pool.config.home / "cache")
    return Trained(manifest, folder, submit.server(pool.config).log(job), last["progress"])


def finetune(pool: Running, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """The job as a command, with this pool's store."""
    home = {"SPRINGTIDE_HOME": str(pool.config.home), "PATH": ""}
    line = [sys.executable, "-m", "jobs.finetune", *arguments]
    return subprocess.run(line, env=home, cwd=ROOT, capture_output=True, text=True, timeout=120)


# the seedling


def test_the_seedling_learnt_its_facts(pool: Running) -> None:
    lineage = pool.registry.manifest(VersionId("seedling", 1)).lineage
    facts = read(str(ROOT / "jobs/seedling/facts.jsonl"))
    assert lineage.metrics["exact_match"] >= 0.95
    assert lineage.dataset_sha256 == facts.sha256
    assert lineage.job and lineage.code_revision and lineage.recipe["steps"]


def test_any_text_in_utf_8_can_be_tokenised(pool: Running) -> None:
    from transformers import AutoTokenizer

    manifest = pool.registry.manifest(VersionId("seedling", 1))
    tokenizer = AutoTokenizer.from_pretrained(pool.registry.fetch(manifest, pool.config.home / "cache"))
    text = "Ünïcödé 潮汐 🌊 <<48/2=24>>\n\t#### 72"
    assert tokenizer.decode(tokenizer.encode(text)) == text


# fine-tuning


@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_held_out_loss_falls(trained: dict[str, Trained], kind: str) -> None:
    metrics = trained[kind].manifest.lineage.metrics
    assert metrics["eval_loss"] < metrics["eval_loss_before"] / 2
    assert {"train_loss", "examples", "tokens", "seconds"} <= set(metrics)


@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_lineage_is_complete(trained: dict[str, Trained], kind: str) -> None:
    manifest = trained[kind].manifest
    assert manifest.base == (VersionId("seedling", 1) if kind == "adapter" else None)
    assert manifest.lineage.parent == VersionId("seedling", 1)
    assert manifest.lineage.dataset_sha256 == read(str(ROOT / TIDE)).sha256
    assert manifest.lineage.recipe["learning_rate"] > 0
    assert manifest.lineage.code_revision


@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_progress_reaches_the_log_from_first_step_to_last(trained: dict[str, Trained], kind: str) -> None:
    log, steps = trained[kind].log, trained[kind].progress["steps"]
    assert f"progress stage=finetune step=1/{steps} " in log and f"progress stage=finetune step={steps}/{steps} " in log
    assert f"from step {steps}" not in log, "nobody begins once more what is done"


def test_an_adapter_is_two_files_that_name_no_path_of_this_machine(trained: dict[str, Trained]) -> None:
    folder = trained["adapter"].folder
    assert {file.path for file in trained["adapter"].manifest.files} == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "seedling@1"
    assert not {"lm_head", "embed_tokens"} & set(config["target_modules"])


def test_full_weights_have_the_bases_shape_and_tokenizer(pool: Running, trained: dict[str, Trained]) -> None:
    base = pool.registry.manifest(VersionId("seedling", 1))
    before = {file.path: file for file in base.files}
    after = {file.path: file for file in trained["full"].manifest.files}
    assert before.keys() == after.keys()
    assert {path for path in before if before[path].sha256 != after[path].sha256} <= {"model.safetensors", "config.json"}
    assert before["model.safetensors"].size_bytes == after["model.safetensors"].size_bytes


def test_a_run_opens_no_port_to_others_and_leaves_nothing_when_it_is_cancelled(pool: Running) -> None:
    others = set(pool.registry.store.children("runs"))
    job = submit.start(pool.config, "finetune", data=TIDE, base="seedling@1", name="cancelled", epochs=500)
    for now in submit.follow(pool.config, job):
        if now["progress"]:
            break
    assert exposed(pool) == []
    assert pool.command("cancel", job).returncode == 0
    assert set(pool.registry.store.children("runs")) == others and pool.registry.versions("cancelled") == []


def test_the_runs_own_files_are_gone(pool: Running, trained: dict[str, Trained]) -> None:
    runs = pool.registry.store.local_root
    assert runs and not [path for path in (runs / "runs").rglob("*") if path.is_file()]


# real data, which a user's machine may not have


@pytest.mark.chaos
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("source", "shape", "examples"), [("gsm8k_train.jsonl", "gsm8k", 2000), ("sst2_train.tsv", "sst2", 6920)]
)
def test_real_data_is_learnt(pool: Running, tmp_path: Path, source: str, shape: str, examples: int) -> None:
    file = SHARED / "data" / source
    if not file.exists():
        pytest.skip(f"{file} is not here")
    chat = tmp_path / f"{shape}.jsonl"
    lines = islice(convert(str(file), ["negative", "positive"]), examples)
    chat.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    job = submit.start(pool.config, "finetune", data=str(chat), base="seedling@1", name=shape, epochs=1)
    metrics = finish(pool, job).manifest.lineage.metrics
    print(f"{shape}: held-out loss {metrics['eval_loss_before']:.2f} -> {metrics['eval_loss']:.2f} in {metrics['seconds']:.0f} s")
    assert metrics["examples"] > examples * 0.8
    assert metrics["eval_loss"] < metrics["eval_loss_before"] / 1.5


# bad requests: one line, status 2, before any training


def refused(pool: Running, *arguments: str) -> str:
    done = finetune(pool, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    return done.stderr


def test_malformed_data(pool: Running, tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text('{"prompt": "x", "completion": "y"}\n{"prompt": "x"}\n')
    assert f"{file}, line 2: the keys are 'prompt'" in refused(pool, "--data", str(file))


def test_missing_data(pool: Running) -> None:
    assert "/no/such.jsonl cannot be read" in refused(pool, "--data", "/no/such.jsonl")


def test_unknown_base(pool: Running) -> None:
    assert "There is no model 'oak'" in refused(pool, "--data", TIDE, "--base", "oak")
    assert "seedling@99 does not exist" in refused(pool, "--data", TIDE, "--base", "seedling@99")


def test_bad_recipes(pool: Running) -> None:
    assert "sparkle" in refused(pool, "--data", TIDE, "--set", "sparkle=1")
    assert "epochs" in refused(pool, "--data", TIDE, "--epochs", "0")
    assert "lora, full" in refused(pool, "--data", TIDE, "--recipe", "magic").replace("full, lora", "lora, full")


def test_rank_above_the_engines(pool: Running) -> None:
    assert "above max_lora_rank 16 of the fleet seedling" in refused(pool, "--data", TIDE, "--set", "lora.rank=32")


def test_nothing_fits(pool: Running) -> None:
    assert "None of the 33 examples fits" in refused(pool, "--data", TIDE, "--base", "seedling@1", "--set", "max_tokens=8")
