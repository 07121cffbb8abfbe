"""Workers of several processes learn what workers of one do: real processes and process groups, real models, no Ray."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, LlamaConfig, MixtralConfig, Phi3Config, Qwen3Config

from cluster.config import Config, parse
from cluster.errors import ConfigError
from cluster.store.registry import registry_of
from cluster.types import Lineage
from jobs.training.sharding import pipeline_parallel, tensor_parallel
from tests.unit.test_sharded import EPOCHS, LORA, STEPS, Tuning, alone, result, settings
from tests.workers import Workers

SIZES: dict[str, Any] = {
    "max_position_embeddings": 64,
    "hidden_size": 16,
    "intermediate_size": 34,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS: dict[str, Any] = {
    "tied": LlamaConfig(vocab_size=62, tie_word_embeddings=True, pad_token_id=40, **SIZES),
    "biased": LlamaConfig(vocab_size=62, attention_bias=True, mlp_bias=True, **SIZES),
    "normed": Qwen3Config(vocab_size=61, head_dim=4, **SIZES),
}
"""The output layer is the embedding; layers have biases; heads have norms, and two processes cannot share the vocabulary."""
TENSOR, PIPELINE = {"tensor": 2}, {"pipeline": 2}
WAYS = pytest.mark.parametrize("way", [TENSOR, PIPELINE], ids=["tensor", "pipeline"])
LEARNT = pytest.mark.parametrize("recipe", [{}, {"lora": LORA}], ids=["all weights", "adapter"])
LOSS, WEIGHT = 1e-4, 2e-4
"""How much losses may differ, relative, and weights."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    home = tmp_path_factory.mktemp("parallel")
    config = parse({"home": str(home), "store": (home / "store").as_uri(), "training": {"threads_per_worker": 1}})
    torch.manual_seed(0)
    for name, shape in MODELS.items():
        model: Any = AutoModelForCausalLM.from_config(shape)
        with torch.no_grad():
            for one in model.parameters():  # biases and norms too, which begin as zeros and ones
                one.add_(torch.randn_like(one) * 0.1)
        model.save_pretrained(home / name)
        registry_of(config).register(name, "weights", None, home / name, Lineage())
    return config


@pytest.fixture
def crew(config: Config, tmp_path: Path) -> Iterator[Callable[..., Workers]]:
    made: list[Workers] = []

    def start(way: dict[str, int], base: str = "tied", **recipe: Any) -> Workers:
        folder = tmp_path / f"run-{len(made)}"
        folder.mkdir()
        chosen = settings(config, **recipe, sharding=way) | {"base": f"{base}@1"}
        made.append(Workers(folder, EPOCHS, Tuning, max(way.values(), default=1), **chosen))
        return made[-1]

    yield start
    for workers in made:
        workers.end()


def same(expected: dict[str, float], found: dict[str, float]) -> None:
    for name in ("eval_loss_before", "eval_loss", "train_loss"):
        assert found[name] == pytest.approx(expected[name], rel=LOSS), name
    assert expected["eval_loss"] < 0.99 * expected["eval_loss_before"]


def same_weights(whole: Workers, parts: Workers) -> None:
    before, after = result(whole), result(parts)
    assert before.keys() == after.keys()
    for name, one in before.items():
        assert one.shape == after[name].shape and torch.allclose(one, after[name], atol=WEIGHT), name


@LEARNT
@pytest.mark.parametrize("base", MODELS)
def test_a_worker_of_two_processes_learns_what_one_process_does(crew: Callable[..., Workers], base: str, recipe: Any) -> None:
    whole = crew({}, base, **recipe)
    expected = alone(whole)
    for way in (TENSOR, PIPELINE):
        parts = crew(way, base, **recipe)
        same(expected, alone(parts))
        same_weights(whole, parts)


@LEARNT
def test_three_stages_of_a_layer_each_learn_what_one_process_does(crew: Callable[..., Workers], recipe: Any) -> None:
    whole, stages = crew({}, **recipe), crew({"pipeline": 3}, **recipe)
    same(alone(whole), alone(stages))
    same_weights(whole, stages)


