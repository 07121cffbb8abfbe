"""What a job has written while everything dies, or the disk does not take it, or what is there is damaged: T2, T3, T7 and T9.

Processes, store and engine are real; the disk alone is made to stand still, or to be full (`tests.unwilling.Disturbed`).
"""

import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from benchmarks.job import made as made_by
from cluster import client
from cluster.capacity.handover import parse
from cluster.metrics import CHECKPOINTS
from cluster.pool.local import metrics_port
from cluster.types import VersionId
from jobs.training.state.checkpoints import FILE, MANIFEST, Checkpoints
from tests.cluster.test_slots import TIDE, Job, Record, finetune, processes, record, running
from tests.conftest import Running
from tests.unwilling import FULL, STALLED, STALLING
from tests.waiting import when

__all__ = ["record"]
pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]
EPOCHS = 400
"""As many as end within a minute."""


@pytest.fixture(autouse=True)
def disk(pool: Running) -> Iterator[None]:
    """Well again after each test."""
    yield
    for word in (STALLED, FULL, STALLING):
        (pool.config.home / word).unlink(missing_ok=True)


def disturbed(epochs: int = 100_000) -> list[str]:
    return ["tests.unwilling", "disturbed", "--epochs", str(epochs)]


def checkpoints(pool: Running, job: Job) -> Checkpoints:
    return Checkpoints(pool.registry.store, job.name)


def folder(pool: Running, job: Job, step: int) -> Path:
    root = pool.registry.store.local_root
    assert root
    return root / f"runs/{job.name}/{step:012d}"


def committed(pool: Running, job: Job) -> list[int]:
    """Steps with a manifest, the newest last."""
    return [step for step in sorted(checkpoints(pool, job).steps()) if (folder(pool, job, step) / MANIFEST).exists()]


def stalled(pool: Running, job: Job) -> tuple[int, int, int]:
    """Wait until a checkpoint is half written. The process that writes it, the step, and the newest that was committed before."""
    when(lambda: len(committed(pool, job)) >= 2, 60)
    (pool.config.home / STALLED).touch()
    when((pool.config.home / STALLING).exists, 30)
    time.sleep(0.2)
    newest, half = committed(pool, job)[-1], max(checkpoints(pool, job).steps())
    assert half > newest
    assert 0 < (folder(pool, job, half) / FILE).stat().st_size < (folder(pool, job, newest) / FILE).stat().st_size
    return int((pool.config.home / STALLING).read_text()), half, newest


def kill(ended: list[psutil.Process]) -> None:
    for process in ended:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    assert not psutil.wait_procs(ended, 10)[1]


def members(pool: Running) -> list[psutil.Process]:
    return processes(pool, "ray::Worker")


def everybody(pool: Running, job: Job) -> list[psutil.Process]:
    return [psutil.Process(job.process.pid), *members(pool)]


def ends_well(pool: Running, job: Job) -> None:
    assert job.process.wait(300) == 0, job.text[-2000:]
    made = made_by(job.text)
    assert pool.registry.manifest(VersionId.parse(made["version"])).lineage.metrics["eval_loss"] < 1


def test_a_missing_or_damaged_data_file_ends_a_job_before_it_has_a_slot(pool: Running, tmp_path: Path, record: Record) -> None:
    """T7"""
    bad = tmp_path / "bad.jsonl"
    bad.write_text("".join(Path(TIDE).read_text().splitlines(keepends=True)[:2]) + '{"messages": [\n')
    record.snapshots |= {
        snapshot.at_s: snapshot for snapshot in parse(client.of(pool.config).slots()["snapshots"])
    }  # nothing new shall come
    known = {allocation.job for snapshot in record.all() for allocation in snapshot.jobs}
    for data, words in ((bad, f"{bad}, line 3: not JSON"), (tmp_path / "none.jsonl", f"{tmp_path}/none.jsonl cannot be read")):
        began_s = time.monotonic()
        job = Job(pool, tmp_path, "jobs.finetune", "--data", str(data), "--base", "seedling@1")
        while job.process.poll() is None:
            assert client.of(pool.config).status()["slots"]["free"] == 2
        assert job.process.returncode == 2, job.text
        assert f"error: {words}" in job.text and not re.search("^run |Traceback", job.text, re.MULTILINE)
        print(f"{data.name}: ended {time.monotonic() - began_s:.1f} s after it was begun")
    record.look()
    assert {allocation.job for snapshot in record.all() for allocation in snapshot.jobs} <= known


