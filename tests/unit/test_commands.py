"""What the commands take, and what they say: without a pool."""

import argparse
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

import jobs
from cluster import jobspec
from cluster.cli import commands, demo, render
from cluster.client import Client, Job
from cluster.config import Config, parse
from cluster.endpoint import Endpoint
from cluster.errors import BadRequest, JobFailed, PoolUnavailable
from cluster.jobspec import Parser
from cluster.pool import local
from cluster.store.jobs import JobEvent

RUN = "finetune-0123456789ab"
WHY = "slots: it needs 2 slots; serving has 3 and jobs before it the rest"
PROGRESS = {"step": 1, "steps": 9, "loss": 2.5, "tokens_per_s": 10.2, "eta_s": 8.4, "workers": 1}


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


@pytest.mark.parametrize("verb", ["train", "distill", "dpo", "rl", "evaluate"])
def test_every_option_of_a_job_is_an_option_of_the_command(verb: str) -> None:
    """Those of `train` beyond `--data` and `--base` stood in a paragraph, and how many workers it may have in a variable."""
    shown = CliRunner().invoke(commands.app, [verb, "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    model = jobspec.VERBS["finetune" if verb == "train" else verb]
    assert {option.flag for option in jobspec.options_of(model) if not option.positional} <= set(re.findall(r"--[a-z-]+", shown))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"data": "nowhere.jsonl"}, "There is no file nowhere.jsonl"),
        ({"data": "sample:tide", "epochs": -1.0, "workers": "4-1"}, "--workers"),
        ({"data": "sample:tide", "recipe": "mine.yaml"}, "There is no file mine.yaml"),
    ],
)
def test_what_can_be_known_here_is_said_before_anything_is_sent(given: dict[str, Any], words: str) -> None:
    nowhere = Client(Endpoint("http://127.0.0.1:1", ""))
    with pytest.raises(BadRequest, match=words):
        commands.jobs.start(nowhere, "finetune", given)


