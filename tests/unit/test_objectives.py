"""Supervised fine-tuning on one worker without Ray: a real model, its gradients, and what a worker does when memory is short."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cluster.config import Config, parse
from cluster.store.registry import registry_of
from cluster.types import Lineage
from jobs.data.rows import Row
from jobs.training.objectives.finetune import SupervisedFineTuning
from jobs.training.step import vocabulary
from tests.conftest import ROOT

ROWS = [Row(list(range(2, 2 + length)), prompt) for length, prompt in ((4, 3), (30, 5), (9, 0), (17, 16), (12, 4), (40, 20))]
WHOLE = list(range(len(ROWS)))


def registered(home: Path, vocabulary: int = 64, window: int = 512, spread: float = 0.02) -> Config:
    """A configuration whose store has a small untrained model, ``small@1``. ``spread``: of its random weights."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=vocabulary,
        max_position_embeddings=window,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=spread,
    )
    LlamaForCausalLM(shape).save_pretrained(home / "small")
    config = parse({"home": str(home), "store": (home / "store").as_uri()})
    registry_of(config).register("small", "weights", None, home / "small", Lineage())
    return config


def work(config: Config, rows: list[Row] = ROWS, **recipe: Any) -> Any:
    settings = {"learning_rate": 0.01, "precision": "float32", **recipe}
    return SupervisedFineTuning({"config": config.dump(), "recipe": settings, "base": "small@1", "train": rows, "held_out": []})


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return registered(tmp_path_factory.mktemp("objectives"))


@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 8}])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_the_gradient_depends_on_neither_the_workers_nor_the_portions(config: Config, lora: Any, world: int) -> None:
    whole, parts = work(config, lora=lora), work(config, lora=lora, micro_batch_tokens=20)
    loss, tokens = whole.gradients(WHOLE, 0, 1)
    shares = [parts.gradients(WHOLE, rank, world) for rank in range(world)]
    assert {share[1] for share in shares} == {tokens} == {sum(len(row.input_ids) for row in ROWS)}
    assert sum(share[0].item() for share in shares) == pytest.approx(loss.item(), rel=1e-5)
    assert torch.allclose(parts.flat.gradient, whole.flat.gradient, rtol=1e-4, atol=1e-6) and whole.flat.gradient.any()


def test_the_loss_is_the_mean_over_all_answer_tokens(config: Config) -> None:
    made = work(config)
    loss, _ = made.gradients([1, 3], 0, 1)
    sums = 0.0
    for row in (ROWS[1], ROWS[3]):
        labels = [-100] * row.prompt_tokens + row.input_ids[row.prompt_tokens :]
        own = made.model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([labels])).loss
        sums += own.item() * (len(row.input_ids) - row.prompt_tokens)
    assert loss.item() == pytest.approx(sums / (25 + 1), rel=1e-5)


@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 8}])
def test_in_bfloat16_what_is_trained_stays_in_float32(config: Config, lora: Any) -> None:
    exact, fast = work(config, lora=lora), work(config, lora=lora, precision="bfloat16")
    assert fast.flat.vector.dtype == torch.float32
    assert fast.gradients(WHOLE, 0, 1)[0].item() == pytest.approx(exact.gradients(WHOLE, 0, 1)[0].item(), rel=0.02)
    assert torch.cosine_similarity(fast.flat.gradient, exact.flat.gradient, dim=0) > 0.99


def test_what_is_saved_is_what_was_trained(config: Config, tmp_path: Path) -> None:
    made = work(config)
    with torch.no_grad():
        made.flat.vector.add_(1)
    made.save(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    for (name, saved), trained in zip(again.named_parameters(), made.model.parameters(), strict=True):
        assert torch.equal(saved, trained), name


SHORT = """
import json, resource, sys
from jobs.training.step import vocabulary
from pathlib import Path
from cluster.config import parse
from jobs.data.rows import Row
from tests.unit.test_objectives import registered, work

vocabulary.CHUNK_NUMBERS = int(sys.argv[2])
config = registered(Path(sys.argv[1]), vocabulary=32768)
rows = [Row([7] * 200, 1)] * 40
made = work(config, rows, micro_batch_tokens=8000)
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + (1500 << 20), -1))
loss, tokens = made.gradients(list(range(40)), 0, 1)
print(json.dumps([made.limit_tokens, loss.item(), tokens]))
"""


def short_of_memory(home: Path, chunk_numbers: int) -> tuple[list[str], list[float]]:
    line = [sys.executable, "-c", SHORT, str(home), str(chunk_numbers)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    *said, last = done.stdout.splitlines()
    return said, json.loads(last)


def test_a_worker_that_is_short_of_memory_takes_fewer_tokens_at_a_time(tmp_path: Path) -> None:
    said, (limit_tokens, loss, tokens) = short_of_memory(tmp_path, 1 << 40)
    assert said and said[-1] == f"out of memory: {limit_tokens} tokens at a time from now on (micro_batch_tokens)"
    assert 200 <= limit_tokens < 8000 and tokens == 8000
    assert loss == pytest.approx(10.4, abs=1), "of all examples, each once"


def test_logits_by_chunks_fit_where_whole_ones_do_not(tmp_path: Path) -> None:
    said, (limit_tokens, loss, _) = short_of_memory(tmp_path, vocabulary.CHUNK_NUMBERS)
    assert not any("out of memory" in line for line in said) and limit_tokens == 8000
    assert loss == pytest.approx(10.4, abs=1)
