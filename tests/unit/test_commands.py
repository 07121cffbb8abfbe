"""What the commands take, and what they say: without a pool."""

import argparse
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobDetails, JobStatus
from rich.console import Console

import jobs
from cluster.cli import demo, render
from cluster.config import Config, parse
from cluster.errors import PoolUnavailable
from cluster.jobspec import Parser
from cluster.pool import local, submit

RUN, JOB = "finetune-0123456789ab", "raysubmit_0123456789abcdef"
BEGUN = f"8 examples to train on\nrun {RUN}\n"
WHY = "it needs 2 slots; serving has 3 and jobs before it the rest"
STEP = "(Worker pid=1) progress stage=finetune step=1/9 loss=2.5 eta_s=8\n"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return parse({**Config().dump(), "home": str(tmp_path), "store": tmp_path.as_uri()})


def printed(*renderables: Any) -> str:
    """What goes into a pipe."""
    file = io.StringIO()
    Console(file=file, width=160).print(*renderables)
    return file.getvalue()


# options


def test_every_parser_of_the_jobs_is_the_one_that_takes_whole_names_only() -> None:
    """argparse takes `--epoch` for `--epochs` otherwise, and `--pub` for `--publish`."""
    folder = Path(jobs.__file__).parent
    sources = {path.relative_to(folder): path.read_text() for path in folder.rglob("*.py")}
    makes = [str(path) for path, text in sources.items() if re.search(r"\bArgumentParser\b", text)]
    assert makes == [], "cluster.jobspec has the only one"
    verb = Parser().add_subparsers().add_parser("verb")
    assert isinstance(verb, argparse.ArgumentParser) and not verb.allow_abbrev


# jobs


def job(status: JobStatus = JobStatus.RUNNING) -> JobDetails:
    said = {"type": "SUBMISSION", "submission_id": JOB, "status": status, "entrypoint": "python -m jobs.finetune"}
    return JobDetails.model_validate(said)


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("", "starting"),
        (BEGUN, "starting"),
        (f"{BEGUN}waiting for slots: {WHY}\n", f"waiting for slots: {WHY}"),
        (f"{BEGUN}waiting for slots: {WHY}\nmay have 2 slots\n{STEP}", "1/9 loss 2.5"),
        (f"{BEGUN}{STEP}waiting for slots: {WHY}\n(Worker pid=1) checkpoint step=3 seconds=0.1\n", f"waiting for slots: {WHY}"),
        (f"{BEGUN}{STEP}waiting for slots: [{WHY}]\n", f"waiting for slots: [{WHY}]"),
    ],
)
def test_a_job_says_whether_it_starts_or_waits_and_for_what(log: str, words: str) -> None:
    file = io.StringIO()
    render.jobs(Console(file=file, width=240), [job()], [log])
    said = " ".join(word for word in file.getvalue().split() if word != "│")
    assert words in said and JOB in said and (RUN in said) == bool(log)
    assert "waiting" in words or "waiting" not in said


def test_a_job_that_ended_does_not_wait() -> None:
    file = io.StringIO()
    render.jobs(Console(file=file, width=160), [job(JobStatus.STOPPED)], [f"waiting for slots: {WHY}\n"])
    assert "waiting" not in file.getvalue() and "starting" not in file.getvalue()


def test_a_job_is_found_by_its_runs_name(config: Config, monkeypatch: Any) -> None:
    logs = {"newest": BEGUN, "between": "", "oldest": BEGUN}
    listed = [job().model_copy(update={"submission_id": id}) for id in logs]
    monkeypatch.setattr(submit, "jobs", lambda _: listed)
    monkeypatch.setattr(submit, "log", lambda _, id: logs[id])
    assert submit.named(config, RUN) == "newest", "a run that was resumed is its last job's"
    assert submit.named(config, JOB) == JOB
    assert submit.named(config, "finetune-ba9876543210") == "finetune-ba9876543210", (
        "whoever asks for its log says that it is not there"
    )


# status


def test_every_job_has_a_line_with_its_reason_of_now() -> None:
    job = {"since_s": 1.0, "held": 0, "active": 0}
    change = {"at_s": 2.0, "owner": "a", "before": 1, "after": 0, "reason": "serving has 3 slots"}
    told = {**job, "id": "c", "reason": "it needs 2 [of 1] slots"}
    document = {"grants": {"serving": 3, "a": 0}, "jobs": [{**job, "id": "a"}, {**job, "id": "b"}, told], "changes": [change]}
    lines = printed(render.allocation(document)).splitlines()
    cells = {row[0]: row[1:] for line in lines if len(row := [cell.strip() for cell in line.strip("│").split("│")]) == 5}
    assert cells["a"][0:2] == ["0", "0"] and cells["a"][3] == "serving has 3 slots"
    assert cells["b"][0:2] == ["0", "0"] and cells["b"][3] == "waits for slots"
    assert cells["c"][3] == "it needs 2 [of 1] slots", "where control says why, that is newer than the last change"


def test_ids_stay_on_one_line_whatever_stands_beside_them() -> None:
    told = {"id": RUN, "held": 0, "since_s": 1.0, "reason": "a reason, and a long one; " * 20}
    assert RUN in printed(render.allocation({"grants": {}, "jobs": [told], "changes": []}))


# run


@pytest.fixture
def ended(monkeypatch: Any) -> Iterator[list[str]]:
    """A pool that runs until it is in the list, and a loop that was gone through."""
    ended: list[str] = []
    monkeypatch.setattr(demo, "check_room", lambda _: None)
    monkeypatch.setattr(demo, "up", lambda config, _: config)
    monkeypatch.setattr(demo, "_loop", lambda *_: None)
    monkeypatch.setattr(demo.signal, "signal", lambda *_: None)
    monkeypatch.setattr(demo.local, "down", lambda _: ended.append("by us"))
    monkeypatch.setattr(demo.local, "find", lambda _: None if ended else local)
    yield ended


def interrupted(_: float) -> None:
    raise KeyboardInterrupt


def test_a_run_that_did_not_start_the_pool_says_so_and_leaves_it(config: Config, ended: list[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(demo.time, "sleep", interrupted)
    file = io.StringIO()
    demo.run(config, Console(file=file, width=160), keep_serving=True)
    assert ended == [] and "Ctrl-C ends only this command" in file.getvalue() and "The pool goes on" in file.getvalue()


def test_a_run_that_started_the_pool_says_so_and_stops_it(config: Config, ended: list[str], monkeypatch: Any) -> None:
    found = iter([None])  # before it is started
    monkeypatch.setattr(demo.local, "find", lambda _: next(found, local))
    monkeypatch.setattr(demo.time, "sleep", interrupted)
    file = io.StringIO()
    demo.run(config, Console(file=file, width=160), keep_serving=True)
    assert ended == ["by us"] and "Ctrl-C, which stops the pool" in file.getvalue()


def test_a_pool_that_ends_under_a_run_is_an_error(config: Config, ended: list[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(demo.time, "sleep", lambda _: ended.append("by somebody"))
    with pytest.raises(PoolUnavailable, match="stopped, or ended by itself"):
        demo.run(config, Console(file=io.StringIO()), keep_serving=True)
    assert ended == ["by somebody"]
