"""Is a version's folder safe and whole? Looked at before any replica is: headers, shapes against the base, NaN and Inf.

A loader would find some of this too, but inside a live engine. Nothing here runs code from the folder or trusts a length in it
(`cluster.store.headers`).
"""

import json
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from cluster.errors import VersionRefused
from cluster.store.candidate import Candidate
from cluster.store.headers import Tensor, header

CHUNK_BYTES = 64 << 20
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


class _Folder(NamedTuple):
    """A version whose files are all on this machine."""

    settings: Path

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return shapes(self.settings)


def inspect(folder: Path, base: dict[str, tuple[int, ...]] | None) -> None:
    """Raise `VersionRefused`, naming file and tensor, for what an engine would choke on. ``base``: the shapes of what an adapter sits on."""
    files = {path: header(path) for path in sorted(folder.rglob("*.safetensors"))}
    for path, tensors in files.items():
        _check_finite(path, tensors)
    if base is not None:
        tensors = {name: tensor for tensors in files.values() for name, tensor in tensors.items()}
        _check_adapter(tensors, base, stated_ranks(folder))


def check_kinds(new: dict[str, Tensor], old: dict[str, Tensor]) -> None:
    """Raise `VersionRefused` where a tensor holds whole numbers in the place of fractions: an engine would read them without a word."""
    for name, tensor in sorted(new.items()):
        if name in old and _fractions(tensor.dtype) != _fractions(old[name].dtype):
            raise VersionRefused(
                f"{name} is of type {tensor.dtype}, the live version's of type {old[name].dtype}.", "Save it in that type."
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


def difference(new: Candidate | Path, old: Candidate | Path) -> str:
    """Why a running engine cannot reload ``new`` in place of ``old``: it rereads tensors and nothing else. Empty where it can.

    A path is a folder with all files of a version. The answer is ``shape`` or the name of a file that differs.
    """
    one, other = (_Folder(version) if isinstance(version, Path) else version for version in (new, old))
    if one.shapes != other.shapes:
        return "shape"
    if settings(one.settings) != settings(other.settings):
        return "config.json"
    names = {path.name for version in (one, other) for path in version.settings.iterdir() if path.suffix in READ_ONCE}
    return next((name for name in sorted(names - set(REREAD)) if not same(one.settings / name, other.settings / name)), "")


def settings(folder: Path) -> dict[str, Any]:
    """The model's configuration without what only tells who wrote it."""
    values = cast(dict[str, Any], json.loads((folder / "config.json").read_text("utf-8")))
    return {key: value for key, value in values.items() if key not in WRITERS_MARKS}


def same(one: Path, other: Path) -> bool:
    return one.is_file() and other.is_file() and one.read_bytes() == other.read_bytes()


def _check_finite(path: Path, tensors: dict[str, Tensor]) -> None:
    if not tensors:
        raise VersionRefused(f"{path.name} holds no tensors.", "Register the version again.")
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
