"""What a job may be asked: typed once, read from a command line, a typer command and a JSON document alike."""

from typing import Annotated, Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from cluster import jobspec
from cluster.config import Training
from cluster.errors import BadRequest
from cluster.jobspec import Options, Workers, chosen, command_line, options_of, parse

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=30)
WORKERS = st.tuples(st.integers(1, 99), st.integers(0, 99)).map(lambda pair: f"{pair[0]}-{sum(pair)}")
FINETUNE = st.fixed_dictionaries(
    {"data": TEXT},
    optional={
        "base": TEXT,
        "epochs": st.floats(0.125, 64, allow_nan=False),
        "set": st.lists(TEXT, min_size=1, max_size=3),
        "workers": WORKERS,
        "priority": st.integers(-9, 9),
        "publish": st.booleans(),
        "resume": TEXT,
    },
)


@given(FINETUNE)
def test_a_command_line_and_a_document_ask_for_the_same_job(document: dict[str, Any]) -> None:
    asked = parse("finetune", document)
    assert command_line("finetune", asked.arguments()) == asked
    assert parse("finetune", asked.document()) == asked
    assert command_line("finetune", asked.arguments()).document() == asked.document(), "defaults stay the job's"


@pytest.mark.parametrize("verb", jobspec.VERBS)
def test_every_option_has_help_and_stands_in_every_commands_help(verb: str) -> None:
    """`springtide train --help` had two of eleven options, and a paragraph for the others."""
    app = typer.Typer()

    @app.command()
    @jobspec.options(verb)
    def command(wait: Annotated[bool, typer.Option(help="Follow it.")] = True, **given: Any) -> None: ...

    shown = CliRunner().invoke(app, ["--help"], terminal_width=200).output
    for option in options_of(jobspec.VERBS[verb]):
        assert option.help
        assert (option.metavar or "" if option.positional else option.flag) in shown
    assert "--wait" in shown


def test_a_typer_command_hears_what_was_given_and_nothing_else() -> None:
    heard: list[Options] = []
    app = typer.Typer()

    @app.command()
    @jobspec.options("finetune")
    def train(wait: bool = True, **given: Any) -> None:
        heard.append(parse("finetune", chosen(given)))

    done = CliRunner().invoke(app, ["--data", "x", "--workers", "1-4", "--set", "a=1", "--set", "b=2", "--no-publish"])
    assert done.exit_code == 0, done.output
    assert heard[0].document() == {"data": "x", "workers": "1-4", "set": ["a=1", "b=2"], "publish": False}


@pytest.mark.parametrize(
    ("verb", "document", "words"),
    [
        ("finetun", {}, "Did you mean finetune?"),
        ("finetune", {"data": "x", "epoch": 3}, "Did you mean epochs?"),
        ("finetune", {"data": "x", "epochs": "many"}, "--epochs: "),
        ("finetune", {}, "--data: "),
        ("finetune", {"data": "x", "full": True, "recipe": "mine.yaml"}, "--full and --recipe exclude each other"),
        ("pretrain", {"hidden_size": 33}, "--hidden-size: "),
        ("evaluate", {"version": "seedling"}, "is not a version"),
    ],
)
def test_what_is_wrong_is_named(verb: str, document: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse(verb, document)
    assert words in str(caught.value)


def test_a_wrong_name_on_a_command_line_lists_near_matches(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        command_line("finetune", ["--data", "x", "--epoch", "3"])
    said = capsys.readouterr().err
    assert "unrecognized arguments: --epoch 3" in said and "Did you mean --epochs?" in said


@pytest.mark.parametrize("text", ["", "0", "-1", "2-", "4-2", "1-2-3", "two", "1 - 2", "٢"])
def test_what_is_no_number_of_workers_is_refused(text: str) -> None:
    with pytest.raises(BadRequest):
        parse("finetune", {"data": "x", "workers": text})


def test_workers_replace_the_pools() -> None:
    training = jobspec.with_workers(Training(workers=8, min_workers=3), Workers(1, 2))
    assert (training.min_workers, training.workers) == (1, 2)
    assert jobspec.with_workers(Training(workers=8), None).workers == 8


@pytest.mark.parametrize(
    ("verb", "needs"),
    [("finetune", {}), ("dpo", {}), ("distill", {"teacher": "x@1", "student": "x"}), ("pretrain", {"name": "x"})],
)
def test_whatever_trains_may_choose_its_trainer(verb: str, needs: dict[str, Any]) -> None:
    option = next(option for option in options_of(jobspec.VERBS[verb]) if option.name == "trainer")
    assert "[default: elastic]" in option.help
    with pytest.raises(BadRequest, match="'elastic' or 'ray_train'"):
        parse(verb, {"data": ["x"] if verb == "pretrain" else "x", **needs, "trainer": "ray"})


def test_the_seedling_has_its_own_trainer() -> None:
    with pytest.raises(BadRequest, match="--trainer needs --data"):
        parse("pretrain", {"trainer": "ray_train"})


def test_a_record_keeps_no_secret_of_a_url() -> None:
    asked = parse("finetune", {"data": "https://me:pass@host/x.jsonl?X-Amz-Signature=0123", "base": "seedling"})
    assert asked.recorded() == {"data": "https://host/x.jsonl", "base": "seedling"}
    assert "X-Amz-Signature=0123" in asked.arguments()[0]


def test_ids_sort_by_age(monkeypatch: Any) -> None:
    ids: list[str] = []
    for at_s in (1_700_000_000, 1_700_000_001, 1_900_000_000):
        monkeypatch.setattr("time.time", lambda at_s=at_s: at_s)
        ids.append(jobspec.new_id("finetune"))
    assert ids == sorted(ids) and len(set(ids)) == 3
