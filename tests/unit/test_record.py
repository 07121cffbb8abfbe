"""What a driver writes of its job: through store trouble, errors and signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.capacity.allocator import Grant
from cluster.capacity.arbiter import Job
from cluster.config import Config, parse
from cluster.errors import DataError, PoolUnavailable, StoreUnavailable
from cluster.jobspec import Publish
from cluster.jobspec import parse as options_from
from cluster.store.jobs import JobResult, JobStatus, JobStore
from cluster.store.objects import Store
from jobs import record as records
from jobs.record import JobRecord, record, spec
from jobs.training.drivers import heartbeat
from jobs.training.drivers.driver import Reporter
from jobs.training.launch import whole
from jobs.training.progress import Committed, Progress
from tests.conftest import ROOT
from tests.waiting import when

OPTIONS = options_from("finetune", {"data": "https://me:pass@host/x.jsonl?sig=1"})
STEP = Progress(step=3, steps=9, loss=1.5, tokens=70, tokens_per_s=10.0, eta_s=2.0, workers=2)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return parse({"home": str(tmp_path), "store": (tmp_path / "store").as_uri()})


@pytest.fixture(autouse=True)
def fast(monkeypatch: Any) -> None:
    monkeypatch.setattr(records, "FLUSH_S", 0.05)
    monkeypatch.setattr(records, "AGAIN_S", 0.05)


def only(config: Config) -> tuple[JobStore, str]:
    jobs = JobStore(Store(config.store))
    [id] = jobs.ids()
    return jobs, id


def waiting(job: JobRecord) -> str:
    newest = job.store.newest(job.id)
    return newest.snapshot.waiting if newest else ""


def test_a_job_that_ends_well_leaves_spec_events_and_result(config: Config) -> None:
    with record(config, OPTIONS) as job:
        job.know(base="seedling@1")
        job.begin_run(job.id)
        job.note("waiting for slots: it needs 2 slots", waiting="slots: it needs 2 slots")
        when(lambda: waiting(job) == "slots: it needs 2 slots", 5)
        job.note("may have 2 slots")
        job.watch(STEP)
        job.made(version="seedling@2")
    jobs, id = only(config)
    result = jobs.result(id)
    assert result and result.status == JobStatus.SUCCEEDED and result.made == {"version": "seedling@2"}
    assert result.last and result.last.progress and result.last.progress.step == 3 and result.last.run == id
    assert jobs.spec(id).options == {"data": "https://host/x.jsonl"}, "what a URL carries is nobody else's"
    said = [event.words for event in jobs.events(id) if event.words]
    assert said == ["waiting for slots: it needs 2 slots", "may have 2 slots"]


def test_a_job_waits_because_it_says_so_whatever_its_words_are(config: Config) -> None:
    """The status was read out of English: any other words, or the same in a message of somebody else, would have changed it."""
    job = JobRecord(JobStore(Store(config.store)), spec(OPTIONS))
    for words, waiting, kind in [
        ("waiting for slots: so says a library", "", "message"),
        ("no slot is there", "slots: serving has 3", "waiting"),
        ("control has not answered for 12 s: the job waits", "slots: serving has 3", "message"),
        ("may have 2 slots", "", "message"),
    ]:
        job.note(words, waiting)
        assert (job.snapshot.waiting, job.snapshot.message, job.events[-1].kind) == (waiting, words, kind)


def test_heartbeats_tell_what_the_job_waits_for(monkeypatch: Any) -> None:
    monkeypatch.setattr(heartbeat.client, "connect", lambda: (_ for _ in ()).throw(PoolUnavailable("away")))
    noted: list[tuple[str, str]] = []
    beats = heartbeat.Heartbeats(Job("j", 0, 0, 1, 1), lambda *told: noted.append(told))
    for grant in (Grant(0, "serving has 2"), Grant(0, "serving has 2"), Grant(1, "")):
        beats.grant = grant
        assert beats.wanted(0) == grant.slots
    beats.end()
    assert noted == [("waiting for slots: serving has 2", "slots: serving has 2"), ("may have 1 slot", "")]


def test_each_checkpoint_is_an_event_once(config: Config) -> None:
    """A run that could be resumed from step 40 said so in its log only."""
    with record(config, OPTIONS) as job:
        tell = Reporter(job)
        for committed in (
            Committed(),
            Committed(40, 1.5, 2048),
            Committed(40, 1.5, 2048),
            Committed(55, 0.5, 2048),
            Committed(40),
        ):
            tell.committed(committed)
    jobs, id = only(config)
    assert [(event.kind, event.data) for event in jobs.events(id)] == [
        ("checkpoint", {"step": 40, "seconds": 1.5, "size_bytes": 2048}),
        ("checkpoint", {"step": 55, "seconds": 0.5, "size_bytes": 2048}),
    ]


def test_an_error_is_the_result_in_its_own_words(config: Config) -> None:
    with pytest.raises(DataError), record(config, OPTIONS):
        raise DataError("x.jsonl, line 2: not JSON.", "Write one object per line.")
    jobs, id = only(config)
    result = jobs.result(id)
    assert result and (result.status, result.code) == (JobStatus.FAILED, "invalid_training_data")
    assert result.message == "x.jsonl, line 2: not JSON. Write one object per line."


@pytest.mark.parametrize("cancelled", [True, False])
def test_a_job_that_was_cancelled_is_cancelled_whatever_it_exits_with(config: Config, cancelled: bool) -> None:
    """Ray answered the signal before the job did, with status 1: the job had failed, and its checkpoints stayed."""
    with pytest.raises(SystemExit), record(config, OPTIONS) as job:
        if cancelled:
            job.store.ask_to_cancel(job.id, "anna")
        raise SystemExit(1)
    jobs, id = only(config)
    result = jobs.result(id)
    words = "Cancelled by anna." if cancelled else "It exited with 1."
    assert result and (result.status, result.message) == (JobStatus.CANCELLED if cancelled else JobStatus.FAILED, words)


def test_store_trouble_never_stops_a_job_and_is_made_good_later(config: Config, capsys: Any, monkeypatch: Any) -> None:
    away = True
    put = Store.put_new

    def failing(store: Store, path: str, data: bytes) -> None:
        if away:
            raise StoreUnavailable("The disk is full.")
        put(store, path, data)

    monkeypatch.setattr(Store, "put_new", failing)
    with record(config, OPTIONS) as job:
        for step in range(2000):
            job.watch(STEP._replace(step=step, steps=2000))
            job.note(f"step {step}")
        when(lambda: bool(job.trouble), 5)
        away = False
        when(lambda: not job.trouble, 5)
    jobs, id = only(config)
    said = capsys.readouterr().out
    assert said.count("cannot be written") == 1 and said.count("is written again") == 1
    events = jobs.events(id, 10_000)
    assert events[-1].words == "step 1999" and len(events) <= 3 * records.KEPT
    assert (result := jobs.result(id)) and result.status == JobStatus.SUCCEEDED


def test_many_words_are_few_objects(config: Config, monkeypatch: Any) -> None:
    monkeypatch.setattr(records, "FLUSH_S", 0.5)
    began_s = time.monotonic()
    with record(config, OPTIONS) as job:
        while time.monotonic() - began_s < 1.2:
            job.watch(STEP)
            time.sleep(0.01)
    jobs, id = only(config)
    took_s = time.monotonic() - began_s
    assert 1 <= len(jobs.store.children(f"jobs/{id}/events")) <= took_s / 0.5 + 2


def test_a_long_job_writes_its_progress_less_often_and_a_silent_one_that_it_lives(config: Config, monkeypatch: Any) -> None:
    """At three seconds each, a week of training would be 200,000 objects."""
    job = JobRecord(JobStore(Store(config.store)), spec(OPTIONS))
    monkeypatch.setattr(records, "FLUSH_S", 3)
    job.watch(STEP)
    job.began_s, job.flushed_s = 0.0, 3600.0
    assert not job._due(3610) and job._due(3640)  # pyright: ignore[reportPrivateUsage]
    job.note("a checkpoint is written")
    assert job._due(3610), "news does not wait"  # pyright: ignore[reportPrivateUsage]
    job.events = []
    assert not job._due(3610) and job._due(3631), "it says that it lives"  # pyright: ignore[reportPrivateUsage]


def test_who_ended_first_is_right(config: Config) -> None:
    """Control may have taken a job for lost whose driver lives after all."""
    lost = JobResult(status=JobStatus.LOST, ended_s=1)
    with record(config, OPTIONS) as job:
        job.store.finish(job.id, lost)
    jobs, id = only(config)
    assert jobs.result(id) == lost


SCRIPT = """
import signal, sys, time
from jobs import main
from cluster.config import load
from cluster.jobspec import parse
from jobs.record import record

