"""Is a version's folder safe and whole? Looked at before any replica is: headers, shapes against the base, NaN and Inf.

A loader would find some of this too, but inside a live engine. Nothing here runs code from the folder or trusts a length in it.
The format: https://huggingface.co/docs/safetensors#format (8 bytes of length, a JSON header, then the tensors without gaps).
"""

import json
import mmap
import re
import struct
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from cluster.errors import VersionRefused

MAX_HEADER_BYTES = 100 << 20
CHUNK_BYTES = 64 << 20
SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
"""Bytes per element of each dtype that may be served."""
EXPONENTS = {
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "F32": (np.uint32, 0x7F800000),
    "F64": (np.uint64, 0x7FF << 52),
}
"""Dtype → how to read its bits, and the bits of its exponent: all set means NaN or infinite (IEEE 754)."""
READ_ONCE = (".json", ".txt", ".model", ".jinja")
"""Endings of what an engine reads when it starts: tokenizer, chat template, sampling defaults."""
REREAD = ("config.json", "model.safetensors.index.json")
WRITERS_MARKS = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")
LORA = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")


class Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    begin: int
    """Offset of its first byte in the file."""
    end: int


def inspect(folder: Path, base: Path | None) -> None:
    """Raise `VersionRefused`, naming file and tensor, for what an engine would choke on. ``base``: the folder an adapter sits on."""
    files = {path: header(path) for path in sorted(folder.rglob("*.safetensors"))}
    for path, tensors in files.items():
        _check_finite(path, tensors)
    if base is not None:
        tensors = {name: tensor for tensors in files.values() for name, tensor in tensors.items()}
        _check_adapter(tensors, shapes(base), stated_ranks(folder))


def check_kinds(new: Path, old: Path) -> None:
    """Raise `VersionRefused` where a tensor holds whole numbers in the place of fractions: an engine would read them without a word."""
    before = {name: tensor.dtype for path in old.rglob("*.safetensors") for name, tensor in header(path).items()}
    after = {name: tensor.dtype for path in new.rglob("*.safetensors") for name, tensor in header(path).items()}
    for name, dtype in sorted(after.items()):
        if name in before and _fractions(dtype) != _fractions(before[name]):
            raise VersionRefused(
                f"{name} is of type {dtype}, the live version's of type {before[name]}.", "Save it in that type."
            )


def _fractions(dtype: str) -> bool:
    return dtype.startswith(("F", "BF"))


def stated_ranks(folder: Path) -> set[int]:
    """The LoRA ranks that an adapter's configuration names. Raises `VersionRefused` where it names none."""
    try:
        config = cast(dict[str, Any], json.loads((folder / "adapter_config.json").read_text("utf-8")))
        pattern = cast(dict[str, Any], config.get("rank_pattern") or {})
        return {int(config["r"]), *(int(rank) for rank in pattern.values())}
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise VersionRefused(f"{folder.name}/adapter_config.json states no rank.", "Save the adapter with peft.") from error


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Tensor name → shape, of every tensor in a folder's safetensors files."""
    files = sorted(folder.rglob("*.safetensors"))
    return {name: tensor.shape for path in files for name, tensor in header(path).items()}


def difference(new: Path, old: Path) -> str:
    """What keeps ``new`` from replacing ``old`` inside a running engine, which rereads tensors and nothing else; empty where nothing does."""
    if shapes(new) != shapes(old):
        return "shape"
    if settings(new) != settings(old):
        return "config.json"
    names = {path.name for folder in (new, old) for path in folder.iterdir() if path.suffix in READ_ONCE}
    return next((name for name in sorted(names - set(REREAD)) if not same(new / name, old / name)), "")


def settings(folder: Path) -> dict[str, Any]:
    """The model's configuration without what only tells who wrote it."""
    values = cast(dict[str, Any], json.loads((folder / "config.json").read_text("utf-8")))
    return {key: value for key, value in values.items() if key not in WRITERS_MARKS}


def same(one: Path, other: Path) -> bool:
    return one.is_file() and other.is_file() and one.read_bytes() == other.read_bytes()


