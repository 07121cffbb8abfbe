"""Every job of the store is looked at once an hour: who has not ended is watched, and what is kept in vain is deleted."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import Config
from cluster.control import job_census
from cluster.control.job_census import KEEP_EVENTS, KEEP_UPLOAD_S, Census, Facts, outdated
from cluster.control.jobs import JobService
from cluster.errors import PoolUnavailable, StoreUnavailable
from cluster.pool.submit import JobServer
from cluster.store import jobs as records
from cluster.store.jobs import JobEvent, JobEvents, JobResult, JobSnapshot, JobSpec, JobStatus, JobStore
from cluster.store.objects import Store
from cluster.store.registry import Registry
from tests.stores import Counting

DONE = JobResult(status=JobStatus.SUCCEEDED, ended_s=1, last=JobSnapshot(at_s=1, message="last words"))


@pytest.fixture
def jobs(tmp_path: Path) -> JobStore:
    return JobStore(Counting(tmp_path.as_uri()))


def job(jobs: JobStore, n: int, ended: bool = False, **options: Any) -> str:
    """The ``n``th job; a higher number is younger."""
    id = f"finetune-{n:08x}0000"
    jobs.create(JobSpec(id=id, verb="finetune", options=options, owner="ann", created_s=n))
    jobs.append(id, JobEvents(n=1, snapshot=JobSnapshot(at_s=1), events=(JobEvent(at_s=1, kind="message"),)))
    if ended:
        jobs.finish(id, DONE)
    return id


def upload(jobs: JobStore, name: str, age_s: float) -> str:
    jobs.store.put_new(f"uploads/{name}", b"lines")
    assert jobs.store.local_root
    at_s = time.time() - age_s
    os.utime(jobs.store.local_root / f"uploads/{name}", (at_s, at_s))
    return f"upload:{name}#lines.jsonl"


def whole_round(census: Census) -> None:
    census.due_s = float("-inf")
    while census.round is not None or census.due_s < time.monotonic():
        census.go_on()


names = st.sampled_from([f"{n:064x}" for n in range(6)])


@given(
    ended=st.integers(0, 2 * KEEP_EVENTS),
    uploads=st.dictionaries(names, st.floats(0, 3 * KEEP_UPLOAD_S)),
    named=st.none() | st.frozensets(names),
)
def test_only_what_is_old_and_needed_by_nobody_goes(ended: int, uploads: dict[str, float], named: frozenset[str] | None) -> None:
    newest_first = tuple(f"job-{n}" for n in range(ended))
    now_s = 3.0 * KEEP_UPLOAD_S
    gone = outdated(Facts(newest_first, uploads, named), now_s)
    assert set(gone.events).isdisjoint(newest_first[:KEEP_EVENTS]) and len(gone.events) == max(0, ended - KEEP_EVENTS)
    for name, at_s in uploads.items():
        needed = named is None or name in named or now_s - at_s <= KEEP_UPLOAD_S
        assert (name in gone.uploads) == (not needed)


def test_an_unfinished_job_is_watched_however_many_are_newer(jobs: JobStore, tmp_path: Path) -> None:
    """Of the jobs that a control before this one knew, only those among the newest 200 were found."""
    oldest = job(jobs, 1)
    for n in range(2, 300):
        job(jobs, n, ended=True)

    def away() -> JobServer:
        raise PoolUnavailable("Ray's job server does not answer.")

    service = JobService(Registry(Store(tmp_path.as_uri())), away)
    service.census.go_on()
    assert service.reaper.watched() == set(), "the newest come first"
    whole_round(service.census)
    assert service.reaper.watched() == {oldest}


def test_a_name_that_no_job_can_have_and_a_job_without_its_specification_stop_no_round(jobs: JobStore) -> None:
    jobs.store.put_new("jobs/.nfs0001/spec.json", b"{}")
    jobs.store.put_new("jobs/finetune-eeeeeeee0000/events/00000001.json", b"{}")
    running, watched = job(jobs, 1), list[str]()
    upload(jobs, "0a", KEEP_UPLOAD_S + 60)
    whole_round(Census(jobs, watched.extend))
    assert running in watched and ".nfs0001" not in watched
    assert jobs.store.children("uploads") == []


def test_an_upload_that_is_sent_again_while_jobs_are_read_stays(jobs: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is its digest, so the new one has the name of the old one."""
    upload(jobs, "0a", KEEP_UPLOAD_S + 60)
    assert jobs.store.local_root
    file, census = jobs.store.local_root / "uploads/0a", Census(jobs, lambda _: None)
    looked_at = census._facts()
    os.utime(file)
    monkeypatch.setattr(census, "_facts", lambda: looked_at)
    whole_round(census)
    assert jobs.store.children("uploads") == ["0a"]


