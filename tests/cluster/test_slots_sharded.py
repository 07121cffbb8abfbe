"""What `tests/cluster/test_slots.py` and `test_slots_checkpoints.py` show of a run, shown of one whose workers have slices: T1 to T6, T8, T9 and H0.

Nobody has the whole state, so whoever leaves writes its slices first, and a worker that dies costs the steps since the newest complete
checkpoint. T7, a bad data file, is over before anybody has a slice.
"""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from benchmarks import load
from benchmarks.job import made as made_by
from cluster import client
from cluster.types import VersionId
from jobs.training.state.shard_checkpoints import ShardCheckpoints
from tests.cluster.test_slots import (
    Job,
    Record,
    carried_out,
    finetune,
    record,
    replicas,
    running,
    scaled,
    scaling,
    storm,
    works,
)
from tests.cluster.test_slots_checkpoints import disk, everybody, folder, kill, members
from tests.conftest import Running
from tests.unwilling import FULL, STALLED, STALLING
from tests.waiting import when

__all__ = ["disk", "record"]
pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]
SHARDED = ("--recipe", "full", "--set", "sharding=fsdp")
EPOCHS = 400


def sharded(*line: str, **epochs: int) -> list[str]:
    return finetune(*SHARDED, *line, **epochs)


def disturbed() -> list[str]:
    return ["tests.unwilling", "disturbed", "--epochs", "100000", *SHARDED]


def kept(pool: Running, job: Job) -> list[int]:
    """Steps with a complete checkpoint, the newest last."""
    return sorted(whole.step for whole in ShardCheckpoints(pool.registry.store, job.name).complete())


def moves(job: Job) -> tuple[list[int], list[int]]:
    """The steps after which groups stopped, and those from which groups began."""
    stopped, began = (
        re.findall(r"stopped after step (\d+)", job.text),
        re.findall(r"training with \d workers from step (\d+)", job.text),
    )
    return [*map(int, stopped)], [*map(int, began)]


def went_on(job: Job, then: int, workers: int) -> int:
    """The step from which a group of so many ``workers`` began, after the byte ``then`` of the log."""
    when(lambda: f"training with {workers} workers" in job.text[then:], 60)
    return int(re.findall(rf"training with {workers} workers from step (\d+)", job.text[then:])[0])


def ends_well(pool: Running, job: Job) -> None:
    assert job.process.wait(300) == 0, job.text[-2000:]
    made = made_by(job.text)
    assert pool.registry.manifest(VersionId.parse(made["version"])).lineage.metrics["eval_loss"] < 1


def test_a_planned_yield_and_the_way_back(pool: Running, tmp_path: Path, record: Record) -> None:
    """H0, with the bars of a run that is not sharded."""
    with running(pool, tmp_path, *sharded(), checkpoint_s=3600) as job:
        workers = {process.pid for process in members(pool)}
        when(lambda: bool(carried_out(record, job, "grow")), 10)
        with scaling(pool, 2):
            when(lambda: job.trains(1), 60)
            assert job.goes_on() and sorted(works(process) for process in members(pool)) == [False, True]
            when(lambda: replicas(pool) == 2, 120)
        scaled(pool, 1)
        when(lambda: job.trains(2), 120)
        assert {process.pid for process in members(pool)} == workers
        [gave] = carried_out(record, job, "yield")
        when(lambda: carried_out(record, job, "grow")[-1].at_s > gave.at_s, 5)
        took = carried_out(record, job, "grow")[-1]
        stopped, began = moves(job)
        print(f"slot free {gave.slots_free_s:.2f} s, training again {gave.training_s:.2f} s, whole again {took.training_s:.2f} s")
    assert stopped and stopped == began[1:]  # no step is lost, and none done twice
    assert gave.slots_free_s is not None and gave.slots_free_s <= 3
    assert gave.training_s is not None and gave.training_s <= 8
    assert took.training_s is not None and took.training_s <= 10


