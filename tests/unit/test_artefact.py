"""Damaged, dangerous and misfitting artefacts are refused by what their bytes say, before anything loads them."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from cluster.errors import VersionRefused
from cluster.store.artefact import check_kinds, difference, inspect, shapes
from cluster.store.headers import Tensor, header

BASE = {"model.layers.0.self_attn.q_proj.weight": np.zeros((8, 4), np.float32)}
PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"


def folder(path: Path, tensors: dict[str, Any], name: str = "model.safetensors") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / name)
    return path


def lora(path: Path, tensors: dict[str, Any], rank: int = 2) -> Path:
    folder(path, tensors, "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"r": rank}))
    return path


def adapter(a: tuple[int, int] = (2, 4), b: tuple[int, int] = (8, 2), prefix: str = PREFIX) -> dict[str, Any]:
    return {f"{prefix}.lora_A.weight": np.ones(a, np.float32), f"{prefix}.lora_B.weight": np.ones(b, np.float32)}


def raw(path: Path, entries: Any, data: bytes) -> Path:
    head = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + data)
    return path


def test_whole_files_pass(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", BASE)
    inspect(base, None)
    inspect(lora(tmp_path / "adapter", adapter()), shapes(base))
    assert shapes(base) == {"model.layers.0.self_attn.q_proj.weight": (8, 4)}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_one_number_that_is_none_is_found(tmp_path: Path, bad: float, dtype: Any) -> None:
    values = np.ones(1000, dtype)
    inspect(folder(tmp_path / "good", {"w": values}), None)
    values[777] = bad
    with pytest.raises(VersionRefused, match=r"w in model.safetensors holds NaN"):
        inspect(folder(tmp_path / "bad", {"w": values}), None)


@pytest.mark.parametrize(("dtype", "good", "bad"), [("BF16", 0x7F7F, 0x7F80), ("BF16", 0xFF7F, 0xFFC0)])
def test_bfloat16_is_read_by_its_bits(tmp_path: Path, dtype: str, good: int, bad: int) -> None:
    for bits, fine in ((good, True), (bad, False)):
        path = raw(
            tmp_path / "x.safetensors", {"w": {"dtype": dtype, "shape": [1], "data_offsets": [0, 2]}}, struct.pack("<H", bits)
        )
        if fine:
            inspect(path.parent, None)
        else:
            with pytest.raises(VersionRefused, match="NaN"):
                inspect(path.parent, None)


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("entries", "data"),
    [
        (b"not json", b""),
        ([1, 2], b""),
        ({"w": ONE}, b"\0" * 7),
        ({"w": ONE}, b"\0" * 9),
        ({"w": {**ONE, "data_offsets": [8, 16]}}, b"\0" * 16),
        ({"w": ONE, "v": {**ONE, "data_offsets": [4, 12]}}, b"\0" * 12),
        ({"w": {**ONE, "shape": [3]}}, b"\0" * 8),
        ({"w": {**ONE, "shape": [-2]}}, b"\0" * 8),
        ({"w": {**ONE, "dtype": "PICKLE"}}, b"\0" * 8),
        ({"w": {"dtype": "F32"}}, b""),
        ({"w": None}, b""),
        ({}, b""),
    ],
)
def test_headers_that_do_not_describe_the_bytes_are_refused(tmp_path: Path, entries: Any, data: bytes) -> None:
    raw(tmp_path / "model.safetensors", entries, data)
    with pytest.raises(VersionRefused):
        inspect(tmp_path, None)


@settings(max_examples=60)
@given(cut=st.integers(0, 10_000))
def test_a_file_cut_anywhere_is_refused(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    whole = folder(tmp_path_factory.getbasetemp() / "whole", {"w": np.ones(100, np.float32)}) / "model.safetensors"
    content = whole.read_bytes()
    part = tmp_path_factory.getbasetemp() / "part.safetensors"
    part.write_bytes(content[: cut % len(content)])
    with pytest.raises(VersionRefused):
        header(part)


def test_a_length_beyond_the_file_is_refused_before_it_is_believed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(VersionRefused, match="header would be"):
        header(path)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (adapter(prefix="base_model.model.model.layers.0.mlp.gate_proj"), "no module"),
        (adapter(a=(2, 5)), "another base"),
        (adapter(b=(9, 2)), "another base"),
        (adapter(b=(8, 3)), "another base"),
        ({f"{PREFIX}.lora_A.weight": np.ones((2, 4), np.float32)}, "alone"),
        ({"something.else": np.ones((2, 2), np.float32)}, "not a LoRA"),
        ({name: tensor.astype(np.int8) for name, tensor in adapter().items()}, "not a LoRA"),
        (adapter(a=(3, 4), b=(8, 3)), "has rank 3; adapter_config.json says 2"),
    ],
)
def test_an_adapter_that_does_not_fit_its_base_is_refused(tmp_path: Path, tensors: dict[str, Any], words: str) -> None:
    base = folder(tmp_path / "base", BASE)
    with pytest.raises(VersionRefused, match=words):
        inspect(lora(tmp_path / "adapter", tensors), shapes(base))


def test_whole_numbers_in_the_place_of_fractions_are_refused(tmp_path: Path) -> None:
    """vLLM copies them into its own tensors, cast and without a word."""

    def of(dtype: Any) -> dict[str, Tensor]:
        path = folder(tmp_path / np.dtype(dtype).name, {name: tensor.astype(dtype) for name, tensor in BASE.items()})
        return header(path / "model.safetensors")

    check_kinds(of(np.float16), of(np.float32))
    with pytest.raises(VersionRefused, match="is of type I8"):
        check_kinds(of(np.int8), of(np.float32))


@pytest.mark.parametrize("name", ["chat_template.jinja", "generation_config.json", "tokenizer.json"])
@pytest.mark.parametrize("side", ["old", "new"])
def test_a_file_that_only_one_side_has_takes_another_engine(tmp_path: Path, name: str, side: str) -> None:
    """An engine reads them when it starts; swapped in place, one version would answer in two ways."""
    for each in ("old", "new"):
        (folder(tmp_path / each, BASE) / "config.json").write_text("{}")
    assert difference(tmp_path / "new", tmp_path / "old") == ""
    (tmp_path / side / name).write_text("{}")
    assert difference(tmp_path / "new", tmp_path / "old") == name
