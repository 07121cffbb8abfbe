"""Preferences on the real pool: from pairs to a live version whose answers have another tone."""

import json
from pathlib import Path

from jobs.data.chat import read
from tests.cluster.test_publish import ask
from tests.conftest import ROOT, Running

HELD_OUT = 12


def test_answers_to_new_questions_take_the_tone_that_pairs_prefer(pool: Running, tmp_path: Path) -> None:
    """The seedling says every fact in a plain voice. The pairs prefer the same words with an exclamation mark."""
    facts = [
        (one.prompt[0]["content"], one.completion[0]["content"]) for one in read(str(ROOT / "jobs/seedling/facts.jsonl")).examples
    ]
    plain = [(question, answer) for question, answer in facts if answer.endswith(".")]
    lines = [json.dumps({"prompt": question, "chosen": answer[:-1] + "!", "rejected": answer}) for question, answer in plain]
    learnt, measured = tmp_path / "pairs.jsonl", tmp_path / "held_out.jsonl"
    learnt.write_text("\n".join(lines[HELD_OUT:]))
    measured.write_text("\n".join(lines[:HELD_OUT]))
    files = ["--data", str(learnt), "--eval-data", str(measured)]
    done = pool.command("dpo", *files, "--base", "seedling@1", "--name", "keen", "--epochs", "10", "--publish")
    print(done.stdout, done.stderr)
    assert done.returncode == 0 and "Registered keen@1 (adapter): prefers as held-out pairs do: 50% → " in done.stdout
    metrics = pool.registry.manifest(pool.registry.resolve("keen").id).lineage.metrics
    assert metrics["preference_accuracy_before"] == 0.5 and metrics["preference_accuracy"] >= 0.9
    assert metrics["reward_margin"] > 1 and metrics["eval_loss"] < metrics["eval_loss_before"] / 2
    before, after = (sum(keen(pool, model, question) for question, _ in plain[:HELD_OUT]) for model in ("seedling@1", "keen"))
    print(f"of {HELD_OUT} answers to new questions, {before} and then {after} end with an exclamation mark; {metrics}")
    assert before == 0 and after >= HELD_OUT * 0.7
    assert not pool.registry.store.children(f"runs/{pool.registry.manifest(pool.registry.resolve('keen').id).lineage.job}")


def keen(pool: Running, model: str, question: str) -> bool:
    answer = ask(pool, model, messages=[{"role": "user", "content": question}]).json()
    return answer["choices"][0]["message"]["content"].endswith("!")
