"""A sharded run learns what an unsharded one does: real processes and process groups, a real model, no Ray."""

from collections.abc import Callable, Iterator
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
from tests.workers import Workers

EXAMPLES, BATCH, EPOCHS = 20, 4, 6
STEPS = EPOCHS * EXAMPLES // BATCH
LORA = {"rank": 4, "alpha": 8}


def rows() -> list[Row]:
    """Of many lengths, so that the workers have different numbers of portions."""
    made = torch.Generator().manual_seed(0)
    lengths = [3 + 7 * (i % 6) for i in range(EXAMPLES)]
    return [Row(torch.randint(2, 61, (length,), generator=made).tolist(), length // 2) for length in lengths]


class Tuning(SupervisedFineTuning):
    """One thread, because several of these share a machine."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        torch.set_num_threads(1)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A store with a model whose rows three workers do not share evenly, and whose output layer is its embedding."""
    home = tmp_path_factory.mktemp("sharded")
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=61,
        max_position_embeddings=64,
        hidden_size=20,
        intermediate_size=34,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(shape).save_pretrained(home / "small")
    config = parse({"home": str(home), "store": (home / "store").as_uri(), "training": {"threads_per_worker": 1}})
    registry_of(config).register("small", "weights", None, home / "small", Lineage())
    return config


def settings(config: Config, **recipe: Any) -> dict[str, Any]:
    chosen = {"learning_rate": 0.01, "precision": "float32", "global_batch": BATCH, "epochs": EPOCHS, "micro_batch_tokens": 40}
    data = rows()
    return {"config": config.dump(), "recipe": {**chosen, **recipe}, "base": "small@1", "train": data, "held_out": data[:7]}


@pytest.fixture
def crew(config: Config, tmp_path: Path) -> Iterator[Callable[..., Workers]]:
    made: list[Workers] = []

    def start(**recipe: Any) -> Workers:
        folder = tmp_path / f"run-{len(made)}"
        folder.mkdir()
        made.append(Workers(folder, EPOCHS, Tuning, **settings(config, **recipe)))
        return made[-1]

    yield start
    for workers in made:
        workers.end()


def result(workers: Workers) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    [file] = (workers.folder / "store/runs/run/result").glob("*.safetensors")
    return load_file(file)


def alone(workers: Workers) -> dict[str, float]:
    workers.start(0)
    workers.train(0)
    [end] = workers.answers(0)
    assert end.ended and end.step == STEPS, end
    return end.metrics


def changing(workers: Workers) -> dict[str, float]:
    """Three workers, then one, two and three; no step is lost."""
    workers.start(0, 1, 2)
    first = 0
    for some, told in (((0, 1, 2), 1), ((2,), 2), ((1, 2), 1)):
        workers.train(*some)
        workers.until(told, first + 2)
        workers.stop(told)
        outcomes = workers.answers(*some)
        assert {one.first for one in outcomes} == {first}, outcomes
        assert len({one.step for one in outcomes}) == 1 and not any(one.broken for one in outcomes), outcomes
        first = outcomes[0].step
        assert 0 < first < STEPS
    workers.train(1, 0, 2)
    ends = workers.answers(1, 0, 2)
    assert {one.first for one in ends} == {first} and ends[0].ended, ends
    return ends[0].metrics


@pytest.mark.parametrize("recipe", [{}, {"lora": LORA}], ids=["all weights", "adapter"])
def test_three_then_one_then_two_then_three_learn_what_one_unsharded_does(crew: Callable[..., Workers], recipe: Any) -> None:
    whole, sharded = crew(**recipe), crew(**recipe, sharding="fsdp")
    expected, found = alone(whole), changing(sharded)
    for name in ("eval_loss_before", "eval_loss", "train_loss"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3), name
    assert expected["eval_loss"] < 0.99 * expected["eval_loss_before"]
    before, after = result(whole), result(sharded)
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=2e-3) for name in before)
