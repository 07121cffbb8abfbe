"""What a pretraining run decides before it begins: the tokenizer, the shape, the blocks, the rate. `tests.cluster.test_pretrain` runs it."""

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import Config, parse
from cluster.errors import ConfigError, DataError
from cluster.jobspec import Pretrain
from cluster.store.objects import Store
from jobs.data.tokenizer import grow_tokenizer
from jobs.pretrain import HELD_OUT_TOKENS, divided, for_text, peak_rate
from jobs.sources import local
from jobs.training import corpus, recipe
from jobs.training.corpus import Tokens, sampled
from jobs.training.shape import Shape, shaped

TEXT = "潮水涨落，永不停息。The tide comes in, the tide goes out.\n" * 40
RECIPE = recipe.load("pretrain", [])


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return grow_tokenizer([TEXT], 320, 64)


def asked(**options: Any) -> Pretrain:
    return Pretrain(data=["x.txt"], name="x", **options)


# the text


def test_a_sample_takes_the_whole_of_a_small_text_and_something_of_each_file_of_a_large_one(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 3_000)
    files = [str(path) for path in sorted(tmp_path.iterdir())]
    assert sorted(sampled(files, local, 1 << 20)) == [name * 3_000 for name in "abc"]
    assert sum(map(len, sampled(files, local, 5_000))) == 5_000
    (tmp_path / "large.txt").write_text("d" * 400_000)
    assert sum(map(len, sampled([str(tmp_path / "large.txt")], local, 300_000))) == 300_000


def test_what_was_written_is_found_again(tmp_path: Path, tokenizer: Any) -> None:
    store = Store(tmp_path.as_uri())
    parts = [Tokens(np.arange(n, dtype=np.uint32), 2 * n, hashlib.sha256(bytes(n)).digest()) for n in (5, 40)]
    assert corpus.stored(store, "r") is None
    shape = shaped(asked(depth=1), tokenizer, 64, local)
    made = corpus.write(store, "r", shape.config, tokenizer, iter(parts))
    assert (made.tokens, made.text_bytes, made.bytes_per_token) == (45, 90, 2)
    assert corpus.stored(store, "r") == made
    assert Shape.stored(store, "r").parameters == shape.parameters and Shape.stored(store, "r").context_tokens == 64
    other = corpus.write(store, "s", shape.config, tokenizer, iter(parts[::-1]))
    assert other.sha256 != made.sha256
    with pytest.raises(DataError, match="no text"):
        corpus.write(store, "t", shape.config, tokenizer, iter(()))
    assert corpus.stored(store, "t") is None


@given(st.integers(2, 3000), st.sampled_from([16, 128, 512]), st.integers(0, 3))
def test_every_block_is_learnt_or_measured(count: int, length: int, seed: int) -> None:
    parts = divided(count, length, RECIPE.model_copy(update={"seed": seed}))
    assert sorted(itertools.chain(*parts)) == list(range(count))
    assert parts.train and 0 < len(parts.held_out) * length <= max(length, HELD_OUT_TOKENS)


def test_too_short_a_text_is_refused() -> None:
    with pytest.raises(DataError, match="shorter than two blocks of 64 tokens"):
        divided(1, 64, RECIPE)


# the run


def test_steps_and_measurements_follow_from_the_text_unless_they_are_given() -> None:
    config: Config = parse({})
    once = for_text(RECIPE, 128, 800, None, config)
    assert (once.epochs, once.measure_every_steps, once.learning_rate) == (1, 5, peak_rate(128))
    assert recipe.schedule(for_text(RECIPE, 128, 803, 250, config), 803).steps == 250
    given = RECIPE.model_copy(update={"measure_every_steps": 7, "learning_rate": 0.5})
    assert for_text(given, 128, 800, None, config).model_dump(include={"measure_every_steps", "learning_rate"}) == {
        "measure_every_steps": 7,
        "learning_rate": 0.5,
    }


# the shape


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (4, 256, 4)),
        ({"depth": 2}, (2, 128, 2)),
        ({"layers": 3, "hidden_size": 96}, (3, 96, 3)),
        ({"depth": 3, "layers": 5}, (5, 192, 3)),
    ],
)
def test_one_dial_sets_the_size_and_others_change_a_part_of_it(options: Any, expected: tuple[int, ...], tokenizer: Any) -> None:
    made = shaped(asked(**options), tokenizer, 64, local).config
    assert (made.num_hidden_layers, made.hidden_size, made.num_attention_heads) == expected
    assert (made.vocab_size, made.eos_token_id) == (len(tokenizer), tokenizer.eos_token_id)


def test_another_architecture_comes_as_a_configuration(tmp_path: Path, tokenizer: Any) -> None:
    small = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
    }
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "qwen3", "vocab_size": 9, **small}))
    made = shaped(asked(architecture=str(file)), tokenizer, 64, local)
    assert (made.config.model_type, made.vocabulary, made.context_tokens, made.hidden_size) == ("qwen3", len(tokenizer), 64, 64)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"no json", "not JSON"),
        (b"[]", "a JSON array where an object should be"),
        (b'{"model_type": "no-such-model"}', "no-such-model"),
        (b'{"hidden_size": 64}', "model_type"),
        (b'{"model_type": "vit"}', "ViTConfig"),
        (b'{"model_type": "llama", "auto_map": {"AutoConfig": "own.Config"}}', "remote code is never run"),
    ],
)
def test_what_is_no_model_of_text_is_refused(raw: bytes, words: str, tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "config.json").write_bytes(raw)
    with pytest.raises(ConfigError, match=words):
        shaped(asked(architecture=str(tmp_path / "config.json")), tokenizer, 64, local)
