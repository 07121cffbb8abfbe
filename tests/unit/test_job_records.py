"""Jobs as records: what the store keeps of one, and what a reader makes of it."""

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import JobNotFound
from cluster.jobspec import new_id
from cluster.store import jobs as records
from cluster.store.jobs import (
    JobEvent,
    JobEvents,
    JobProgress,
    JobResult,
    JobSnapshot,
    JobSpec,
    JobStatus,
    JobStore,
    document,
    status,
)
from cluster.store.objects import Store
from cluster.store.readers import READERS
from tests.stores import Together

SPEC = JobSpec(id="finetune-0123456789ab", verb="finetune", options={"data": "x"}, owner="ann", created_s=1.0)
RUNNING = JobEvents(n=1, snapshot=JobSnapshot(at_s=2.0, progress=JobProgress(step=3, steps=9), run=SPEC.id))
WAITING = JobEvents(n=2, snapshot=JobSnapshot(at_s=3.0, waiting="it needs 2 slots"))
DONE = JobResult(status=JobStatus.SUCCEEDED, ended_s=9.0, made={"version": "a@2"}, last=RUNNING.snapshot)


@pytest.fixture
def jobs(tmp_path: Path) -> JobStore:
    return JobStore(Store(tmp_path.as_uri()))


def again(jobs: JobStore) -> JobStore:
    """Another process on the same store."""
    return JobStore(Store(jobs.store.url))


@pytest.mark.parametrize(
    ("newest", "result", "alive", "expected"),
    [
        (None, None, True, "queued"),
        (None, None, None, "queued"),
        (RUNNING, None, True, "running"),
        (RUNNING, None, None, "running"),
        (WAITING, None, True, "waiting"),
        (RUNNING, None, False, "lost"),
        (WAITING, DONE, False, "succeeded"),
        (None, DONE, None, "succeeded"),
    ],
)
def test_a_jobs_status_follows_from_its_record(newest: Any, result: Any, alive: bool | None, expected: str) -> None:
    assert status(SPEC, newest, result, alive) == expected


@given(st.sampled_from([None, RUNNING, WAITING]), st.sampled_from(list(JobStatus)), st.sampled_from([True, False, None]))
def test_a_result_is_final_whatever_else_is_known(newest: Any, how: JobStatus, alive: bool | None) -> None:
    assert status(SPEC, newest, JobResult(status=how, ended_s=1), alive) == how


def test_a_record_is_what_was_written(jobs: JobStore) -> None:
    jobs.create(SPEC)
    jobs.append(SPEC.id, RUNNING)
    assert jobs.append(SPEC.id, WAITING) == 2
    read = again(jobs).record(SPEC.id)
    assert (read.spec, read.newest, read.result, read.damage) == (SPEC, WAITING, None, "")
    jobs.finish(SPEC.id, DONE)
    shown = document(again(jobs).record(SPEC.id), False)
    assert shown["status"] == "succeeded" and shown["result"]["made"] == {"version": "a@2"}
    assert shown["progress"]["step"] == 3, "a result says where the job was at its end"


def test_whoever_ends_a_job_first_is_right(jobs: JobStore) -> None:
    lost = JobResult(status=JobStatus.LOST, ended_s=5.0)
    assert jobs.finish(SPEC.id, lost) == lost
    assert again(jobs).finish(SPEC.id, DONE) == lost
    assert again(jobs).create(SPEC) == SPEC
    assert again(jobs).create(SPEC.model_copy(update={"owner": "bob"})).owner == "ann"


def test_a_batch_whose_answer_was_lost_is_not_written_twice(jobs: JobStore) -> None:
    assert jobs.append(SPEC.id, RUNNING) == 1
    assert jobs.append(SPEC.id, RUNNING) == 1, "the same once more"
    assert jobs.append(SPEC.id, RUNNING.model_copy(update={"events": (JobEvent(at_s=1, kind="message"),)})) == 2
    assert len(jobs.store.children(f"jobs/{SPEC.id}/events")) == 2


