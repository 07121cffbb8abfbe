"""Checkpoints of a run whose workers have slices. Each worker writes its own, and any number of workers can read them.

``runs/<name>/<step>/0-of-3.safetensors`` holds the tensors of rank 0 of three, and ``0-of-3.json`` says what is in it, and is written last. It
holds the counters, which process group wrote it, for each tensor its place and its digest, and a digest of itself. A checkpoint is
complete once all of a group's workers have written theirs, so no worker waits for another to write it.

A reader takes whole pieces only, one tensor of one writer at a time, and compares each with its digest. Example: a checkpoint of three is read by
two. Rank 0 takes the pieces of the writers 0 and 1, and keeps the first half of the second.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from cluster.store.objects import Store
from jobs.training.sharding.slices import pieces, rows_of
from jobs.training.state.checkpoints import KEPT, OWN_DIGEST, digest, read_manifest


class Shard(NamedTuple):
    """One worker's part of a run between two steps."""

    step: int
    meta: Mapping[str, Any]
    """Plain JSON values."""
    tensors: Mapping[str, torch.Tensor]
    """Copies on the host, which nothing changes: this worker's rows."""
    rows: Mapping[str, int]
    """How many rows each tensor has on all workers together."""
    rank: int
    world: int
    group: str
    """What no other process group is called, of any job."""


class Whole(NamedTuple):
    """A complete checkpoint: what its writers say of it, by rank."""

    step: int
    writers: list[dict[str, Any]]

    @property
    def meta(self) -> dict[str, Any]:
        return self.writers[0]["meta"]


class DamagedShard(Exception):
    """A piece of a checkpoint is missing, or not as it was written. The words name it."""


class ShardCheckpoints:
    def __init__(self, store: Store, run: str) -> None:
        self.store = store
        self.root = f"runs/{run}"

    def commit(self, shard: Shard) -> None:
        """Write this worker's part: the tensors first, what is in them last. Raises `StoreUnavailable`; the checkpoints before stay then."""
        name = f"{self._folder(shard.step)}/{shard.rank}-of-{shard.world}"
        self.store.delete(f"{name}.json")  # of another group, which had come as far
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "shard.safetensors"
            save_file(dict(shard.tensors), file)
            self.store.upload(f"{name}.safetensors", file)
            about = {key: value for key, value in shard._asdict().items() if key not in ("tensors", "rows")}
            about["tensors"] = {tensor: [shard.rows[tensor], *place] for tensor, place in places(file).items()}
        self.store.put_new(f"{name}.json", json.dumps({**about, OWN_DIGEST: digest(about)}).encode())
        if shard.rank == 0:
            self._remove_outdated()

    def complete(self) -> Iterator[Whole]:
        """The complete checkpoints, the newest first. The log names the others."""
        for step in self.steps():
            if whole := self.read(step):
                yield whole
            else:
                print(f"the checkpoint of step {step} is damaged or incomplete; taking the one before", flush=True)

    def steps(self) -> list[int]:
        """The newest first."""
        return sorted((int(name) for name in self.store.children(self.root) if name.isdigit()), reverse=True)

    def slice_of(self, whole: Whole, tensor: str, rank: int, world: int, like: torch.Tensor) -> torch.Tensor | None:
        """The rows of ``tensor`` that the worker ``rank`` of ``world`` has; None where it has none. ``like``: of the same type and row shape.

        Raises `DamagedShard`, and `StoreUnavailable`. It has one piece in memory at a time besides what it returns.
        """
        rows = whole.writers[0]["tensors"][tensor][0]
        mine = rows_of(rows, rank, world)
        found = like.new_empty(len(mine), *like.shape[1:], device="cpu")
        for piece in pieces(rows, rank, world, len(whole.writers)):
            theirs = rows_of(rows, piece.rank, len(whole.writers))
            whole_piece = self.piece(whole, tensor, piece.rank, like.dtype).view(len(theirs), *like.shape[1:])
            found[piece.rows.start - mine.start : piece.rows.stop - mine.start] = whole_piece[
                piece.rows.start - theirs.start : piece.rows.stop - theirs.start
            ]
        return found if mine else None

    def piece(self, whole: Whole, tensor: str, writer: int, dtype: torch.dtype) -> torch.Tensor:
        """What one worker has written of a tensor, flat. Raises `DamagedShard`, and `StoreUnavailable`."""
        _, begin, end, sha256 = whole.writers[writer]["tensors"][tensor]
        name = f"{writer}-of-{len(whole.writers)}.safetensors"
        data = self.store.read_range(f"{self._folder(whole.step)}/{name}", begin, end)
        if data is None or hashlib.sha256(data).hexdigest() != sha256:
            raise DamagedShard(f"{tensor} in {name} of step {whole.step} is damaged or missing")
        return torch.frombuffer(bytearray(data), dtype=dtype)

    def _folder(self, step: int) -> str:
        return f"{self.root}/{step:012d}"

    def read(self, step: int) -> Whole | None:
        """The checkpoint of a step; None unless all workers of one group have written their part of it."""
        folder = self._folder(step)
        raw = (self.store.get(f"{folder}/{name}") for name in self.store.children(folder) if name.endswith(".json"))
        groups: dict[str, dict[int, dict[str, Any]]] = {}
        for about in filter(None, (read_manifest(one or b"") for one in raw)):
            if "group" in about:
                groups.setdefault(about["group"], {})[about["rank"]] = about
        for writers in groups.values():
            if len(writers) == next(iter(writers.values()))["world"]:
                return Whole(step, [writers[rank] for rank in sorted(writers)])
        return None

    def _remove_outdated(self) -> None:
        """Remove what is older than the newest `KEPT` that are complete."""
        whole = [step for step in self.steps() if self.read(step)]
        for step in self.steps():
            if len(whole) >= KEPT and step < whole[KEPT - 1]:
                self.store.remove(self._folder(step))


def places(file: Path) -> dict[str, tuple[int, int, str]]:
    """Where each tensor of a safetensors file begins and ends, in bytes of the file, and the SHA-256 of what is between.

    The file begins with the length of a header in JSON, in eight bytes, and the header counts from its own end.
    """
    found: dict[str, tuple[int, int, str]] = {}
    with file.open("rb") as opened:
        first = 8 + int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(first - 8))
        for name, about in header.items():
            if name != "__metadata__":
                begin, end = about["data_offsets"]
                opened.seek(first + begin)
                found[name] = (first + begin, first + end, hashlib.sha256(opened.read(end - begin)).hexdigest())
    return found