def run():
    with record(load(), parse("finetune", {"data": "x"})) as job:
        job.begin_run(job.id)
        if len(sys.argv) > 1:
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))  # as `ray.init` does
        print("there", job.id, flush=True)
        time.sleep(60)

main(run)
"""


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("handler", [[], ["ray"]])
def test_a_job_that_is_ended_says_by_whom(config: Config, asked: bool, handler: list[str]) -> None:
    environment = {**os.environ, "SPRINGTIDE_HOME": str(config.home), "SPRINGTIDE_STORE": config.store}
    line = [sys.executable, "-c", SCRIPT, *handler]
    with subprocess.Popen(line, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout
        id = driver.stdout.readline().split()[1]
        jobs = JobStore(Store(config.store))
        when(lambda: jobs.newest(id) is not None, 10)
        if asked:
            jobs.ask_to_cancel(id, "ann")
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(10) == (signal.SIGTERM if handler else 128 + signal.SIGTERM)
    result = jobs.result(id)
    assert result and result.status == JobStatus.CANCELLED
    assert result.message == "Cancelled by ann." if asked else f"--resume {id}" in result.message


def test_a_jobs_id_is_rays_where_ray_runs_it(monkeypatch: Any) -> None:
    publish = Publish(version="seedling@2")  # type: ignore[arg-type]
    assert not spec(publish).submitted and spec(publish).id.startswith("publish-")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"metadata": {"job_submission_id": "raysubmit_1"}}')
    assert (spec(publish).id, spec(publish).submitted) == ("raysubmit_1", True)


def test_what_a_loss_cannot_say_is_left_out(config: Config) -> None:
    job = JobRecord(JobStore(Store(config.store)), spec(OPTIONS))
    job.watch(STEP._replace(loss=float("nan")))
    assert job.snapshot.progress and job.snapshot.progress.loss is None


def test_a_run_that_was_too_short_to_be_looked_at_ends_with_all_its_steps() -> None:
    at = whole(6, {"train_loss": 0.5, "tokens": 40.0}, None)
    assert (at.step, at.steps, at.loss, at.tokens) == (6, 6, 0.5, 40)