def header(path: Path) -> dict[str, Tensor]:
    """A safetensors file's tensors. Raises `VersionRefused` where the header does not describe exactly the bytes that follow it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise _refuse(path, f"its header would be {length} bytes long in a file of {size}")
        try:
            entries: Any = json.loads(file.read(length))
        except ValueError:
            raise _refuse(path, "its header is not JSON") from None
    if not isinstance(entries, dict):
        raise _refuse(path, "its header is not an object")
    named = cast(dict[str, Any], entries)
    tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in named.items() if name != "__metadata__"}
    _check_no_gaps(path, tensors, 8 + length, size)
    return tensors


def _tensor(path: Path, name: str, entry: Any, start: int) -> Tensor:
    try:
        dtype, shape = str(entry["dtype"]), tuple(int(side) for side in entry["shape"])
        begin, end = (int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise _refuse(path, f"the header of {name} is not complete") from None
    if dtype not in SIZES:
        raise _refuse(path, f"{name} is of type {dtype}, known are {', '.join(SIZES)}")
    if min(shape, default=0) < 0 or end - begin != prod(shape) * SIZES[dtype]:
        raise _refuse(path, f"{name} of shape {list(shape)} and type {dtype} does not take {end - begin} bytes")
    return Tensor(dtype, shape, start + begin, start + end)


def _check_no_gaps(path: Path, tensors: dict[str, Tensor], start: int, size: int) -> None:
    place = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != place:
            raise _refuse(path, f"{name} starts at byte {tensor.begin} where {place} is expected")
        place = tensor.end
    if place != size:
        raise _refuse(path, f"its tensors end at byte {place}, the file at {size}")


def _check_finite(path: Path, tensors: dict[str, Tensor]) -> None:
    if not tensors:
        raise _refuse(path, "it holds no tensors")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as bytes_:
        for name, tensor in tensors.items():
            if any(_not_finite(chunk, tensor.dtype) for chunk in _chunks(bytes_, tensor)):
                raise VersionRefused(
                    f"{name} in {path.name} holds NaN or infinite numbers.", "The training diverged; take an earlier checkpoint."
                )


def _chunks(source: mmap.mmap, tensor: Tensor) -> Iterator[bytes]:
    return (source[at : min(at + CHUNK_BYTES, tensor.end)] for at in range(tensor.begin, tensor.end, CHUNK_BYTES))


def _not_finite(chunk: bytes, dtype: str) -> bool:
    if dtype == "F8_E4M3":
        return bool(((np.frombuffer(chunk, np.uint8) & 0x7F) == 0x7F).any())
    if dtype == "F8_E5M2":
        return bool(((np.frombuffer(chunk, np.uint8) & 0x7C) == 0x7C).any())
    if dtype not in EXPONENTS:
        return False
    integer, exponent = EXPONENTS[dtype]
    return bool(((np.frombuffer(chunk, integer) & integer(exponent)) == exponent).any())


def _check_adapter(tensors: dict[str, Tensor], base: dict[str, tuple[int, ...]], ranks: set[int]) -> None:
    """Every LoRA pair must sit on a matrix of the base, have its sides, and a rank that the configuration names."""
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in tensors.items():
        found = LORA.match(name)
        if found is None or len(tensor.shape) != 2 or not _fractions(tensor.dtype):
            raise VersionRefused(f"{name} is not a LoRA matrix.", "Save the adapter with peft's save_pretrained.")
        pairs.setdefault(found["module"], {})[found["side"]] = tensor.shape
    for module, sides in pairs.items():
        _check_pair(module, sides, base.get(f"{module}.weight"))
        if sides["A"][0] not in ranks:
            raise VersionRefused(
                f"{module} has rank {sides['A'][0]}; adapter_config.json says {', '.join(map(str, sorted(ranks)))}.",
                "An engine scales by what the configuration says; save the adapter again with peft.",
            )


def _check_pair(module: str, sides: dict[str, tuple[int, ...]], weight: tuple[int, ...] | None) -> None:
    if weight is None:
        raise VersionRefused(f"The base has no module {module}.", "Check target_modules, or the base the adapter was trained on.")
    if set(sides) != {"A", "B"}:
        raise VersionRefused(f"{module} has lora_{min(sides)} alone.", "Save the adapter again.")
    (rank_a, inner), (outer, rank_b) = sides["A"], sides["B"]
    if rank_a != rank_b or (outer, inner) != weight:
        raise VersionRefused(
            f"The adapter's matrices for {module} make {outer}×{inner} of ranks {rank_a} and {rank_b}; the base has {weight[0]}×{weight[-1]}.",
            "It was trained on another base.",
        )


def _refuse(path: Path, what: str) -> VersionRefused:
    return VersionRefused(f"{path.name} is not a whole safetensors file: {what}.", "Register the version again.")
