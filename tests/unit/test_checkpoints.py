"""A checkpoint is whole or does not count, whatever ends its writing."""

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cluster.errors import BadRequest, StoreUnavailable
from cluster.store.objects import Store
from jobs.training import runs
from jobs.training.progress import Committed
from jobs.training.state.checkpoints import FILE, KEPT, MANIFEST, Checkpoints, Snapshot, Writer

ROOT = Path(__file__).parents[2]
WRITE = """
import sys, torch
from cluster.store.objects import Store
from jobs.training.state.checkpoints import Checkpoints, Snapshot
checkpoints = Checkpoints(Store(sys.argv[1]), "run")
for step in range(int(sys.argv[2]), 1_000_000):
    checkpoints.commit(Snapshot(step, {"step": step}, {"a": torch.full((500_000,), float(step))}))
    print(step, flush=True)
"""


def snapshot(step: int) -> Snapshot:
    return Snapshot(step, {"tokens": step * 10}, {"a": torch.full((100,), float(step))})


def checkpoints(tmp_path: Path, steps: range = range(0)) -> Checkpoints:
    made = Checkpoints(Store(tmp_path.as_uri()), "run")
    for step in steps:
        made.commit(snapshot(step))
    return made


def test_what_was_written_last_is_read_and_few_are_kept(tmp_path: Path) -> None:
    made = checkpoints(tmp_path, range(1, 6))
    newest = made.newest()
    assert newest and newest.step == 5 and newest.meta == {"tokens": 50} and newest.tensors["a"][0] == 5
    assert made.steps() == [4, 5] and len(made.steps()) == KEPT


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (FILE, lambda data: data[:-1] + bytes([data[-1] ^ 1])),
        (MANIFEST, lambda data: data.replace(b'"tokens": 20', b'"tokens": 21')),
        (MANIFEST, lambda data: data.replace(b'"step": 2', b'"step": 3')),
        (MANIFEST, lambda data: data.replace(b'"seal"', b'"sea1"')),
        (MANIFEST, lambda data: b"[]"),
        (MANIFEST, lambda data: data[:9]),
    ],
)
def test_a_damaged_one_is_passed_over_and_named(
    name: str, damage: Callable[[bytes], bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """T9"""
    made = checkpoints(tmp_path, range(1, 3))
    file = tmp_path / f"runs/run/{2:012d}/{name}"
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert file.read_bytes() != whole
    newest = made.newest()
    assert newest and newest.step == 1
    assert "the checkpoint of step 2 is damaged" in capsys.readouterr().out
    made.commit(snapshot(3))
    again = made.newest()
    assert again and again.step == 3


def test_one_that_was_killed_while_it_wrote_leaves_the_one_before(tmp_path: Path) -> None:
    """T2: at moments that nobody chose."""
    written, first = -1, 0
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITE, tmp_path.as_uri(), str(first)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout
        process.stdout.readline()
        time.sleep(random.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        written = max([written, *map(int, process.stdout.read().split())])
        newest = Checkpoints(Store(tmp_path.as_uri()), "run").newest()
        assert newest and newest.step >= written and newest.tensors["a"][0] == newest.step == newest.meta["step"]
        first = newest.step + 1


class Full(Store):
    """A store whose disk is full for a while."""

    full = True

    def upload(self, path: str, file: Path) -> None:
        if self.full:
            (Path(self.url.removeprefix("file://")) / path).parent.mkdir(parents=True, exist_ok=True)
            (Path(self.url.removeprefix("file://")) / path).write_bytes(file.read_bytes()[:10])
            raise StoreUnavailable("No space left on device.")
        super().upload(path, file)


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """T3"""
    checkpoints(tmp_path, range(1, 2))
    store = Full(tmp_path.as_uri())
    told: list[Committed | None] = []
    kept = Checkpoints(store, "run")
    writer = Writer(kept, told.append)
    writer.give(snapshot(2))
    assert writer.flush().step == -1 and told == [None]
    assert "could not be written, the one before stays" in capsys.readouterr().out
    newest = kept.newest()
    assert newest and newest.step == 1
    store.full = False
    writer.give(snapshot(3))
    assert writer.flush() == told[1] == writer.newest
    assert writer.newest.step == 3 and writer.newest.size_bytes == sum(t.nbytes for t in snapshot(3).tensors.values()) > 0


def test_a_run_is_resumed_with_what_it_was_begun_with_and_with_nothing_else(tmp_path: Path) -> None:
    store = Store(tmp_path.as_uri())
    inputs = {"base": "m@1", "recipe": {"epochs": 3.0}, "data": "sha"}
    name = runs.begin(store, "finetune-0123456789ab", inputs)
    assert runs.resume(store, name, dict(inputs)) == name
    since = {"compile": False, "sharding": "none", "distillation": None}  # keys that a later release has added
    assert runs.resume(store, name, {**inputs, "recipe": {**inputs["recipe"], **since}}) == name
    with pytest.raises(BadRequest, match="another recipe"):
        runs.resume(store, name, {**inputs, "recipe": {**inputs["recipe"], "compile": True}})
    with pytest.raises(BadRequest, match="another data, recipe"):
        runs.resume(store, name, {**inputs, "recipe": {"epochs": 4.0}, "data": "other"})
    with pytest.raises(BadRequest, match="no run finetune-0"):
        runs.resume(store, "finetune-0", inputs)
    with pytest.raises(BadRequest):
        runs.resume(store, "../versions", inputs)