def test_a_killed_worker_costs_the_steps_since_the_newest_checkpoint(pool: Running, tmp_path: Path, record: Record) -> None:
    """T1: the other's slices alone are no state."""
    with running(pool, tmp_path, *sharded(), checkpoint_s=2, report_s=0) as job:
        when(lambda: len(kept(pool, job)) >= 2, 60)
        newest, then = kept(pool, job)[-1], len(job.text)
        os.kill(members(pool)[-1].pid, signal.SIGKILL)
        print(f"one goes on after {when(lambda: 'training with 1 workers' in job.text[then:], 30):.1f} s", end=" ")
        began = went_on(job, then, 1)
        reached = max(
            int(step) for step in re.findall(r"step=(\d+)/", job.text[: job.text.index("training with 1 workers", then)])
        )
        print(f"from step {began} of {reached}; two train again {when(lambda: job.trains(2), 60):.1f} s later")
        assert newest <= began <= reached
        assert job.goes_on()


def test_a_worker_that_hangs_is_found_and_replaced(pool: Running, tmp_path: Path, record: Record) -> None:
    """T5"""
    with running(pool, tmp_path, *sharded(), checkpoint_s=2) as job:
        when(lambda: bool(kept(pool, job)), 60)
        newest, then = kept(pool, job)[-1], len(job.text)
        os.kill(members(pool)[-1].pid, signal.SIGSTOP)
        print(f"found after {when(lambda: 'no answer for' in job.text, 60):.1f} s", end=", ")
        print(f"two train again {when(lambda: 'training with 2 workers' in job.text[then:], 60):.1f} s later")
        assert went_on(job, then, 2) >= newest and job.goes_on()


def test_a_killed_driver_frees_its_slots_and_the_run_can_be_resumed(pool: Running, tmp_path: Path, record: Record) -> None:
    """T4"""
    with running(pool, tmp_path, *sharded(epochs=EPOCHS), checkpoint_s=2) as job:
        when(lambda: len(kept(pool, job)) >= 2, 60)
        job.process.kill()
        print(f"slots free after {when(lambda: client.of(pool.config).status()['slots']['free'] == 2, 15):.1f} s")
        reached, newest = job.steps, kept(pool, job)[-1]
    again = Job(pool, tmp_path, *sharded("--resume", job.name, epochs=EPOCHS))
    ends_well(pool, again)
    print(f"killed at step {reached}, resumed from step {moves(again)[1][0]}")
    assert moves(again)[1][0] == newest > 0
    assert pool.registry.store.children(f"runs/{job.name}") == []


def test_a_driver_that_is_asked_to_end_keeps_what_was_learnt(pool: Running, tmp_path: Path, record: Record) -> None:
    """T4 without a loss."""
    with running(pool, tmp_path, *sharded(), checkpoint_s=3600, report_s=0) as job:
        job.process.terminate()
        job.process.wait(30)
        assert kept(pool, job)[-1] >= job.steps > 0 and f"--resume {job.name}" in job.text


def test_a_job_without_memory_fails_in_words_and_serving_goes_on(pool: Running, tmp_path: Path, record: Record) -> None:
    """T6"""
    with load.background(f"{pool.url}/v1", "seedling", streams=2, pause_s=0.2) as samples:
        job = Job(pool, tmp_path, "tests.unwilling", "greedy", *SHARDED)
        assert job.process.wait(180) == 1, job.text[-2000:]
    assert "error: The training failed" in job.text and "alloc" in job.text
    assert samples and not [sample.error for sample in samples if sample.error]


def test_a_storm_of_changes_costs_no_step(pool: Running, tmp_path: Path, record: Record) -> None:
    """T8: serving wants two, then one, every five seconds."""
    with running(pool, tmp_path, *sharded(), checkpoint_s=3600) as job:
        storm(pool, job)


