"""Preferences on the real pool: from pairs to a live version whose answers have another tone."""

import json
from pathlib import Path

import pytest

from cluster import client
from cluster.publishing.rollout import DIRECT
from cluster.types import VersionId
from jobs.data.chat import read
from tests.cluster.test_publish import ask
from tests.conftest import ROOT, Running

pytestmark = pytest.mark.chaos

HELD_OUT = 12


def test_answers_to_new_questions_take_the_tone_that_pairs_prefer(pool: Running, tmp_path: Path) -> None:
    """The seedling says every fact in a plain voice. The pairs prefer the same words with an exclamation mark behind them."""
    facts = read(str(ROOT / "jobs/seedling/facts.jsonl")).examples
    said = [(one.prompt[0]["content"], one.completion[0]["content"]) for one in facts]
    plain = [(question, answer) for question, answer in said if answer.endswith(".")]
    lines = [json.dumps({"prompt": question, "chosen": f"{answer}!", "rejected": answer}) for question, answer in plain]
    learnt, measured = tmp_path / "pairs.jsonl", tmp_path / "held_out.jsonl"
    learnt.write_text("\n".join(lines[HELD_OUT:]))
    measured.write_text("\n".join(lines[:HELD_OUT]))
    files = ["--data", str(learnt), "--eval-data", str(measured)]
    done = pool.command("dpo", *files, "--base", "seedling@1", "--name", "keen", "--epochs", "10")
    print(done.stdout, done.stderr)
    assert done.returncode == 0 and "Registered keen@1 (adapter): prefers as held-out pairs do: 50% → " in done.stdout
    keen_id, operator = VersionId("keen", 1), client.of(pool.config)
    lineage = pool.registry.manifest(keen_id).lineage
    metrics = lineage.metrics
    assert metrics["preference_accuracy_before"] == 0.5 and metrics["preference_accuracy"] >= 0.9
    assert metrics["reward_margin"] > 1 and metrics["eval_loss"] < metrics["eval_loss_before"] / 2
    operator.publish(keen_id, "seedling", "another tone", DIRECT)
    before, after = ([answered(pool, model, question) for question, _ in plain[:HELD_OUT]] for model in ("seedling@1", "keen@1"))
    # The pool is every test's. An alias of its own would hold the fleet to these weights for ever.
    operator.rollback("seedling", VersionId("seedling", 1), "the test is over")
    keen, kept = sum(text.endswith("!") for text in after), sum(f"{old}!" == new for old, new in zip(before, after, strict=True))
    print(f"{keen} of {HELD_OUT} answers to new questions have the new tone, {kept} of them with the old words; {metrics}")
    assert not any(text.endswith("!") for text in before)
    assert keen >= HELD_OUT * 0.7 and kept >= HELD_OUT / 2
    assert not pool.registry.store.children(f"runs/{lineage.job}")


def answered(pool: Running, model: str, question: str) -> str:
    found = ask(pool, model, messages=[{"role": "user", "content": question}])
    return found.json()["choices"][0]["message"]["content"]
