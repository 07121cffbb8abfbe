import os
import pickle
from pathlib import Path

import pytest

from cluster.errors import Conflict, StoreUnavailable
from cluster.store.objects import Store, sha256


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store((tmp_path / "store").as_uri())


def test_a_path_is_written_once(store: Store) -> None:
    store.put_new("a/b.json", b"first")
    with pytest.raises(Conflict):
        store.put_new("a/b.json", b"second")
    assert store.get("a/b.json") == b"first"


def test_what_is_not_there_reads_as_none_and_lists_as_nothing(store: Store) -> None:
    assert store.get("a/b.json") is None
    assert store.children("a") == []


def test_children_are_folders_and_objects_sorted(store: Store) -> None:
    for path in ("v/2/x", "v/1/x", "v/a.json"):
        store.put_new(path, b"")
    assert store.children("v") == ["1", "2", "a.json"]


def test_a_file_survives_the_way_there_and_back(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(100_000))
    store.upload("big", source)
    store.download("big", tmp_path / "copies" / "target")
    assert sha256(tmp_path / "copies" / "target") == sha256(source)


def test_a_store_pickles_as_its_url(store: Store) -> None:
    store.put_new("x", b"1")
    assert pickle.loads(pickle.dumps(store)).get("x") == b"1"


def test_a_store_that_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreUnavailable, match="writable"):
        Store((tmp_path / "file" / "store").as_uri()).check_writable()


def test_an_unknown_scheme_says_what_to_do() -> None:
    with pytest.raises(StoreUnavailable, match="SPRINGTIDE_STORE"):
        Store("gopher://x").check_writable()
