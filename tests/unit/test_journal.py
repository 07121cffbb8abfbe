"""Journals: numbers without gaps, found without listing; damage costs the damaged document, and nothing else."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from cluster.errors import Conflict, RecordDamaged, StoreUnavailable
from cluster.publishing.gate import Verdict
from cluster.publishing.history import History
from cluster.publishing.rollout import Policy, Rollout
from cluster.store.journal import AHEAD, Damages, Journal, decode, encode, highest, path_of
from cluster.types import Generation, Manifest, Record
from tests.stores import Counting, Losing


class Note(Record):
    text: str = ""
    policy: Policy = Policy()


class Newer(Note):
    """The same document in the next release."""

    SCHEMA: ClassVar[int] = 2
    colour: str = "none"


@pytest.fixture
def url(tmp_path: Path) -> str:
    return (tmp_path / "store").as_uri()


def filled(url: str, count: int) -> Journal[Note]:
    journal = Journal(Counting(url), Note)
    for n in range(1, count + 1):
        journal.append("notes", n, Note(text=str(n)))
    return journal


def fresh(url: str) -> tuple[Counting, Journal[Note]]:
    store = Counting(url)
    return store, Journal(store, Note)


@given(taken=st.integers(0, 5000), known=st.integers(0, 5000), ahead=st.integers(1, 4))
def test_the_highest_number_is_found_from_any_that_is_known(taken: int, known: int, ahead: int) -> None:
    asked: list[int] = []

    def exists(n: int) -> bool:
        asked.append(n)
        return n <= taken

    assert highest(exists, min(known, taken), ahead) == taken
    assert len(asked) <= 2 * (taken - min(known, taken) + 1).bit_length() + ahead


@given(taken=st.integers(5, 300), data=st.data())
def test_documents_that_went_missing_do_not_hide_those_after_them(taken: int, data: st.DataObject) -> None:
    """Unless more than `AHEAD` - 1 in a row are gone."""
    first = data.draw(st.integers(1, taken - 1))
    gone = set(range(first, min(taken, first + data.draw(st.integers(1, AHEAD - 1)))))
    assert highest(lambda n: 0 < n <= taken and n not in gone, 0, AHEAD) == taken


@pytest.mark.parametrize("count", [1, 10, 100, 1000])
def test_what_is_known_costs_one_question_a_round_whatever_the_length(url: str, count: int) -> None:
    """It listed the whole journal, twice a second."""
    journal = filled(url, count)
    store = journal.store
    assert isinstance(store, Counting)
    assert journal.newest("notes") == Note(text=str(count))
    store.asked.clear()
    assert journal.newest("notes") == Note(text=str(count))
    assert store.asked == {"size": 1}


def test_the_newest_few_are_read_and_no_others(url: str) -> None:
    """It read every document."""
    filled(url, 200)
    store, journal = fresh(url)
    assert [note.text for note in journal.recent("notes", 3)] == ["198", "199", "200"]
    assert store.asked["get"] == 3 and store.asked["children"] == 0 and store.asked["size"] <= 20


def test_a_write_whose_answer_was_lost_is_a_success(url: str) -> None:
    """It was a Conflict with oneself, for ever after."""
    store = Losing(url)
    journal = Journal(store, Note)
    store.lost = 1
    assert journal.append("notes", 1, Note(text="mine")) == Note(text="mine")
    assert journal.newest("notes") == Note(text="mine")


def test_a_number_that_somebody_else_took_meanwhile_is_a_conflict_still(url: str) -> None:
    filled(url, 1)
    store = Losing(url)
    with pytest.raises(Conflict):
        Journal(store, Note).append("notes", 1, Note(text="other"))


def test_a_write_that_failed_is_a_failure(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store, journal = fresh(url)

    def fails(path: str, data: bytes) -> None:
        raise StoreUnavailable("Gone.")

    monkeypatch.setattr(store, "put_new", fails)
    with pytest.raises(StoreUnavailable):
        journal.append("notes", 1, Note(text="mine"))
    assert journal.newest("notes") is None


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What is logged meanwhile."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    log = logging.getLogger("cluster.store.journal")
    log.addHandler(handler)
    yield found
    log.removeHandler(handler)


BROKEN = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'{"text": 1}',
    b'{"text": "a", "colour": "red"}',
    b'{"schema": 0}',
    b'{"schema": "x"}',
    b"\xff",
]


@pytest.mark.parametrize("raw", BROKEN)
def test_one_bad_document_costs_itself_and_is_reported_once(url: str, raw: bytes, lines: list[str]) -> None:
    """It raised out of every reader, each time."""
    filled(url, 3)
    root = fresh(url)[0].local_root
    assert root
    (root / path_of("notes", 2)).write_bytes(raw)
    damages = Damages()
    journal = Journal(Counting(url), Note, damages)
    for _ in range(3):
        assert [note.text for note in journal.recent("notes", 10)] == ["1", "3"]
        assert journal.newest("notes") == Note(text="3")
        with pytest.raises(RecordDamaged, match=r"notes/00000002\.json"):
            journal.read("notes", 2)
    assert [found.path for found in damages.listed()] == ["notes/00000002.json"]
    assert sum("damaged" in line for line in lines) == 1
    (root / path_of("notes", 2)).write_bytes(encode(Note(text="2")))
    assert [note.text for note in journal.recent("notes", 10)] == ["1", "2", "3"] and damages.listed() == []


def test_whoever_decides_by_the_newest_is_told_that_it_is_damaged(url: str) -> None:
    filled(url, 3)
    _, journal = fresh(url)
    assert journal.store.local_root
    (journal.store.local_root / path_of("notes", 3)).write_bytes(b"{")
    with pytest.raises(RecordDamaged, match="00000003"):
        journal.newest("notes")
    assert journal.highest("notes") == 3


def test_a_missing_document_is_reported(url: str) -> None:
    filled(url, 5)
    _, journal = fresh(url)
    assert journal.store.local_root
    (journal.store.local_root / path_of("notes", 4)).unlink()
    assert [note.text for note in journal.recent("notes", 3)] == ["3", "5"]
    assert [found.why for found in journal.damages.listed()] == ["it is missing"]


def test_an_older_release_reads_what_a_newer_one_wrote_and_hands_it_on() -> None:
    """A downgrade stopped everything: an unknown field was an error."""
    written = encode(Newer(text="a", colour="red", policy=Policy(min_requests=7)))
    values = json.loads(written)
    values["policy"]["patience_s"] = 3
    read = decode(Note, json.dumps(values).encode())
    assert (read.text, read.policy.min_requests) == ("a", 7)
    derived = encode(read.model_copy(update={"text": "b"}))
    assert json.loads(derived) == {**values, "text": "b"}
    assert decode(Newer, json.dumps({**json.loads(derived), "policy": {}}).encode()).colour == "red"


def test_a_newer_release_reads_what_an_older_one_wrote() -> None:
    assert decode(Newer, encode(Note(text="a"))).colour == "none"
    assert decode(Note, b'{"text": "from before there were forms"}').schema_version == 1


JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda part: st.dictionaries(st.text(max_size=5), part, max_size=3),
    max_leaves=6,
)


@settings(max_examples=50)
@given(st.dictionaries(st.sampled_from(["text", "policy", "colour", ""]) | st.text(max_size=5), JSON, max_size=4))
def test_any_object_of_a_newer_release_is_read_or_refused_in_words(values: dict[str, Any]) -> None:
    try:
        read = decode(Note, json.dumps({**values, "schema": 9}).encode())
    except ValueError as error:
        assert "form 9" in str(error)
    else:
        assert json.loads(encode(read)).keys() >= values.keys() - {"schema"}


def fields(kind: type[BaseModel]) -> dict[str, Any]:
    """Every field of a document, its parts' included."""

    def parts(annotation: Any) -> list[type[BaseModel]]:
        inner = [part for one in getattr(annotation, "__args__", ()) for part in parts(one)]
        own = [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []
        return [*own, *inner]

    return {
        name: {key: value for part in parts(field.annotation) for key, value in fields(part).items()}
        for name, field in kind.model_fields.items()
    }


def flat(kind: type[BaseModel]) -> str:
    return json.dumps(fields(kind), sort_keys=True).replace('"', "").replace(": {}", "").replace(" ", "")


FORMS: dict[type[Record], tuple[int, str]] = {
    Manifest: (
        1,
        "{base,created_s,files:{path,sha256,size_bytes},id,kind,lineage:{code_revision,dataset_sha256,job,metrics,parent,recipe},"
        "schema_version}",
    ),
    Generation: (
        1,
        "{alias,author,canary,generation,percent,reason,record,rollout,schema_version,shadow_percent,stable,time_s}",
    ),
    Rollout: (
        1,
        "{alias,author,incumbent,is_rollback,n,number,percent,policy:{gate,margins:{disagreement,error_rate,finish,itl_ratio,ttft_ratio},max_step_s,"
        "min_requests,min_step_s,shadow_percent,steps},reason,schema_version,seen,since_s,stage,version}",
    ),
    Verdict: (1, "{against,checks:{name,numbers,passed,words},job,schema_version,time_s,version}"),
    History: (
        1,
        "{alias,lived:{last_s,stable,version,weights},moves:{alias,author,canary,generation,percent,reason,record,rollout,schema_version,"
        "shadow_percent,stable,time_s},number,rollout,schema_version,stack}",
    ),
}


@pytest.mark.parametrize("kind", FORMS)
def test_a_new_field_is_a_new_form(kind: type[Record]) -> None:
    """Otherwise the release before takes it for damage. Add one to ``SCHEMA`` and write both down here."""
    assert (kind.SCHEMA, flat(kind)) == FORMS[kind]


def test_a_snapshot_is_of_a_new_form_when_the_moves_in_it_are() -> None:
    assert History.SCHEMA >= Generation.SCHEMA
