"""Text to pretrain on: which files, in which pieces, as which blocks, and what a new model learns from them."""

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from cluster.config import Config, parse
from cluster.errors import BadRequest, DataError
from cluster.store.objects import Store
from jobs.data import blocks
from jobs.data.blocks import Blocks, Shard, block, blocks_of
from jobs.data.text import cut, listed, pieces
from jobs.data.tokenizer import grow_tokenizer
from jobs.sources import local
from jobs.training.objectives.pretrain import MODEL, Pretraining

CHINESE = "潮水涨落，永不停息。\n"


# files and pieces


@given(st.text(max_size=300), st.integers(1, 50))
def test_pieces_are_the_document_and_end_at_lines_where_they_can(document: str, limit: int) -> None:
    made = list(cut(document, limit))
    assert "".join(piece.text for piece in made) == document
    assert all(0 < len(piece.text) <= limit for piece in made)
    assert [piece.last for piece in made] == [False] * (len(made) - 1) + [True] * bool(made)
    assert all(piece.text.endswith("\n") or piece.last or "\n" not in piece.text for piece in made)


def test_a_folder_means_all_its_files_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "deeper/c.txt", ".hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = listed([str(tmp_path), "s3://bucket/x.txt", "sample:tide"])
    assert [Path(one).name for one in found] == ["a.txt", "b.txt", "c.txt", "x.txt", "sample:tide"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadRequest, match="has no files"):
        listed([str(tmp_path / "empty")])


def test_a_file_is_one_document_and_each_line_of_json_is_one(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + CHINESE.encode())
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "one", "id": 1}) + "\n\n" + json.dumps({"text": "two"}))
    assert [piece.text for piece in pieces(str(tmp_path / "a.txt"), local)] == [CHINESE]
    assert [(piece.text, piece.last) for piece in pieces(str(tmp_path / "b.jsonl"), local)] == [("one", True), ("two", True)]


@pytest.mark.parametrize(
    ("name", "raw", "words"),
    [
        ("a.txt", b"good\xff", r"a\.txt: byte 5 is not UTF-8 text"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}', r"a\.jsonl, line 2: 'text' is a JSON null"),
        ("a.jsonl", b"plain", r"a\.jsonl, line 1: not JSON"),
    ],
)
def test_what_is_no_text_is_named(tmp_path: Path, name: str, raw: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=words):
        list(pieces(str(tmp_path / name), local))


# blocks


@given(st.integers(0, 200), st.integers(2, 20))
def test_every_token_but_the_first_is_predicted_once(tokens: int, length: int) -> None:
    predicted = [
        at for number in range(blocks_of(tokens, length)) for at in range(block(number, length)[0] + 1, block(number, length)[1])
    ]
    assert predicted == list(range(1, len(predicted) + 1))
    assert len(predicted) <= max(0, tokens - 1) < len(predicted) + length


def test_blocks_come_from_several_shards_and_each_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "SHARD_TOKENS", 10)
    store, ids = Store((tmp_path / "store").as_uri()), np.arange(47, dtype=np.uint16)
    shards = blocks.write(store, "runs/r/text", [ids[:3], ids[3:30], ids[30:]])
    assert [shard.tokens for shard in shards] == [10, 10, 10, 10, 7]
    made = Blocks(store, shards, [0, 4, 2], 8, tmp_path / "cache")
    assert [row.input_ids for row in made[:]] == [list(range(first, first + 8)) for first in (0, 28, 14)]
    assert len(made) == 3 and {row.prompt_tokens for row in made[:]} == {0}
    store.remove("runs/r")
    assert Blocks(store, shards, [4], 8, tmp_path / "cache")[0] == made[1], "what is on this machine is not fetched again"


# the objective


@pytest.fixture(scope="module")
def pretraining(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The settings of a run that learns a verse by heart."""
    home = tmp_path_factory.mktemp("pretraining")
    config: Config = parse({"home": str(home), "store": (home / "store").as_uri()})
    text = (CHINESE + "The tide comes in, the tide goes out.\n") * 60
    tokenizer: Any = grow_tokenizer([text], vocabulary=300, context_tokens=64)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    shape.save_pretrained(home / "model")
    tokenizer.save_pretrained(home / "model")
    store = Store(config.store)
    for file in (home / "model").iterdir():
        store.upload(f"runs/r/{MODEL}/{file.name}", file)
    ids = np.array(tokenizer.encode(text), dtype=np.uint16)
    shards = blocks.write(store, "runs/r/text", [ids])
    count = blocks_of(len(ids), 32)
    return {
        "config": config.dump(),
        "recipe": {"learning_rate": 0.01, "precision": "float32", "global_batch": 8, "epochs": 3, "micro_batch_tokens": 128},
        "run": "r",
        "shards": [tuple(Shard(*shard)) for shard in shards],
        "train": list(range(count - 2)),
        "held_out": [count - 2, count - 1],
        "length": 32,
        "bytes_per_token": len(text.encode()) / len(ids),
    }


def test_a_new_model_learns_its_text_and_is_saved_with_its_tokenizer(pretraining: dict[str, Any], tmp_path: Path) -> None:
    from jobs.training.process_group import ProcessGroup, joined
    from jobs.training.work import gather, update

    work = Pretraining(pretraining)
    with joined(ProcessGroup(1, 0, 1, (tmp_path / "meet").as_uri()), cuda=False):
        before = work.measure(0, 1)
        for step, batch in enumerate(work.schedule.batches()):
            update(work, step, gather(work, batch, 0, 1).norm)
        after = work.measure(0, 1)
    assert after["eval_loss"] < before["eval_loss"] / 3 and before["eval_loss"] < work.hopeless
    nats_per_byte = after["eval_loss"] / pretraining["bytes_per_token"]
    assert after["bits_per_byte"] == pytest.approx(nats_per_byte / np.log(2))
    work.save(tmp_path / "made")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "made")
    assert torch.equal(again.lm_head.weight, work.model.lm_head.weight)
    assert {"tokenizer.json", "config.json", "model.safetensors"} <= {file.name for file in (tmp_path / "made").iterdir()}


def test_two_workers_begin_with_the_same_weights(pretraining: dict[str, Any]) -> None:
    first, second = (cast(Any, Pretraining(pretraining)) for _ in range(2))
    assert torch.equal(first.flat.vector, second.flat.vector)
