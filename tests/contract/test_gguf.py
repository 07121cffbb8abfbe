"""GGUF files, read by transformers and the package gguf: the same numbers, the same tokens, the same chat template, and the same bytes each time."""

import json
from pathlib import Path
from typing import Any

import pytest

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed; `make setup` installs it")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from gguf.gguf_reader import GGUFReader  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from cluster.errors import VersionRefused  # noqa: E402
from cluster.store import gguf as conversion  # noqa: E402
from cluster.store import gguf_header, imports  # noqa: E402
from cluster.store.objects import Store  # noqa: E402
from cluster.store.registry import Registry  # noqa: E402
from jobs.data.tokenizer import grow_tokenizer  # noqa: E402
from jobs.training.seedling import CONTEXT_TOKENS, VOCABULARY, seedling  # noqa: E402

CHAT = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am a small model."}]
CONTROL, NORMAL = 3, 1


def small_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    torch.manual_seed(0)
    tokenizer = grow_tokenizer([message["content"] for message in CHAT], VOCABULARY, CONTEXT_TOKENS)
    return seedling(tokenizer, hidden_size=64, layers=2), tokenizer


def write_gguf(path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, kind: Any, left_out: str = "") -> None:
    """Write a Llama as llama.cpp's converter does. ``left_out``: a tensor that is forgotten."""
    shape: Any = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_rope_dimension_count(shape.hidden_size // shape.num_attention_heads)
    writer.add_vocab_size(shape.vocab_size)
    write_tokenizer(writer, tokenizer, shape.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        known = names.get_name(name, try_suffixes=(".weight",))
        if known is None or name in ("lm_head.weight", left_out):
            continue
        numbers = permuted(name, tensor, shape.num_attention_heads).numpy()
        whole = numbers.ndim == 1 or kind == gguf.GGMLQuantizationType.F32
        writer.add_tensor(known, numbers if whole else gguf.quantize(numbers, kind), raw_dtype=None if whole else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerFast, size: int) -> None:
    by_id = {id: token for token, id in tokenizer.get_vocab().items()}
    tokens = [by_id.get(id, f"<unused{id}>") for id in range(size)]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_token_types([CONTROL if token in tokenizer.all_special_tokens else NORMAL for token in tokens])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)


def permuted(name: str, tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp has the two halves of a head's rotary pairs in turns."""
    if "q_proj" not in name and "k_proj" not in name:
        return tensor
    rows = tensor.shape[0]
    return tensor.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(tensor.shape).contiguous()


@pytest.fixture(scope="module")
def made() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    return small_model()


def test_a_gguf_file_becomes_a_version_that_is_the_same_model(made: Any, tmp_path: Path) -> None:
    """In a process of its own, as a command does it."""
    model, tokenizer = made
    write_gguf(tmp_path / "tiny.gguf", model, tokenizer, gguf.GGMLQuantizationType.F32)
    registry, said = Registry(Store((tmp_path / "store").as_uri())), list[str]()
    id = imports.add(registry, imports.find(str(tmp_path / "tiny.gguf"), said.append), tmp_path / "scratch", said.append)
    assert str(id) == "tiny@1" and any("tensors as float32" in words for words in said), said
    folder = registry.fetch(registry.manifest(id), tmp_path / "cache")
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".jinja", ".safetensors", ".txt"}
    expected = model.state_dict()
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, expected[name]), name
    read: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert read.chat_template == tokenizer.chat_template
    assert read.apply_chat_template(CHAT, return_dict=False) == tokenizer.apply_chat_template(CHAT, return_dict=False)
    settings = json.loads((folder / "config.json").read_text())
    assert settings["architectures"] == ["LlamaForCausalLM"] and "quantization_config" not in settings
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id
    conversion.write(tmp_path / "tiny.gguf", tmp_path / "again")
    again = registry.register("again", "weights", None, tmp_path / "again", registry.manifest(id).lineage)
    assert again.digest == registry.manifest(id).digest, "another process, another time, the same bytes"


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1", "BF16"])
def test_a_header_says_what_the_readers_package_says(made: Any, tmp_path: Path, kind: str) -> None:
    model, tokenizer = made
    write_gguf(tmp_path / "tiny.gguf", model, tokenizer, gguf.GGMLQuantizationType[kind])
    header = gguf_header.read(tmp_path / "tiny.gguf")
    theirs = GGUFReader(tmp_path / "tiny.gguf")
    own = {name: field for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert {name: header.value(name) for name in header.fields} == {name: field.contents() for name, field in own.items()}
    assert [*header.tensors] == [tensor.name for tensor in theirs.tensors]
    for given, expected in zip(conversion.given(tmp_path / "tiny.gguf", header).tensors, theirs.tensors, strict=True):
        assert given.tensor_type == expected.tensor_type and given.data.dtype == expected.data.dtype
        assert np.array_equal(given.data, expected.data), expected.name


def test_the_kinds_of_blocks_are_those_of_the_package() -> None:
    sizes = {kind.value: (kind.name, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert sizes == gguf_header.BLOCKS


def test_the_files_are_those_that_transformers_writes_by_itself(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = made
    write_gguf(tmp_path / "tiny.gguf", model, tokenizer, gguf.GGMLQuantizationType.Q4_1)
    monkeypatch.setattr(conversion, "read_once", lambda *_: None)
    monkeypatch.setattr(gguf, "GGUFReader", GGUFReader)
    conversion.write(tmp_path / "tiny.gguf", tmp_path / "slow")
    monkeypatch.undo()
    conversion.write(tmp_path / "tiny.gguf", tmp_path / "fast")
    assert contents(tmp_path / "fast") == contents(tmp_path / "slow")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_blocks_become_bfloat16(made: Any, tmp_path: Path) -> None:
    model, tokenizer = made
    write_gguf(tmp_path / "tiny.gguf", model, tokenizer, gguf.GGMLQuantizationType.Q8_0)
    conversion.write(tmp_path / "tiny.gguf", tmp_path / "out")
    expected = model.state_dict()
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert tensor.dtype == torch.bfloat16, name
        assert torch.allclose(tensor.float(), expected[name], atol=expected[name].abs().max().item() / 64), name


def test_a_file_that_lacks_a_tensor_is_refused_and_not_filled_with_random_numbers(made: Any, tmp_path: Path) -> None:
    model, tokenizer = made
    forgotten = "model.layers.1.mlp.up_proj.weight"
    write_gguf(tmp_path / "tiny.gguf", model, tokenizer, gguf.GGMLQuantizationType.F32, left_out=forgotten)
    with pytest.raises(SystemExit, match=f"no tensor for {forgotten}"):
        conversion.write(tmp_path / "tiny.gguf", tmp_path / "out")


def test_a_damaged_file_is_an_error_in_the_readers_words(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF" + b"\xff" * 100)
    with pytest.raises(VersionRefused, match=r"tiny.gguf cannot be converted: \w+"):
        conversion.convert(tmp_path / "tiny.gguf", tmp_path / "out", lambda _: None)