def test_the_newest_events_are_read_and_no_more(jobs: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that runs for a week has tens of thousands of objects."""
    for n in range(1, 31):
        events = tuple(JobEvent(at_s=n, kind="message", words=f"{n}.{part}") for part in range(n % 3))
        jobs.append(SPEC.id, RUNNING.model_copy(update={"n": n, "events": events}))
    path = jobs.store.local_root
    assert path
    (path / f"jobs/{SPEC.id}/events/00000028.json").write_text("{")
    all_of_them = [f"{n}.{part}" for n in range(1, 31) if n != 28 for part in range(n % 3)]

    def words(limit: int) -> list[str]:
        return [event.words for event in again(jobs).events(SPEC.id, limit)]

    assert words(1000) == all_of_them
    for limit in range(8):
        assert words(limit) == all_of_them[len(all_of_them) - limit :]
    monkeypatch.setattr(records, "LOOKED_AT", 5)
    assert words(1000) == ["26.0", "26.1", "29.0", "29.1"]


def test_the_events_of_a_job_are_read_many_at_once_and_no_more_of_them_than_asked_for(jobs: JobStore) -> None:
    """They were read one after another, each at a bucket's pace, and a thousand of them for one page."""
    for n in range(1, 5 * READERS + 1):
        event = JobEvent(at_s=n, kind="message", words=str(n))
        jobs.append(SPEC.id, RUNNING.model_copy(update={"n": n, "events": (event,)}))
    together = Together(jobs.store.url, READERS)
    assert [event.words for event in JobStore(together).events(SPEC.id, READERS + 1)] == [
        str(n) for n in range(4 * READERS, 5 * READERS + 1)
    ]
    assert together.gets == 2 * READERS, "the newest first, and whole rounds of them"


def test_the_newest_events_cost_one_object_however_long_the_job_ran(jobs: JobStore, monkeypatch: Any) -> None:
    for n in range(1, 40):
        jobs.append(SPEC.id, RUNNING.model_copy(update={"n": n}))
    fresh, read = again(jobs), []
    get = fresh.store.get
    monkeypatch.setattr(fresh.store, "get", lambda path: read.append(path) or get(path))
    newest = fresh.newest(SPEC.id)
    assert newest and newest.n == 39
    jobs.append(SPEC.id, RUNNING.model_copy(update={"n": 40}))
    monkeypatch.setattr(fresh.store, "children", lambda prefix: pytest.fail("listed again"))
    assert (newest := fresh.newest(SPEC.id)) and newest.n == 40
    assert [path[-13:] for path in read] == ["00000039.json", "00000040.json", "00000040.json", "00000041.json"]


def test_damaged_events_hide_neither_later_nor_earlier_ones(jobs: JobStore) -> None:
    """Where the newest was damaged, the job stood still for whoever looked at it, whatever its driver wrote afterwards."""
    jobs.create(SPEC)
    jobs.append(SPEC.id, RUNNING)
    for n in (2, 3):
        jobs.store.put_new(f"jobs/{SPEC.id}/events/{n:08d}.json", b"{")
    watching = again(jobs)
    assert watching.newest(SPEC.id) == RUNNING and watching.record(SPEC.id).damage == ""
    assert jobs.append(SPEC.id, WAITING) == 4
    jobs.store.put_new(f"jobs/{SPEC.id}/events/00000005.json", b"")
    for reader in (watching, again(jobs)):
        newest = reader.newest(SPEC.id)
        assert newest and (newest.n, newest.snapshot) == (4, WAITING.snapshot)


@given(st.sampled_from(["spec.json", "result.json", "events/00000001.json"]), st.binary(max_size=40))
def test_a_damaged_record_costs_its_own_job_only(tmp_path_factory: Any, name: str, raw: bytes) -> None:
    jobs = JobStore(Store(tmp_path_factory.mktemp("store").as_uri()))
    good, bad = new_id("finetune"), "finetune-000000000bad"
    for id in (good, bad):
        jobs.create(SPEC.model_copy(update={"id": id}))
        jobs.append(id, RUNNING)
    path = jobs.store.local_root
    assert path
    (path / f"jobs/{bad}/{name}").write_bytes(raw)
    fresh = again(jobs)
    assert set(fresh.ids()) == {good, bad}
    shown = {id: document(fresh.record(id), True) for id in fresh.ids()}
    assert shown[good]["status"] == "running"
    assert "damaged" in shown[bad]["message"] and f"jobs/{bad}/{name}" in shown[bad]["message"]


def test_a_record_of_a_newer_release_can_be_read(jobs: JobStore) -> None:
    jobs.store.put_new(f"jobs/{SPEC.id}/spec.json", SPEC.model_dump_json()[:-1].encode() + b', "colour": "blue"}')
    assert jobs.spec(SPEC.id) == SPEC


@pytest.mark.parametrize("id", ["nobody", "../versions", "", "a/b", "x" * 100])
def test_a_job_that_does_not_exist_is_not_found(jobs: JobStore, id: str) -> None:
    with pytest.raises(JobNotFound):
        jobs.record(id)


def test_a_job_that_its_driver_told_of_before_it_wrote_is_running(jobs: JobStore) -> None:
    jobs.create(SPEC)
    live = JobSnapshot(at_s=time.time(), message="loading")
    assert document(jobs.record(SPEC.id), True, live)["status"] == "running"
    assert document(jobs.record(SPEC.id), True)["status"] == "queued"
    waiting = live.model_copy(update={"waiting": "it needs 2 slots"})
    assert document(jobs.record(SPEC.id), True, waiting)["waiting"] == "it needs 2 slots"