@WAYS
@LEARNT
def test_workers_join_leave_and_die_without_a_lost_step(crew: Callable[..., Workers], way: Any, recipe: Any) -> None:
    whole, parts = crew({}, **recipe), crew(way, **recipe)
    expected = alone(whole)
    parts.start(0, 1, 2)
    parts.train(0, 1)
    parts.until(1, 3)
    parts.stop(1)  # so that one leaves, and one joins
    first = {one.step for one in parts.answers(0, 1)}
    assert len(first) == 1
    parts.train(1, 2)
    parts.until(2, max(first) + 3)
    parts.kill(2, part=1)
    [broken] = parts.answers(1)
    assert broken.broken and {broken.first} == first
    parts.train(1, 0)
    ends = parts.answers(1, 0)
    assert {one.first for one in ends} == {broken.step} and ends[0].ended and not ends[1].ended
    assert ends[0].step == STEPS
    same(expected, ends[0].metrics)
    same_weights(whole, parts)


@WAYS
def test_other_processes_go_on_from_the_newest_checkpoint_of_which_both_parts_are_whole(
    crew: Callable[..., Workers], way: Any
) -> None:
    whole, parts = crew({}), crew(way)
    kept: list[int] = [0]
    parts.start(0, 1)
    for _ in range(3):
        parts.train(0, 1)
        parts.until(1, kept[-1] + 2)
        parts.stop(1)
        kept.append(parts.answers(0, 1)[0].step)
    assert parts.keep(0).step == kept[-1]
    parts.end()
    newest = parts.folder / f"store/runs/run/{kept[-1]:012d}"
    assert {file.name for file in newest.iterdir()} == {
        f"{part}-of-2.{kind}" for part in (0, 1) for kind in ("json", "safetensors")
    }
    damaged = newest / "1-of-2.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\xff")
    parts.start(0)
    parts.train(0)
    [end] = parts.answers(0)
    assert end.first == kept[-2], "one part of the newest is damaged"
    same(alone(whole), end.metrics)
    same_weights(whole, parts)


def test_a_worker_that_leaves_alone_writes_both_parts(crew: Callable[..., Workers]) -> None:
    parts = crew(TENSOR)
    parts.start(0, 1)
    parts.train(0, 1)
    parts.until(1, 2)
    parts.stop(1)
    step = parts.answers(0, 1)[0].step
    parts.keep(0)
    for file in (parts.folder / f"store/runs/run/{step:012d}").iterdir():
        file.unlink()
    assert parts.keep(1).step == step
    assert len([*(parts.folder / f"store/runs/run/{step:012d}").iterdir()]) == 4


@pytest.mark.parametrize(
    ("shape", "parts", "words"),
    [
        (LlamaConfig(**SIZES), 4, "sharding.tensor 4 does not divide the model's 2 num_key_value_heads"),
        (LlamaConfig(**{**SIZES, "intermediate_size": 33}), 2, "does not divide the 33 of model.layers.0.mlp.gate_proj"),
        (MixtralConfig(**SIZES, num_local_experts=2), 2, "which is not supported"),
        (Phi3Config(**SIZES, pad_token_id=0), 2, "which is not supported"),
        (BertConfig(**{**SIZES, "is_decoder": True}), 2, "no plan how to cut the layers of bert"),
    ],
)
def test_what_cannot_be_cut_is_refused_before_anything_starts(shape: Any, parts: int, words: str) -> None:
    tensor_parallel.check(shape, 1)
    with pytest.raises(ConfigError, match=words):
        tensor_parallel.check(shape, parts)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (LlamaConfig(**SIZES), "4 stages are more than the model has layers"),
        (BertConfig(**{**SIZES, "is_decoder": True}), "The layers of bert are not known well enough"),
    ],
)
def test_what_has_no_stages_is_refused_before_anything_starts(shape: Any, words: str) -> None:
    pipeline_parallel.check(shape, 1)
    with pytest.raises(ConfigError, match=words):
        pipeline_parallel.check(shape, 4)