def test_a_round_asks_for_no_job_that_is_known_to_have_ended(jobs: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "REMEMBERED", 10)
    for n in range(1, 250):
        job(jobs, n, ended=True)
    job(jobs, 250)
    fresh = JobStore(Counting(jobs.store.url))
    asked: Any = fresh.store
    census = Census(fresh, lambda ids: None)
    whole_round(census)
    asked.asked.clear()
    whole_round(census)
    assert asked.asked["get"] == 1, "that of the one which has not ended"
    census.go_on()
    assert asked.asked["get"] == 1, "and nothing before an hour is over"


def test_old_jobs_lose_their_events_and_keep_their_spec_and_result(jobs: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_census, "KEEP_EVENTS", 2)
    running = job(jobs, 1)
    old, *newer = [job(jobs, n, ended=True) for n in (2, 3, 4)]
    whole_round(Census(jobs, lambda ids: None))
    assert jobs.events(old) == [] and all(jobs.events(id) for id in (running, *newer))
    record = JobStore(Store(jobs.store.url)).record(old)
    assert record.spec and record.result == DONE and not record.damage


def test_an_upload_stays_while_somebody_may_read_it(jobs: JobStore) -> None:
    sources = {name: upload(jobs, name, 2 * KEEP_UPLOAD_S) for name in ("running", "ended", "configured", "nobodys")}
    upload(jobs, "young", KEEP_UPLOAD_S / 2)
    job(jobs, 1, data="s3://bucket/x", eval_data=sources["running"])
    job(jobs, 2, ended=True, data=sources["ended"])
    configured = Config().publishing.model_copy(update={"golden": sources["configured"]})
    whole_round(Census(jobs, lambda ids: None, lambda: configured.model_dump().values()))
    assert set(jobs.store.children("uploads")) == {"running", "configured", "young"}


def test_no_upload_goes_while_a_job_that_may_read_it_cannot_be_read(jobs: JobStore) -> None:
    upload(jobs, "old", 2 * KEEP_UPLOAD_S)
    jobs.store.put_new("jobs/finetune-000000010000/spec.json", b"{")
    whole_round(Census(jobs, lambda ids: None))
    assert jobs.store.children("uploads") == ["old"]


def test_a_store_that_fails_in_the_middle_of_a_round_costs_that_round_only(
    jobs: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_census, "AT_ONCE", 2)
    ids = [job(jobs, n) for n in range(1, 6)]
    watched, calls = set[str](), list[int]()

    def watch(some: list[str]) -> None:
        calls.append(len(some))
        if len(calls) == 2:
            raise StoreUnavailable("away for a moment")
        watched.update(some)

    census = Census(jobs, watch)
    census.go_on()
    with pytest.raises(StoreUnavailable):
        census.go_on()
    whole_round(census)
    assert watched == set(ids)


def test_a_configuration_with_the_same_store_keeps_what_is_known(tmp_path: Path) -> None:
    """Every gateway that starts passes its configuration on: whatever had been read was read again."""
    registry = Registry(Store(tmp_path.as_uri()))
    service = JobService(registry, lambda: pytest.fail("Ray was asked"))
    before = service.jobs, service.reaper, service.census
    service.configure(registry)
    assert before == (service.jobs, service.reaper, service.census)
    service.configure(Registry(Store((tmp_path / "other").as_uri())))
    assert not set(map(id, before)) & set(map(id, (service.jobs, service.reaper, service.census)))
