"""What control makes of jobs whose drivers are silent, and what it keeps and removes: without Ray."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.control import job_logs
from cluster.control.jobs import JobService
from cluster.control.lost_jobs import SILENT_S, STALE_S, JobFacts, how_it_ended
from cluster.errors import BadRequest, JobNotFound, ModelNotFound, PoolUnavailable, received
from cluster.jobspec import new_id
from cluster.pool.submit import JobServer, RayJob
from cluster.store.jobs import Damaged, JobEvent, JobEvents, JobRecord, JobResult, JobSnapshot, JobSpec, JobStatus
from cluster.store.objects import Store
from cluster.store.registry import Registry
from jobs.training import runs

RUN = "finetune-0123456789ab"
SPEC = JobSpec(id=RUN, verb="finetune", options={}, owner="ann", created_s=0)
LAST = JobSnapshot(at_s=1, run=RUN)
ENDS = [RayJob("STOPPED"), RayJob("SUCCEEDED", 0), RayJob("FAILED", 1), RayJob("FAILED", -9), RayJob("FAILED", 137)]
LIVES = [RayJob("PENDING"), RayJob("RUNNING")]


def away() -> JobServer:
    raise PoolUnavailable("Ray's job server does not answer.")


@pytest.fixture
def service(tmp_path: Path) -> JobService:
    return JobService(Registry(Store(tmp_path.as_uri())), away)


def checkpoint(service: JobService, run: str) -> None:
    service.store.put_new(f"runs/{run}/000000000010/manifest.json", b"{}")


def job(service: JobService, run: str = "", result: JobResult | None = None) -> str:
    id = new_id("finetune")
    service.jobs.create(SPEC.model_copy(update={"id": id}))
    service.jobs.append(id, JobEvents(n=1, snapshot=JobSnapshot(at_s=1, run=run or id)))
    if result:
        service.jobs.finish(id, result)
    return id


@given(
    ray=st.sampled_from([None, *ENDS, *LIVES]),
    silent_s=st.floats(0, 200),
    stale_s=st.floats(0, 200),
    asked_by=st.sampled_from(["", "ann"]),
    resumable=st.booleans(),
)
def test_a_job_is_ended_by_control_only_where_it_cannot_live(
    ray: RayJob | None, silent_s: float, stale_s: float, asked_by: str, resumable: bool
) -> None:
    result = how_it_ended(JobFacts(LAST, ray, silent_s, stale_s, asked_by, resumable), 9.0)
    if silent_s < SILENT_S or ray in LIVES:
        assert result is None
    elif ray is None and stale_s < STALE_S:
        assert result is None, "it may be another Ray's, or Ray is just about to be asked"
    else:
        assert result is not None and result.status.ended and result.message and result.last == LAST
        assert not asked_by or result.status == JobStatus.CANCELLED
        if result.status == JobStatus.LOST:
            assert (f"--resume {RUN}" in result.message) == resumable


@pytest.mark.parametrize(
    ("ray", "expected"),
    [
        (None, "lost"),
        (RayJob("FAILED", -9), "lost"),
        (RayJob("FAILED", 137), "lost"),
        (RayJob("FAILED", None, "JOB_SUPERVISOR_ACTOR_DIED"), "lost"),
        (RayJob("FAILED", None, "RUNTIME_ENV_SETUP_FAILURE", "no such package"), "failed"),
        (RayJob("FAILED", 2, message="logs:\nerror: no data"), "failed"),
        (RayJob("STOPPED"), "cancelled"),
    ],
)
def test_how_a_silent_job_ended_follows_from_what_ray_knows(ray: RayJob | None, expected: str) -> None:
    result = how_it_ended(JobFacts(LAST, ray, 100, 100, "", False), 9.0)
    assert result and result.status == expected


def test_what_somebody_cancelled_is_removed_and_nobody_elses(service: JobService) -> None:
    """`springtide cancel` removed runs/<name> for every name that was printed in a log."""
    cancelled = JobResult(status=JobStatus.CANCELLED, ended_s=1)
    mine, other = job(service, result=cancelled), job(service)
    for run in (mine, other):
        checkpoint(service, run)
    service.cancel(mine, "ann")
    assert set(service.store.children("runs")) == {mine, other}, "it had ended before: there was nothing to cancel"
    service.jobs.ask_to_cancel(mine, "ann")
    service.reaper.forget(mine)
    assert service.store.children("runs") == [other]


@pytest.mark.parametrize("name", ["cancel.json", "result.json"])
def test_a_job_whose_record_is_damaged_cannot_be_cancelled_and_says_what_to_remove(service: JobService, name: str) -> None:
    """It was an error without a class, which is a 500 to whoever cancelled."""
    id = job(service)
    service.store.put_new(f"jobs/{id}/{name}", b"{")
    with pytest.raises(Damaged, match=f"jobs/{id}/{name} is damaged") as raised:
        service.cancel(id, "ann")
    assert raised.value.status == 409 and "Remove that object" in raised.value.do
    assert type(received(409, raised.value.body())) is Damaged, "the client has it as it was"
    assert service.jobs.store.get(f"jobs/{id}/cancel.json") in (None, b"{"), "nobody was asked to end"
    service.store.delete(f"jobs/{id}/{name}")
    with pytest.raises(PoolUnavailable):  # Ray, which would end it
        service.cancel(id, "ann")


def test_a_run_with_a_name_that_leads_elsewhere_is_left_alone(service: JobService) -> None:
    """A record whose run is ``../versions`` had every version deleted."""
    for run in ("../versions", "..", "a/b", "/"):
        service.store.put_new(f"versions/m/{abs(hash(run))}/manifest.json", b"{}")
        before = service.store.children("versions/m")
        id = job(service, run=run, result=JobResult(status=JobStatus.FAILED, ended_s=1, last=JobSnapshot(at_s=1, run=run)))
        service.reaper.forget(id)
        assert service.store.children("versions/m") == before and id not in service.reaper.watched()


def test_a_run_is_not_begun_under_a_name_that_leads_elsewhere(service: JobService) -> None:
    """A job's id becomes its run's folder, and `ray job submit --submission-id ../versions` chooses the id."""
    with pytest.raises(BadRequest):
        runs.begin(service.store, "../versions", {})
    assert runs.begin(service.store, RUN, {}) == RUN and service.store.children("runs") == [RUN]


def test_a_run_that_another_job_trains_stays(service: JobService) -> None:
    first = job(service)
    checkpoint(service, first)
    second = job(service, run=first)
    service.listed()
    service.jobs.ask_to_cancel(second, "ann")
    service.jobs.finish(second, JobResult(status=JobStatus.CANCELLED, ended_s=1, last=JobSnapshot(at_s=1, run=first)))
    service.reaper.forget(second)
    assert service.store.children("runs") == [first]


def test_what_was_ended_by_nobodys_order_can_be_resumed(service: JobService) -> None:
    id = job(service)
    checkpoint(service, id)
    service.jobs.finish(id, JobResult(status=JobStatus.CANCELLED, ended_s=1))
    service.reaper.forget(id)
    assert service.store.children("runs") == [id]


def test_the_listing_is_true_while_ray_is_away_and_one_record_is_damaged(service: JobService) -> None:
    done, running = job(service, result=JobResult(status=JobStatus.SUCCEEDED, ended_s=1)), job(service)
    service.store.put_new("jobs/finetune-ffffffff0000/spec.json", b"{")
    service.store.put_new(
        "jobs/raysubmit_abc/spec.json", SPEC.model_copy(update={"id": "raysubmit_abc"}).model_dump_json().encode()
    )
    service.store.put_new("jobs/finetune-eeeeeeee0000/events/00000001.json", b"{}")  # somebody removed its specification
    service.store.put_new("jobs/.nfs0001/spec.json", b"{}")
    told = {one["id"]: one["status"] for one in service.listed()}
    assert told.pop("finetune-eeeeeeee0000", "lost") == "lost"
    assert told == {done: "succeeded", running: "running", "finetune-ffffffff0000": "lost", "raysubmit_abc": "queued"}
    assert len(service.listed(1)) == 1
    with pytest.raises(JobNotFound):
        service.get("nobody")


def test_a_listing_of_jobs_that_have_ended_reads_each_record_once(service: JobService, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(20):
        job(service, result=JobResult(status=JobStatus.SUCCEEDED, ended_s=1))
    service.listed()
    asked: list[str] = []
    for method in ("get", "children", "remove"):
        real = getattr(service.store, method)
        monkeypatch.setattr(service.store, method, lambda path, real=real: asked.append(path) or real(path))
    assert len(service.listed()) == 20 and asked == ["jobs"]


def test_what_happened_to_a_job_is_told_and_of_an_old_one_nothing(service: JobService) -> None:
    id = job(service, result=JobResult(status=JobStatus.SUCCEEDED, ended_s=1))
    event = JobEvent(at_s=2, kind="checkpoint", words="kept", data={"step": 40})
    service.jobs.append(id, JobEvents(n=2, snapshot=LAST, events=(event, event)))
    assert service.events(id, 1) == [{"at_s": 2.0, "kind": "checkpoint", "words": "kept", "data": {"step": 40}}]
    assert len(service.events(id)) == 2
    service.jobs.forget_events(id)
    assert service.events(id) == [] and service.get(id)["status"] == "succeeded"
    with pytest.raises(JobNotFound):
        service.events("nobody")


def test_what_a_driver_told_is_newer_than_its_record(service: JobService) -> None:
    id = job(service)
    told = JobSnapshot(at_s=2, run=id, waiting="slots: serving has 3", message="waiting for slots: serving has 3")
    assert service.progress(id, told.model_dump(mode="json")) is False
    now = service.get(id)
    assert (now["status"], now["waiting"]) == ("waiting", "slots: serving has 3")


def test_what_can_be_known_now_need_not_fail_in_the_job(service: JobService) -> None:
    upload = f"upload:{'0' * 64}"
    with pytest.raises(BadRequest, match="is a path"):
        service.submit("finetune", {"data": "/etc/passwd"}, "ann")
    with pytest.raises(BadRequest, match="is a path"):
        service.submit("finetune", {"data": upload, "recipe": "/etc/recipe.yaml"}, "ann")
    with pytest.raises(ModelNotFound):
        service.submit("finetune", {"data": upload, "base": "nobody"}, "ann")
    with pytest.raises(BadRequest, match="no run"):
        service.submit("finetune", {"data": upload, "resume": RUN}, "ann")
    assert service.jobs.ids() == []
    with pytest.raises(PoolUnavailable):
        service.submit("finetune", {"data": upload}, "ann")
    assert [one["status"] for one in service.listed()] == ["failed"], "Ray did not take it"


def test_the_logs_of_several_jobs_are_kept_and_of_many_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one was kept: two followers had the whole of both logs sent with every look."""

    class Server:
        def log(self, id: str) -> str:
            asked.append(id)
            return f"the log of {id}"

    asked = list[str]()
    server: Any = Server()
    logs = job_logs.JobLogs(lambda: server)

    def look(n: int) -> str:
        return logs.read(JobRecord(f"job-{n}", None, None, None), None, 8)["text"]

    for _ in range(3):
        assert [look(n) for n in range(job_logs.KEPT)] == [f"of job-{n}" for n in range(job_logs.KEPT)]
    assert len(asked) == job_logs.KEPT
    look(0)
    look(job_logs.KEPT)  # one too many: job-1 was asked for longest ago
    look(0)
    assert len(asked) == job_logs.KEPT + 1
    look(1)
    assert asked[-1] == "job-1" and len(logs.kept) == job_logs.KEPT
    monkeypatch.setattr(job_logs, "KEEP_S", 0)
    look(0)
    assert asked[-1] == "job-0" and list(logs.kept) == ["job-0"], "what is old is neither told nor kept"


def test_a_log_is_read_from_an_offset_and_never_whole(service: JobService, tmp_path: Path) -> None:
    import socket

    id = job(service)
    file = tmp_path / f"job-driver-{id}.log"
    file.write_bytes("潮汐\n".encode() * 300_000)
    told = JobSnapshot(at_s=2, log=str(file), host=socket.gethostname())
    service.progress(id, told.model_dump(mode="json"))
    text, at, answers = "", 0, 0
    while (answer := service.log(id, at))["text"]:
        assert len(answer["text"].encode()) <= 1 << 20
        text, at, answers = text + answer["text"], answer["next"], answers + 1
    assert text.encode() == file.read_bytes() and answers == 3
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    service.progress(id, told.model_copy(update={"at_s": 3.0, "log": str(secret)}).model_dump(mode="json"))
    with pytest.raises(PoolUnavailable):
        service.log(id)  # only Ray has it then