def test_everybody_killed_while_a_checkpoint_is_written_leaves_the_one_before(
    pool: Running, tmp_path: Path, record: Record
) -> None:
    """T2: `--resume` goes on from the last that is complete."""
    with running(pool, tmp_path, *disturbed(), checkpoint_s=1) as job:
        newest, half = stalled(pool, job)
        kill(everybody(pool, job))
    (pool.config.home / STALLED).unlink()
    then_s = time.monotonic()
    again = Job(pool, tmp_path, *sharded("--resume", job.name, epochs=100_000))
    try:
        when(lambda: bool(moves(again)[1]), 120)
        print(f"half written {half}, resumed from step {newest} after {time.monotonic() - then_s:.1f} s")
        assert moves(again)[1][0] == newest
        assert f"the checkpoint of step {half} is damaged or incomplete; taking the one before" in again.text
    finally:
        again.process.terminate()
        again.process.wait(30)


def test_all_workers_killed_while_a_checkpoint_is_written_are_replaced_from_the_one_before(
    pool: Running, tmp_path: Path, record: Record
) -> None:
    """T2: the driver lives."""
    with running(pool, tmp_path, *disturbed(), checkpoint_s=1) as job:
        newest, half = stalled(pool, job)
        then = len(job.text)
        kill(members(pool))
        (pool.config.home / STALLED).unlink()
        print(f"training again {when(lambda: 'training with' in job.text[then:], 90):.1f} s after all workers were killed")
        assert moves(job)[1][-1] == newest
        when(lambda: kept(pool, job)[-1] > half and job.trains(2), 90)


def stalled(pool: Running, job: Job) -> tuple[int, int]:
    """Wait until a checkpoint is half written. The newest step that is complete, and that of the half."""
    when(lambda: len(kept(pool, job)) >= 2, 60)
    (pool.config.home / STALLED).touch()
    when((pool.config.home / STALLING).exists, 30)
    time.sleep(0.5)
    newest, half = kept(pool, job)[-1], max(ShardCheckpoints(pool.registry.store, job.name).steps())
    assert half > newest
    return newest, half


def test_a_full_disk_costs_checkpoints_and_no_step(pool: Running, tmp_path: Path, record: Record) -> None:
    """T3"""
    with running(pool, tmp_path, *disturbed(), checkpoint_s=1) as job:
        when(lambda: len(kept(pool, job)) >= 2, 60)
        (pool.config.home / FULL).touch()
        before, then = job.steps, len(job.text)
        when(lambda: job.text[then:].count("could not be written, the one before stays") >= 3, 60)
        assert "No space left on device" in job.text[then:] and job.goes_on()
        assert kept(pool, job) and job.trains(2)
        reached = job.steps
        (pool.config.home / FULL).unlink()
        took_s = when(lambda: kept(pool, job)[-1] > reached, 60)
        print(f"{reached - before} steps on a full disk, the next checkpoint {took_s:.1f} s after there was room again")
        assert job.times("lost") == 0 and job.times("training with 2 workers") == 1


def test_a_damaged_piece_of_the_newest_checkpoint_is_named_and_the_one_before_is_taken(
    pool: Running, tmp_path: Path, record: Record
) -> None:
    """T9"""
    with running(pool, tmp_path, *sharded(epochs=EPOCHS), checkpoint_s=1) as job:
        when(lambda: len(kept(pool, job)) >= 2, 60)
        kill(everybody(pool, job))
    *_, before, newest = kept(pool, job)
    file = folder(pool, job, newest) / "1-of-2.safetensors"
    data = bytearray(file.read_bytes())
    data[-len(data) // 2] ^= 1
    file.write_bytes(data)
    again = Job(pool, tmp_path, *sharded("--resume", job.name, epochs=EPOCHS))
    ends_well(pool, again)
    print(f"step {newest} was damaged, resumed from step {before}")
    assert re.search(rf"\S+ in 1-of-2.safetensors of step {newest} is damaged or missing", again.text)
    assert moves(again)[1][0] == before
