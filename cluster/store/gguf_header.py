"""What a GGUF file says of its model: settings and tensors, without the numbers. In a tenth of a second, and without a package.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Nothing here trusts a length in a file.
"""

import mmap
import struct
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from cluster.errors import VersionRefused

MAGIC, VERSIONS = b"GGUF", (2, 3)
ALIGNMENT = 32
MAX_ITEMS = 10_000_000
"""Settings, tensors and items of lists together. Each takes up to 200 bytes of memory here, where a byte of the file may be one. The largest
vocabularies have 300,000 tokens, in three or four lists."""
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Kind of a value → how ``struct`` reads it."""
STRING, ARRAY = 8, 9
BLOCKS: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}
"""Kind of a tensor → its name, and how many numbers a block of how many bytes holds."""


class Field(NamedTuple):
    """One setting as the file has it."""

    types: list[int]
    """The kind of the value; of a list, `ARRAY` and the kind of its items."""
    items: Sequence[Any]
    """The value, or those of a list. A text is bytes."""


class Tensor(NamedTuple):
    kind: int
    shape: tuple[int, ...]
    begin: int
    """Offset of its first byte in the file."""
    end: int

    @property
    def dtype(self) -> str:
        return BLOCKS[self.kind][0]


class Header(NamedTuple):
    fields: dict[str, Field]
    tensors: dict[str, Tensor]

    def value(self, key: str) -> Any:
        """The setting as a number, a text, or a list; None where the file does not state it."""
        if (field := self.fields.get(key)) is None:
            return None
        values = [item.decode("utf-8", "replace") if isinstance(item, bytes) else item for item in field.items]
        return values if field.types[0] == ARRAY else values[0]


def read(file: Path) -> Header:
    """Raises `VersionRefused` where the file is not a whole GGUF file."""
    try:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).header()
    except (struct.error, ValueError) as error:
        raise VersionRefused(
            f"{file.name} is not a whole GGUF file: {str(error)[:200]}.", "Download it again.", param="model"
        ) from error


class _Reader:
    """Reads on from where it is. Beyond the end of the file ``struct`` raises."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.left = data, len(MAGIC), MAX_ITEMS

    def header(self) -> Header:
        version, tensors, fields = self._numbers("IQQ")
        if self.data[: len(MAGIC)] != MAGIC:
            raise ValueError("it begins with something else")
        if version not in VERSIONS:
            raise ValueError(f"its version is {version}")
        named = dict(self._field() for _ in range(self._counted(fields)))
        found = [self._tensor() for _ in range(self._counted(tensors))]
        stated = named.get("general.alignment", Field([4], (ALIGNMENT,)))
        if stated.types != [4] or (alignment := stated.items[0]) < 1:
            raise ValueError("its general.alignment is no size")
        start = -(-self.at // alignment) * alignment
        placed = {name: self._placed(name, tensor, start) for name, tensor in found}
        if (len(named), len(placed)) != (fields, tensors):
            raise ValueError("two of its entries have one name")
        return Header(named, placed)

    def _placed(self, name: str, tensor: Tensor, start: int) -> Tensor:
        if tensor.end + start > len(self.data):
            raise ValueError(f"it ends at byte {len(self.data)}, and {name} at {tensor.end + start}")
        return tensor._replace(begin=tensor.begin + start, end=tensor.end + start)

    def _numbers(self, kinds: str) -> tuple[Any, ...]:
        layout = struct.Struct(f"<{kinds}")
        values = layout.unpack_from(self.data, self.at)
        self.at += layout.size
        return values

    def _counted(self, count: int) -> int:
        self.left -= count
        if self.left < 0:
            raise ValueError(f"it has more than {MAX_ITEMS:,} settings, tensors and items of lists")
        return count

    def _text(self) -> bytes:
        (length,) = self._numbers("Q")
        if self.at + length > len(self.data):
            raise ValueError(f"a text of {length} bytes is longer than the file")
        begin, self.at = self.at, self.at + length
        return self.data[begin : self.at]

    def _field(self) -> tuple[str, Field]:
        name, (kind,) = self._text().decode(), self._numbers("I")
        if kind != ARRAY:
            return name, Field([kind], self._items(kind, 1))
        item, count = self._numbers("IQ")
        return name, Field([kind, item], self._items(item, self._counted(count)))

    def _items(self, kind: int, count: int) -> Sequence[Any]:
        if kind == STRING:
            return [self._text() for _ in range(count)]
        if kind not in NUMBERS:
            raise ValueError(f"it has a value of kind {kind}")
        return self._numbers(f"{count}{NUMBERS[kind]}")

    def _tensor(self) -> tuple[str, Tensor]:
        name, (dimensions,) = self._text().decode(), self._numbers("I")
        if dimensions > 8:
            raise ValueError(f"{name} has {dimensions} dimensions")
        *sides, kind, begin = self._numbers(f"{dimensions}QIQ")
        if kind not in BLOCKS:
            raise ValueError(f"{name} is of the unknown kind {kind}")
        _, numbers, size = BLOCKS[kind]
        return name, Tensor(kind, tuple(reversed(sides)), begin, begin + prod(sides) // numbers * size)
