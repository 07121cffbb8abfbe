import asyncio
import os
import pickle
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from cluster.errors import BodyTooLarge, Conflict, StoreUnavailable
from cluster.store.objects import Store, sha256
from tests.stores import KINDS, opened


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


def test_a_store_in_memory_has_one_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    store = Store("memory:///")
    store.upload("a", tmp_path / "file")
    assert store.get("a") == b"1"


def test_an_unknown_scheme_says_what_to_do() -> None:
    with pytest.raises(StoreUnavailable, match="SPRINGTIDE_STORE"):
        Store("gopher://x").check_writable()


def parts(count: int, of: int = 1 << 20) -> Iterator[bytes]:
    return (bytes([n % 251]) * of for n in range(count))


@pytest.fixture(params=KINDS)
def either(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    with opened(request.param, tmp_path) as store:
        yield store


def test_a_stream_arrives_whole_and_is_counted(either: Store) -> None:
    assert either.put_stream("uploads/x", parts(12), 12 << 20) == 12 << 20
    assert either.get("uploads/x") == b"".join(parts(12)) and either.size("uploads/x") == 12 << 20


def test_a_stream_above_its_limit_leaves_nothing(either: Store) -> None:
    with pytest.raises(BodyTooLarge, match=str(8 << 20)):
        either.put_stream("uploads/x", parts(12), 8 << 20)
    assert either.get("uploads/x") is None and either.children("uploads") == []
    if either.local_root:
        assert [path for path in either.local_root.rglob("*") if path.is_file()] == []


def test_a_stream_whose_sender_fails_leaves_nothing(either: Store) -> None:
    def broken() -> Iterator[bytes]:
        yield from parts(12)
        raise ConnectionResetError("gone")

    with pytest.raises(ConnectionResetError, match="gone"):
        either.put_stream("uploads/x", broken(), 100 << 20)
    assert either.get("uploads/x") is None and either.children("uploads") == []


def test_a_stream_in_an_event_loop_keeps_the_same_promises(either: Store) -> None:
    async def sent(count: int) -> AsyncIterator[bytes]:
        for part in parts(count):
            await asyncio.sleep(0)
            yield part

    assert asyncio.run(either.put_stream_async("uploads/x", sent(12), 12 << 20)) == 12 << 20
    with pytest.raises(BodyTooLarge):
        asyncio.run(either.put_stream_async("uploads/y", sent(12), 8 << 20))
    assert either.get("uploads/x") == b"".join(parts(12)) and either.get("uploads/y") is None


def test_a_range_is_read_without_the_rest(either: Store) -> None:
    either.put_new("log", b"0123456789")
    assert either.read_range("log", 2, 5) == b"234"
    assert either.read_range("log", 8, 100) == b"89"
    assert either.read_range("log", 10, 20) == b"" and either.read_range("log", 4, 4) == b""
    assert either.read_range("nothing", 0, 5) is None and either.size("nothing") is None


def test_what_leads_out_of_a_folder_is_not_removed(either: Store) -> None:
    """A run that was named ``../versions`` in a job's record took every version with it."""
    either.put_new("versions/m/1/manifest.json", b"{}")
    for prefix in ("runs/../versions", "runs/./../versions", "", "runs/", "/", "runs//x", ".."):
        with pytest.raises(ValueError, match="no folder"):
            either.remove(prefix)
    assert either.get("versions/m/1/manifest.json") == b"{}"
    either.remove("versions/m")
    assert either.get("versions/m/1/manifest.json") is None


def test_an_object_takes_another_name(either: Store) -> None:
    either.put_stream("uploads/part", parts(1), 1 << 20)
    either.rename("uploads/part", "uploads/digest")
    assert either.children("uploads") == ["digest"]
