"""The evaluation harness of EleutherAI, as its command, on a task of eight capitals."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from checks import CHAT, FOLDER, URL, check, run

TASKS = Path(__file__).parents[1] / "tasks"


def evaluated(model: str, route: str, task: str, *options: str, **arguments: Any) -> dict[str, Any]:
    """What the harness writes of a task: ``{"acc,none": 0.9, …}``."""
    named = {"model": CHAT, "base_url": f"{URL}/v1/{route}", "max_retries": 1, **arguments}
    written = ",".join(f"{key}={value}" for key, value in named.items())
    line = [sys.executable, "-m", "lm_eval", "run", "--model", model, "--model_args", written, "--tasks", task]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [*line, "--include_path", str(TASKS), "--output_path", folder, *options],
            cwd=TASKS,  # the task names its file from here
            env={**os.environ, "HF_HOME": folder, "OPENAI_API_KEY": "unused"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        (found,) = Path(folder).rglob("results_*.json")
        return json.loads(found.read_text())["results"][task]


@check
def log_likelihoods_choose_the_capitals() -> None:
    result = evaluated("local-completions", "completions", "capitals_choice", tokenizer=FOLDER, num_concurrent=2)
    print(result)
    assert result["acc,none"] >= 0.75, result


@check
def log_likelihoods_are_the_same_in_batches() -> None:
    result = evaluated("local-completions", "completions", "capitals_choice", "--batch_size", "4", tokenizer=FOLDER)
    print(result)
    assert result["acc,none"] >= 0.75, result


@check
def completions_are_generated() -> None:
    result = evaluated("local-completions", "completions", "capitals_ending", tokenizer_backend="none")
    print(result)
    assert result["exact_match,named"] >= 0.25, result  # a model of this size knows a few


@check
def chats_are_generated() -> None:
    result = evaluated("local-chat-completions", "chat/completions", "capitals_answer", "--apply_chat_template", num_concurrent=4)
    print(result)
    assert result["exact_match,named"] >= 0.25, result  # a model of this size knows a few


run("lm-eval")
