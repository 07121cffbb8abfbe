"""A student of two layers learns from the seedling on the real pool."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest

from cluster.pool import submit
from cluster.types import Manifest, VersionId
from tests.conftest import ROOT, Running

FACTS = str(ROOT / "jobs/seedling/facts.jsonl")
pytestmark = pytest.mark.chaos
WRONG = {"role": "assistant", "content": "Nobody knows that."}


class Student(NamedTuple):
    manifest: Manifest
    said: str
    """The command's last words."""

    @property
    def metrics(self) -> dict[str, float]:
        return self.manifest.lineage.metrics


def distilled(pool: Running, data: str, name: str, *more: str) -> Student:
    done = pool.command("distill", "--data", data, "--eval-data", FACTS, "--teacher", "seedling", "--name", name, *more)
    assert done.returncode == 0, done.stdout + done.stderr
    return Student(pool.registry.versions(name)[-1], done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def students(pool: Running) -> dict[str, Student]:
    more = ("--layers", "2", "--epochs", "8")
    alone = ("--set", "distillation.weight=0")
    return {"taught": distilled(pool, FACTS, "taught", *more), "alone": distilled(pool, FACTS, "alone", *more, *alone)}


def test_a_student_learns_from_the_seedling(students: dict[str, Student]) -> None:
    for name, student in students.items():
        found = student.metrics
        print(
            f"{name}: loss {found['eval_loss_before']:.2f} -> {found['eval_loss']:.3f}, divergence {found['teacher_divergence']:.3f}, "
            f"the teacher's loss {found['teacher_loss']:.3f}, {found['tokens'] / found['seconds']:,.0f} tokens/s"
        )
    taught, alone = students["taught"].metrics, students["alone"].metrics
    assert taught["eval_loss"] < taught["eval_loss_before"] / 4
    assert taught["eval_loss_before"] == pytest.approx(alone["eval_loss_before"], rel=1e-4), "both begin with the same student"
    assert taught["teacher_divergence"] < alone["teacher_divergence"]
    assert f"→ {taught['eval_loss']:.3f}, the teacher's {taught['teacher_loss']:.3f}; next: " in students["taught"].said


def test_the_student_is_registered_as_smaller_weights(pool: Running, students: dict[str, Student]) -> None:
    manifest = students["taught"].manifest
    assert (manifest.kind, manifest.base) == ("weights", None)
    assert manifest.lineage.parent == VersionId("seedling", 1)
    assert manifest.lineage.recipe["teacher"] == "seedling@1" and manifest.lineage.recipe["layers"] == 2
    folder = pool.registry.fetch(manifest, pool.config.home / "cache")
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 2
    before = {file.path: file.sha256 for file in pool.registry.manifest(VersionId("seedling", 1)).files}
    after = {file.path: file.sha256 for file in manifest.files}
    assert {path for path in before if before[path] != after.get(path)} <= {"model.safetensors", "config.json"}


def test_a_student_learns_from_the_answers_of_the_live_seedling(pool: Running, students: dict[str, Student]) -> None:
    """It is given the questions with wrong answers, so what it learns is the teacher's."""
    facts = [json.loads(line) for line in Path(FACTS).read_text().splitlines()[:20]]
    wrong = pool.config.home / "wrong.jsonl"
    wrong.write_text("".join(json.dumps({**one, "messages": [*one["messages"][:-1], WRONG]}) + "\n" for one in facts))
    student = distilled(pool, str(wrong), "taught", "--student", "taught@1", "--by", "answers", "--epochs", "2")
    lineage = student.manifest.lineage
    assert (str(student.manifest.id), str(lineage.parent), lineage.recipe["by"]) == ("taught@2", "taught@1", "answers")
    assert student.metrics["eval_loss"] < 0.1 and student.said.startswith("Registered taught@2 (weights): held-out loss ")
    assert "20 answers by seedling@1; 0 prompts left out" in submit.server(pool.config).log(lineage.job or "")