@pytest.mark.parametrize("words", [["status", "--pool", "x"], ["status", "--pool=x"], ["--pool", "x", "status"]])
def test_the_pool_may_be_named_anywhere(words: list[str], monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr("sys.argv", ["springtide", *words])
    with pytest.raises(SystemExit) as ended:
        commands.main()
    assert ended.value.code == 2
    assert "'x' is not the URL of a gateway" in capsys.readouterr().err


def test_what_another_machine_needs_is_printed_for_its_shell(config: Config, monkeypatch: Any) -> None:
    monkeypatch.setattr(commands.machine, "running", lambda: config)
    monkeypatch.setattr(commands.machine.endpoint, "of", lambda _: Endpoint("http://127.0.0.1:8000", "key"))
    printed = CliRunner().invoke(commands.app, ["env", "--client"]).output
    assert printed == "export SPRINGTIDE_POOL=http://127.0.0.1:8000\nexport SPRINGTIDE_API_KEY=key\n"


# jobs


def job(**known: Any) -> Job:
    said = {"id": RUN, "verb": "finetune", "status": "running", "owner": "me", "created_s": 1.0, "progress": None}
    return Job.model_validate({**said, "waiting": "", "message": "", "result": None, **known})


@pytest.mark.parametrize(
    ("known", "words"),
    [
        ({"status": "queued"}, "starting"),
        ({}, "starting"),
        ({"status": "waiting", "waiting": WHY}, f"waiting for {WHY}"),
        ({"progress": PROGRESS}, "1/9 loss 2.5000, 10 tokens/s, 1 worker, 8 s left"),
        ({"status": "waiting", "waiting": WHY, "progress": PROGRESS}, f"waiting for {WHY}"),
        ({"status": "waiting", "waiting": f"[{WHY}]"}, f"waiting for [{WHY}]"),
    ],
)
def test_a_job_says_whether_it_starts_or_waits_and_for_what(known: dict[str, Any], words: str) -> None:
    file = io.StringIO()
    render.jobs(Console(file=file, width=300), [job(**known)])
    said = " ".join(word for word in file.getvalue().split() if word != "│")
    assert words in said and RUN in said
    assert said.count("waiting") == (2 if "waiting" in words else 0), "the status, and for what"


@pytest.mark.parametrize("status", ["succeeded", "failed", "cancelled", "lost"])
def test_a_job_that_ended_neither_starts_nor_waits(status: str) -> None:
    result = {"status": status, "ended_s": 2.0, "message": "its words", "made": {"version": "m@2"}}
    file = io.StringIO()
    render.jobs(Console(file=file, width=200), [job(status=status, progress=PROGRESS, result=result, message="its words")])
    said = file.getvalue()
    assert "waiting" not in said and "starting" not in said and "left" not in said
    assert ("m@2" if status == "succeeded" else "its words") in said


def test_a_job_that_is_followed_ends_in_what_it_made_or_in_its_own_words() -> None:
    made = {"status": "succeeded", "ended_s": 2.0, "made": {"version": "m@2"}}
    looks = iter([job(status="queued"), job(progress=PROGRESS), job(status="succeeded", result=made)])
    assert commands.jobs.drawn(lambda: next(looks), "Fine-tuning", looked_every_s=0) == {"version": "m@2"}
    with pytest.raises(JobFailed, match=f"{RUN} is lost: its driver was killed"):
        commands.jobs.drawn(lambda: job(status="lost", message="its driver was killed."), "Fine-tuning")


def test_what_happened_to_a_job_is_a_table_or_json(monkeypatch: pytest.MonkeyPatch) -> None:
    happened = [
        JobEvent(at_s=0, kind="waiting", words="waiting for slots: [serving] has 3"),
        JobEvent(at_s=60, kind="checkpoint", words="the state after step 40 is kept", data={"step": 40, "seconds": 1.25}),
        JobEvent(at_s=61, kind="progress", data={"step": 41, "loss": 1.23456, "workers": 2}),
    ]

    class Pool:
        def events(self, id: str, limit: int) -> list[JobEvent]:
            assert id == RUN
            return happened[-limit:]

    monkeypatch.setattr(commands.jobs, "client", Pool)
    file = io.StringIO()
    monkeypatch.setattr(commands.jobs, "console", Console(file=file, width=160))
    assert CliRunner().invoke(commands.app, ["events", RUN]).exit_code == 0
    for words in (
        "waiting for slots: [serving] has 3",
        "step 40 is kept, step 40, seconds 1.25",
        "step 41, loss 1.235, workers 2",
    ):
        assert words in file.getvalue()
    listed = json.loads(CliRunner().invoke(commands.app, ["events", RUN, "--json", "--limit", "2"]).output)
    assert [JobEvent.model_validate(event) for event in listed] == happened[1:]
    render.events(Console(file=file, width=160), [])
    assert "Nothing is known" in file.getvalue()


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
    monkeypatch.setattr(demo, "up", lambda config, *_: config)  # another command has started it
    monkeypatch.setattr(demo, "_loop", lambda *_: None)
    monkeypatch.setattr(demo.signal, "signal", lambda *_: None)
    monkeypatch.setattr(demo.local, "stop", lambda _, pool: ended.append(pool.name))
    monkeypatch.setattr(demo.local, "find", lambda _: None if ended else local)
    yield ended


OURS = SimpleNamespace(name="ours", alive=True)
"""A pool that the command itself has started."""


def interrupted(_: float) -> None:
    raise KeyboardInterrupt


def test_a_run_that_did_not_start_the_pool_says_so_and_leaves_it(config: Config, ended: list[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(demo.time, "sleep", interrupted)
    file = io.StringIO()
    demo.run(config, Console(file=file, width=160), keep_serving=True)
    assert ended == [] and "Ctrl-C ends only this one" in file.getvalue() and "The pool keeps running" in file.getvalue()


def test_a_run_that_started_the_pool_says_so_and_stops_it(config: Config, ended: list[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(demo, "up", lambda config, _console, _model, began: began.append(OURS) or config)
    monkeypatch.setattr(demo.time, "sleep", interrupted)
    file = io.StringIO()
    demo.run(config, Console(file=file, width=160), keep_serving=True)
    assert ended == ["ours"] and "Ctrl-C, which stops the pool" in file.getvalue()


def test_a_run_whose_start_fails_leaves_the_pool_that_another_command_started_meanwhile(
    config: Config, ended: list[str], monkeypatch: Any
) -> None:
    """It found no pool when it began, and took any that ran in the end for its own."""
    found = iter([None])
    monkeypatch.setattr(demo.local, "find", lambda _: next(found, local))
    monkeypatch.setattr(demo, "up", lambda *_: demo.local.find(config) or interrupted(0))
    file = io.StringIO()
    demo.run(config, Console(file=file, width=160), keep_serving=True)
    assert ended == [] and "The pool keeps running" in file.getvalue()


def test_a_pool_that_ends_under_a_run_is_an_error(config: Config, ended: list[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(demo.time, "sleep", lambda _: ended.append("by somebody"))
    with pytest.raises(PoolUnavailable, match="stopped, or has ended by itself"):
        demo.run(config, Console(file=io.StringIO()), keep_serving=True)
    assert ended == ["by somebody"]
