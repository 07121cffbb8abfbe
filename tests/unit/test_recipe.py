"""A recipe's section on sharding: a word or a section, and runs that began before it was a section can be resumed."""

from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ConfigError
from cluster.store.objects import Store
from jobs.training import recipe, runs
from jobs.training.recipe import Recipe, Sharding


@pytest.mark.parametrize(
    ("set_", "sharding", "dumped"),
    [
        ([], Sharding(), "none"),
        (["sharding=none"], Sharding(), "none"),
        (["sharding=whole"], Sharding(), "none"),
        (["sharding.tensor=1"], Sharding(), "none"),
        (["sharding=fsdp"], Sharding(weights="fsdp"), "fsdp"),
        (["sharding.weights=fsdp"], Sharding(weights="fsdp"), "fsdp"),
        (["sharding=auto"], Sharding(weights="auto"), "auto"),
        (["sharding.tensor=2"], Sharding(tensor=2), {"tensor": 2}),
        (["sharding.pipeline=2"], Sharding(pipeline=2), {"pipeline": 2}),
    ],
)
def test_sharding_is_a_word_or_a_section(set_: list[str], sharding: Sharding, dumped: Any) -> None:
    chosen = recipe.load("full", set_)
    assert chosen.sharding == sharding and chosen.model_dump()["sharding"] == dumped
    assert Recipe.model_validate(chosen.model_dump()) == chosen


@pytest.mark.parametrize(
    ("set_", "verb", "words"),
    [
        (["sharding=half"], "finetune", "sharding.weights"),
        (["sharding.tensor=0"], "finetune", "sharding.tensor"),
        (["sharding.tensor=2", "sharding.weights=fsdp"], "finetune", "weights fsdp and tensor 2 do not go together"),
        (["sharding.tensor=2", "sharding.pipeline=2"], "finetune", "tensor 2 and pipeline 2 do not go together"),
        (["sharding=fsdp"], "rl", "springtide rl does not shard its model"),
        (["sharding.tensor=2"], "dpo", "springtide dpo does not shard its model"),
    ],
)
def test_what_sharding_cannot_be_is_refused_in_words(set_: list[str], verb: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        recipe.load("full", set_, verb=verb)


@pytest.mark.parametrize("word", ["none", "fsdp"])
def test_a_run_that_began_when_sharding_was_a_word_can_be_resumed(tmp_path: Path, word: str) -> None:
    store = Store(tmp_path.as_uri())
    before = {**recipe.load("full", []).model_dump(), "sharding": word}
    runs.begin(store, "run", {"recipe": before})
    assert runs.resume(store, "run", {"recipe": recipe.load("full", [f"sharding={word}"]).model_dump()}) == "run"
