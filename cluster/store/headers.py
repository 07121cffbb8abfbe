"""Headers of safetensors files: which tensors there are, of which type and shape, without reading them.

The format: https://huggingface.co/docs/safetensors#format (8 bytes of length, a JSON header, then the tensors without gaps). Nothing here
trusts a length in a file.
"""

import json
import struct
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, cast

from cluster.errors import VersionRefused

MAX_HEADER_BYTES = 100 << 20
FIRST_BYTES = 64 << 10
"""What is asked for first: most headers are no longer."""
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


class Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    begin: int
    """Offset of its first byte in the file."""
    end: int


def header(path: Path) -> dict[str, Tensor]:
    """The tensors of a file on this machine. Raises `VersionRefused` where the header does not describe exactly the bytes that follow it."""

    def read(start: int, end: int) -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(end - start)

    return parse(path.name, path.stat().st_size, read)


def parse(name: str, size: int, read: Callable[[int, int], bytes]) -> dict[str, Tensor]:
    """The tensors of a file of ``size`` bytes. ``read(start, end)`` gives its bytes, wherever it is."""
    first = read(0, min(size, FIRST_BYTES))
    length = struct.unpack("<Q", first[:8])[0] if len(first) >= 8 else 0
    if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        raise _refuse(name, f"its header would be {length} bytes long in a file of {size}")
    rest = read(len(first), 8 + length) if 8 + length > len(first) else b""
    try:
        entries: Any = json.loads((first + rest)[8 : 8 + length])
    except ValueError:
        raise _refuse(name, "its header is not JSON") from None
    if not isinstance(entries, dict):
        raise _refuse(name, "its header is not an object")
    named = cast(dict[str, Any], entries)
    tensors = {key: _tensor(name, key, entry, 8 + length) for key, entry in named.items() if key != "__metadata__"}
    _check_no_gaps(name, tensors, 8 + length, size)
    return tensors


def _tensor(file: str, name: str, entry: Any, start: int) -> Tensor:
    try:
        dtype, shape = str(entry["dtype"]), tuple(int(side) for side in entry["shape"])
        begin, end = (int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise _refuse(file, f"the header of {name} is not complete") from None
    if dtype not in SIZES:
        raise _refuse(file, f"{name} is of type {dtype}, known are {', '.join(SIZES)}")
    if min(shape, default=0) < 0 or end - begin != prod(shape) * SIZES[dtype]:
        raise _refuse(file, f"{name} of shape {list(shape)} and type {dtype} does not take {end - begin} bytes")
    return Tensor(dtype, shape, start + begin, start + end)


def _check_no_gaps(file: str, tensors: dict[str, Tensor], start: int, size: int) -> None:
    place = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != place:
            raise _refuse(file, f"{name} starts at byte {tensor.begin} where {place} is expected")
        place = tensor.end
    if place != size:
        raise _refuse(file, f"its tensors end at byte {place}, the file at {size}")


def _refuse(file: str, what: str) -> VersionRefused:
    return VersionRefused(f"{file} is not a whole safetensors file: {what}.", "Register the version again.")
