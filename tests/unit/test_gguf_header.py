"""What a GGUF file says of its model is read without trusting a length in it."""

import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.errors import VersionRefused
from cluster.store import gguf_header
from cluster.store.gguf_header import ARRAY, BLOCKS, MAX_ITEMS, NUMBERS, STRING, Tensor

F32, Q8_0 = 0, 8
SMOLLM: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 30,
    "llama.context_length": 8192,
    "llama.embedding_length": 576,
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
    "llama.rope.dimension_count": 64,
}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def value(of: Any) -> bytes:
    """A setting: a text, a whole number, or a list of either."""
    if isinstance(of, list):
        items: list[Any] = of
        kind = STRING if items and isinstance(items[0], str) else 4
        return struct.pack("<IIQ", ARRAY, kind, len(items)) + b"".join(value(item)[4:] for item in items)
    return struct.pack("<I", STRING) + text(of) if isinstance(of, str) else struct.pack("<II", 4, of)


def made(fields: dict[str, Any], tensors: dict[str, tuple[int, tuple[int, ...]]]) -> bytes:
    """A GGUF file whose tensors are zeros."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    head += b"".join(text(name) + value(of) for name, of in fields.items())
    size = 0
    for name, (kind, shape) in tensors.items():
        sides = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head += text(name) + sides + struct.pack("<IQ", kind, size)
        _, numbers, bytes_ = BLOCKS[kind]
        size += shape[0] * (shape[1] if len(shape) > 1 else 1) // numbers * bytes_
    return head + bytes(-len(head) % 32) + bytes(size)


SMALL = made({**SMOLLM, "tokens": ["a", "é"], "types": [3, 1]}, {"embed": (Q8_0, (4, 64)), "norm": (F32, (8,))})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tiny.gguf"


def test_settings_and_tensors_are_read(file: Path) -> None:
    file.write_bytes(SMALL)
    header = gguf_header.read(file)
    assert header.value("llama.block_count") == 30 and header.value("general.architecture") == "llama"
    assert (header.value("tokens"), header.value("types"), header.value("absent")) == (["a", "é"], [3, 1], None)
    start = len(SMALL) - 4 * 64 // 32 * 34 - 8 * 4
    assert header.tensors["embed"] == Tensor(Q8_0, (4, 64), start, start + 272)
    assert header.tensors["norm"] == Tensor(F32, (8,), start + 272, len(SMALL)) and header.tensors["norm"].dtype == "F32"


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"GGUF",
        b"<!DOCTYPE html>" + bytes(100),
        made({"general.alignment": "wide"}, {}),
        made({"general.alignment": 0}, {}),
        b"GGUF" + b"\xff" * 100,
        SMALL[:-1],
        SMALL[: len(SMALL) // 2],
        SMALL.replace(struct.pack("<I", 3), struct.pack("<I", 9), 1),
        made({"a": "b"}, {})[:-1].replace(struct.pack("<I", STRING), struct.pack("<I", 77)),
    ],
)
def test_a_damaged_file_is_refused_in_words(file: Path, broken: bytes) -> None:
    file.write_bytes(broken)
    with pytest.raises(VersionRefused, match=r"tiny.gguf is not a whole GGUF file: .+ Download it again"):
        gguf_header.read(file)


def listed(name: str, kind: int, count: int) -> bytes:
    """The beginning of a setting that is a list."""
    return text(name) + struct.pack("<IIQ", ARRAY, kind, count)


U8 = 0
TOO_MANY: dict[str, tuple[int, int, bytes]] = {
    "a list": (0, 1, listed("a", U8, MAX_ITEMS + 1) + bytes(MAX_ITEMS + 1)),
    "two lists": (0, 2, listed("a", U8, MAX_ITEMS // 2) + bytes(MAX_ITEMS // 2) + listed("b", U8, MAX_ITEMS // 2) + bytes(MAX_ITEMS // 2)),
    "a list of texts": (0, 1, listed("a", STRING, MAX_ITEMS)),
    "settings": (0, MAX_ITEMS + 1, b""),
    "tensors": (MAX_ITEMS + 1, 0, b""),
}  # fmt: skip


@pytest.mark.parametrize("case", TOO_MANY)
def test_a_file_of_too_many_items_is_refused_before_they_take_memory(file: Path, case: str) -> None:
    tensors, fields, lists = TOO_MANY[case]
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + lists + bytes(64))
    with pytest.raises(VersionRefused, match="it has more than 10,000,000 settings, tensors and items of lists"):
        gguf_header.read(file)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(4, len(SMALL) - 300), st.integers(0, 255)), min_size=1, max_size=12))
def test_no_length_in_a_file_is_trusted(file: Path, changes: list[tuple[int, int]]) -> None:
    data = bytearray(SMALL)
    for at, byte in changes:
        data[at] = byte
    file.write_bytes(data)
    try:
        header = gguf_header.read(file)
    except VersionRefused:
        return
    assert all(0 <= tensor.begin <= tensor.end <= len(SMALL) for tensor in header.tensors.values())
    assert all(kind in (*NUMBERS, STRING, ARRAY) for field in header.fields.values() for kind in field.types)
