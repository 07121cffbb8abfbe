"""A student of two layers learns from the seedling on the real pool."""

import json
from typing import Any

import pytest

from cluster.pool import submit
from cluster.types import Manifest, VersionId
from tests.conftest import ROOT, Running

FACTS = str(ROOT / "jobs/seedling/facts.jsonl")
WRONG = {"role": "assistant", "content": "Nobody knows that."}


def distilled(pool: Running, name: str, *more: str) -> tuple[Manifest, float]:
    """The student, and how many tokens it trained on each second."""
    given: dict[str, Any] = {"data": FACTS, "eval_data": FACTS, "teacher": "seedling", "layers": 2, "epochs": 8}
    *_, last = submit.follow(pool.config, submit.start(pool.config, "distill", **given, name=name, set=list(more)))
    manifest = pool.registry.manifest(VersionId.parse(last["result"]["made"]["version"]))
    metrics = manifest.lineage.metrics
    return manifest, metrics["tokens"] / metrics["seconds"]


@pytest.fixture(scope="module")
def students(pool: Running) -> dict[str, tuple[Manifest, float]]:
    return {"taught": distilled(pool, "taught"), "alone": distilled(pool, "alone", "distillation.weight=0")}


def test_a_student_learns_from_the_seedling(students: dict[str, tuple[Manifest, float]]) -> None:
    for name, (manifest, tokens_per_s) in students.items():
        found = manifest.lineage.metrics
        print(
            f"{name}: loss {found['eval_loss_before']:.2f} -> {found['eval_loss']:.3f}, divergence {found['teacher_divergence']:.3f}, "
            f"the teacher's loss {found['teacher_loss']:.3f}, {tokens_per_s:,.0f} tokens/s"
        )
    taught, alone = (students[name][0].lineage.metrics for name in ("taught", "alone"))
    assert taught["eval_loss"] < taught["eval_loss_before"] / 4
    assert taught["eval_loss_before"] == pytest.approx(alone["eval_loss_before"], rel=1e-4), "both begin with the same student"
    assert taught["teacher_divergence"] < alone["teacher_divergence"]


def test_the_student_is_registered_as_smaller_weights(pool: Running, students: dict[str, tuple[Manifest, float]]) -> None:
    manifest, _ = students["taught"]
    assert (manifest.kind, manifest.base) == ("weights", None)
    assert manifest.lineage.parent == VersionId("seedling", 1)
    assert manifest.lineage.recipe["teacher"] == "seedling@1" and manifest.lineage.recipe["layers"] == 2
    folder = pool.registry.fetch(manifest, pool.config.home / "cache")
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 2
    before = {file.path: file.sha256 for file in pool.registry.manifest(VersionId("seedling", 1)).files}
    after = {file.path: file.sha256 for file in manifest.files}
    assert {path for path in before if before[path] != after.get(path)} <= {"model.safetensors", "config.json"}


def test_a_student_learns_from_the_answers_of_the_live_seedling(
    pool: Running, students: dict[str, tuple[Manifest, float]]
) -> None:
    """It is given the questions with wrong answers, so what it learns is the teacher's."""
    facts = [json.loads(line) for line in (ROOT / "jobs/seedling/facts.jsonl").read_text().splitlines()[:20]]
    wrong = pool.config.home / "wrong.jsonl"
    wrong.write_text("".join(json.dumps({**one, "messages": [*one["messages"][:-1], WRONG]}) + "\n" for one in facts))
    given: dict[str, Any] = {"data": str(wrong), "eval_data": FACTS, "teacher": "seedling", "student": "taught@1", "epochs": 2}
    job = submit.start(pool.config, "distill", **given, by="answers")
    *_, last = submit.follow(pool.config, job)
    manifest = pool.registry.manifest(VersionId.parse(last["result"]["made"]["version"]))
    assert (str(manifest.id), str(manifest.lineage.parent)) == ("taught@2", "taught@1")
    assert manifest.lineage.recipe["by"] == "answers" and manifest.lineage.metrics["eval_loss"] < 0.1
    assert "20 answers by seedling@1; 0 prompts left out" in submit.server(pool.config).log(job)
