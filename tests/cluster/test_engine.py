"""One real engine from its first owner to its death, in a process of its own and without a pool: see `tests.engine_life`."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT


def run(folder: Path, verb: str) -> tuple[dict[str, dict[str, Any]], int]:
    """What the process said at each step, and its exit status."""
    command = [sys.executable, "-m", "tests.engine_life", str(folder), verb]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"step"')]
    assert said, done.stderr[-4_000:]
    return {one["step"]: one for one in said}, done.returncode


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, dict[str, Any]], int]:
    steps, status = run(tmp_path_factory.mktemp("life"), "live")
    for step in steps.values():
        print(step)
    return steps, status


Life = tuple[dict[str, dict[str, Any]], int]


def test_an_engine_that_nobody_owns_ends_itself(tmp_path: Path) -> None:
    """It used to live on for ever where its replica died between creating it and owning it."""
    began_s = time.monotonic()
    steps, status = run(tmp_path, "alone")
    print(f"ended after {time.monotonic() - began_s:.1f} s, imports included")
    assert list(steps) == ["born"] and status == 0


def test_an_owner_whose_files_cannot_be_read_changes_nothing(life: Life) -> None:
    """It used to stay the owner of an engine that never started."""
    assert life[0]["no such version"] == {"step": "no such version", "error": "ModelNotFound", "state": "NEW", "owner": None}


def test_of_two_owners_one_gets_it_and_it_holds_what_was_live(life: Life) -> None:
    serves = life[0]["serves"]
    assert (serves["owned"], serves["owner"], serves["base"]) == ([True, False], "a", "seedling@1")
    assert serves["held"] == ["seedling@1", "tuned@1"]


def test_the_engine_section_reaches_vllm(life: Life) -> None:
    """False among it, which a command line dropped."""
    options = life[0]["options"]
    assert (options["prefix_caching"], options["policy"], options["draft"]) == (False, "priority", "ngram")
    assert (options["backend"], options["reasoning"], options["logprobs"]) == ("xgrammar", "deepseek_v3", [200, 400])
    assert options["template"], "the chat template is the prompt alone"
    assert (options["tools"], options["forced"], options["called"]) == (200, 200, ["sky"])


def test_prompts_are_scored_beside_others_and_each_by_its_own_adapter(life: Life) -> None:
    """One request with prompt_logprobs, or with echo and logprobs, used to end the engine."""
    assert life[0]["scores"] == {"step": "scores", "alike": True, "differ": True, "echo": 200, "stranger": 403}


def test_the_loop_that_serves_tokens_never_waits_for_the_store(life: Life) -> None:
    """Manifests used to be read in it."""
    store = life[0]["store"]
    assert store["total"] > 5 and (store["in_the_loop"], store["for_requests"]) == (0, 0)


def test_an_engine_that_sleeps_serves_nobody_and_wakes_with_other_weights(life: Life) -> None:
    sleeps, wakes = life[0]["sleeps"], life[0]["wakes"]
    assert (sleeps["asleep"], sleeps["status"], sleeps["body"], sleeps["owner"]) == (True, 503, "", None)
    assert (wakes["owned"], wakes["base"], wakes["held"]) == (True, "seedling@2", ["seedling@2"])


def test_a_swap_that_fails_leaves_the_weights_that_were_there(life: Life) -> None:
    damaged, mismatch, back = (life[0][step] for step in ("damaged", "mismatch", "back"))
    assert damaged["base"] == mismatch["base"] == "seedling@2" and damaged["state"] == mismatch["state"] == "SERVING"
    assert "does not match its manifest" in damaged["refused"]["seedling@3"] and "checksum" in mismatch["refused"]
    assert (back["base"], back["same"], back["held"]) == ("seedling@1", True, ["seedling@1", "tuned@1"])
    assert back["refused"] == ["seedling@3"], "what was said against seedling@1 is over"


def test_when_vllm_dies_the_engine_admits_nobody_tells_control_and_ends(life: Life) -> None:
    """It used to answer every request with an error for half a minute, in words about a missing attribute, while /health said ok."""
    steps, status = life
    dies = steps["dies"]
    assert dies["status"] == 500 and "attribute" not in dies["words"]
    assert dies["told"] == [["leaving", "c"]] and dies["took_s"] < 2
    assert (dies["after"], dies["body"], dies["state"]) == (503, "", "BROKEN")
    assert status == 1 and "still here" not in steps