def test_workers_and_driver_killed_while_a_checkpoint_is_written_leave_the_one_before(
    pool: Running, tmp_path: Path, record: Record
) -> None:
    """T2: everybody at once; `--resume` goes on from the last that was committed."""
    with running(pool, tmp_path, *disturbed(EPOCHS), checkpoint_s=1) as job:
        _, half, newest = stalled(pool, job)
        kill(everybody(pool, job))
        reached = job.steps
    (pool.config.home / STALLED).unlink()
    again = Job(pool, tmp_path, *finetune("--resume", job.name, epochs=EPOCHS))
    ends_well(pool, again)
    print(f"killed at step {reached}, half written {half}, resumed from the checkpoint of step {newest}")
    assert f"going on from the checkpoint of step {newest}\n" in again.text
    assert f"the checkpoint of step {half} is damaged or incomplete" in again.text
    assert int(re.findall(r"from step (\d+)", again.text)[0]) == newest


def test_all_workers_killed_while_a_checkpoint_is_written_are_replaced_from_the_one_before(
    pool: Running, tmp_path: Path, record: Record
) -> None:
    """T2: the driver lives; nobody has anything in memory, and the run goes on by itself from the last that was committed."""
    with running(pool, tmp_path, *disturbed(), checkpoint_s=1) as job:
        _, half, newest = stalled(pool, job)
        then = len(job.text)
        kill(members(pool))
        (pool.config.home / STALLED).unlink()
        print(f"training again {when(lambda: 'training with' in job.text[then:], 90):.1f} s after all workers were killed")
        assert f"going on from the checkpoint of step {newest}\n" in job.text[then:]
        assert int(re.findall(r"from step (\d+)", job.text[then:])[0]) == newest
        when(lambda: committed(pool, job)[-1] > half, 60)
        when(lambda: job.trains(2), 60)


def test_a_writer_killed_while_it_writes_a_checkpoint_costs_that_checkpoint_alone(
    pool: Running, tmp_path: Path, record: Record
) -> None:
    """T2: the worker that writes; the other has everything in memory, and writes the next."""
    with running(pool, tmp_path, *disturbed(), checkpoint_s=1) as job:
        writer, half, newest = stalled(pool, job)
        then = len(job.text)
        kill([psutil.Process(writer)])
        (pool.config.home / STALLED).unlink()
        print(f"one goes on {when(lambda: 'training with 1 workers' in job.text[then:], 30):.1f} s after the writer was killed")
        began = int(re.findall(r"training with 1 workers from step (\d+)", job.text[then:])[0])
        assert began >= half and "going on from the checkpoint" not in job.text[then:]
        print(f"next checkpoint {when(lambda: committed(pool, job)[-1] > began, 60):.1f} s later")
        kept = checkpoints(pool, job).newest()
        assert kept and kept.step > half > newest
        when(lambda: job.trains(2), 60)


def alarmed(pool: Running, job: Job) -> bool:
    """Whether Prometheus would hear of a checkpoint that could not be written."""
    told = httpx.get(f"http://{pool.config.pool.host}:{metrics_port(pool.config)}/metrics").text
    return any(CHECKPOINTS.name in line and job.name in line and 'outcome="failed"' in line for line in told.splitlines())


def test_a_full_disk_costs_checkpoints_and_no_step(pool: Running, tmp_path: Path, record: Record) -> None:
    """T3"""
    with running(pool, tmp_path, *disturbed(), checkpoint_s=1) as job:
        when(lambda: len(committed(pool, job)) >= 2, 60)
        (pool.config.home / FULL).touch()
        before, then = job.steps, len(job.text)
        when(lambda: job.text[then:].count("could not be written, the one before stays") >= 3, 60)
        assert "No space left on device" in job.text[then:] and job.goes_on()
        kept = checkpoints(pool, job).newest()
        assert kept and kept.step == committed(pool, job)[-1] and job.trains(2)
        when(lambda: alarmed(pool, job), 30)
        reached = job.steps
        (pool.config.home / FULL).unlink()
        took_s = when(lambda: committed(pool, job)[-1] > reached, 60)
        print(f"{reached - before} steps on a full disk, the next checkpoint {took_s:.1f} s after there was room again")
        newest = checkpoints(pool, job).newest()
        assert newest and newest.step > reached
        assert job.times("lost") == 0 and job.times("training with 2 workers") == 1


def test_a_damaged_newest_checkpoint_is_passed_over_and_named(pool: Running, tmp_path: Path, record: Record) -> None:
    """T9"""
    with running(pool, tmp_path, *finetune(epochs=EPOCHS), checkpoint_s=1) as job:
        when(lambda: len(committed(pool, job)) >= 2, 60)
        kill(everybody(pool, job))
    *_, before, newest = committed(pool, job)
    file = folder(pool, job, newest) / FILE
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    again = Job(pool, tmp_path, *finetune("--resume", job.name, epochs=EPOCHS))
    ends_well(pool, again)
    print(f"step {newest} was damaged, resumed from step {before}")
    assert f"the checkpoint of step {newest} is damaged or incomplete; taking the one before" in again.text
    assert int(re.findall(r"from step (\d+)", again.text)[0]) == before
