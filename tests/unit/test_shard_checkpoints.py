"""What some workers wrote in parts, any number of workers reads, or it does not count."""

from pathlib import Path

import pytest
import torch

from cluster.store.objects import Store
from jobs.training.sharding.slices import rows_of
from jobs.training.state.checkpoints import KEPT
from jobs.training.state.shard_checkpoints import DamagedShard, Shard, ShardCheckpoints, Whole

SHAPES = {"parameters/wide": (10, 3), "exp_avg/short": (2, 5), "parameters/flat": (7,)}


def whole(step: int) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=made) for name, shape in SHAPES.items()}


def shard(step: int, rank: int, world: int, group: str = "a") -> Shard:
    mine = {name: rows_of(len(one), rank, world) for name, one in whole(step).items()}
    tensors = {name: one[mine[name].start : mine[name].stop].clone() for name, one in whole(step).items()}
    return Shard(step, {"tokens": step * 10}, tensors, {name: shape[0] for name, shape in SHAPES.items()}, rank, world, group)


def written(tmp_path: Path, *steps: int, world: int = 3) -> ShardCheckpoints:
    made = ShardCheckpoints(Store(tmp_path.as_uri()), "run")
    for step in steps:
        for rank in reversed(range(world)):
            made.commit(shard(step, rank, world))
    return made


def read(made: ShardCheckpoints, found: Whole, world: int) -> dict[str, torch.Tensor]:
    parts = {
        name: [made.slice_of(found, name, rank, world, torch.empty(0, *shape[1:])) for rank in range(world)]
        for name, shape in SHAPES.items()
    }
    return {name: torch.cat([part for part in some if part is not None]) for name, some in parts.items()}


@pytest.mark.parametrize("before", [1, 2, 3, 5])
@pytest.mark.parametrize("after", [1, 2, 3, 5])
def test_what_some_wrote_any_number_reads(tmp_path: Path, before: int, after: int) -> None:
    made = written(tmp_path, 4, world=before)
    newest = next(made.complete())
    assert newest.step == 4 and newest.meta == {"tokens": 40}
    found = read(made, newest, after)
    assert all(torch.equal(found[name], one) for name, one in whole(4).items())


def test_one_of_which_a_part_is_missing_does_not_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = written(tmp_path, 1, 2)
    made.commit(shard(3, 0, 3))
    made.commit(shard(3, 2, 3))
    made.commit(shard(3, 1, 3, group="b"))  # another group came as far, and was another
    assert [one.step for one in made.complete()] == [2, 1]
    assert "the checkpoint of step 3 is damaged or incomplete" in capsys.readouterr().out
    made.commit(shard(3, 1, 3))
    assert next(made.complete()).step == 3


def test_a_group_that_comes_as_far_again_replaces_what_was_there(tmp_path: Path) -> None:
    made = written(tmp_path, 1)
    made.commit(shard(1, 0, 2, group="b"))
    made.commit(shard(1, 1, 2, group="b"))
    assert all(torch.equal(read(made, one, 2)["parameters/wide"], whole(1)["parameters/wide"]) for one in made.complete())


def test_damage_is_named(tmp_path: Path) -> None:
    made = written(tmp_path, 2)
    file = tmp_path / f"runs/run/{2:012d}/1-of-3.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    with pytest.raises(DamagedShard, match=r"in 1-of-3.safetensors of step 2 is damaged or missing"):
        read(made, next(made.complete()), 2)
    file.unlink()
    with pytest.raises(DamagedShard, match="1-of-3"):
        read(made, next(made.complete()), 2)


def test_few_are_kept(tmp_path: Path) -> None:
    made = written(tmp_path, 1, 2, 3, 4)
    made.commit(shard(5, 1, 3))
    assert made.steps() == [5, 4, 3] and KEPT == 2
