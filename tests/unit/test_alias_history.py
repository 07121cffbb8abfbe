"""What an alias meant before: the same whatever is read for it, at the same cost however long it is, and damage stays with its alias."""

import json
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import Conflict, RecordDamaged
from cluster.publishing.history import History, resident
from cluster.store.aliases import EVERY
from cluster.store.journal import path_of
from cluster.store.objects import Store
from cluster.store.registry import Registry
from cluster.types import Generation, Lineage, VersionId
from tests.stores import KINDS, Counting, Losing, Together, lived, opened, write
from tests.unit.test_registry import weights

LENGTHS = (10, 200, 2000)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return (tmp_path / "store").as_uri()


def asked(url: str, what: str) -> Counter[str]:
    """What a process asks that knows nothing, or, in a control's later rounds, has asked before."""
    store = Counting(url)
    registry = Registry(store)
    if what == "engine start":
        registry.resident_adapters(VersionId("m", 1), 16)
    elif what == "rollback":
        registry.previous("m")
    else:
        for _ in range(2 if what == "control round" else 1):
            store.asked.clear()
            registry.aliases()
            registry.rollout("m")
    return store.asked


def test_many_aliases_are_read_at_once(url: str) -> None:
    """An engine's start and each of its evictions asked about one alias after another, each at a bucket's pace."""
    names = [f"m{n}" for n in range(8)]
    for name in names:
        lived(Store(url), name, 3)
    assert list(Registry(Together(url, len(names))).aliases()) == names
    adapters = Registry(Together(url, len(names))).resident_adapters(VersionId("m1", 1), 16)
    assert {manifest.id for manifest in adapters} == {VersionId("m1", 2), VersionId("m1", 3), VersionId("m1", 4)}


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Generations → the URL of a store with an alias so long."""
    urls = {count: (tmp_path_factory.mktemp("store") / "store").as_uri() for count in LENGTHS}
    for count, url in urls.items():
        lived(Store(url), "m", count)
    return urls


@pytest.mark.parametrize("what", ["engine start", "rollback", "control start", "control round"])
def test_the_cost_does_not_grow_with_the_history(long: dict[int, str], what: str) -> None:
    """An engine's start and a rollback read every generation of every alias; control listed them all twice a second."""
    counts = [asked(url, what) for url in long.values()]
    assert max(each.total() for each in counts) <= counts[0].total() + 20 and counts[-1].total() < 60, counts
    if what == "control round":  # does the next generation exist? the next rollout, its next record?
        assert [dict(each) for each in counts] == [{"children": 1, "names": 1, "get": 1, "size": 2}] * len(LENGTHS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_reader_finds_the_same_history(tmp_path: Path, kind: str) -> None:
    with opened(kind, tmp_path) as store:
        lived(store, "m", 3 * EVERY + 5)
        registry = Registry(store)
        cold = registry.past("m")
        assert cold.number == 3 * EVERY + 5 and cold.newest == registry.alias("m")
        folded = History(alias="m")
        for n in range(1, cold.number + 1):
            folded = folded.after(n, registry.moves.moves.read("aliases/m", n), lambda _: VersionId("m", 1))
        assert cold == folded
        assert [move.generation for move in registry.history("m", 5)] == list(range(cold.number - 4, cold.number + 1))


moves = st.lists(st.tuples(st.integers(1, 5), st.none() | st.integers(1, 5)), max_size=60)


@given(moves)
def test_the_compacted_history_says_what_the_whole_one_says(versions: list[tuple[int, int | None]]) -> None:
    """Against the definitions that read everything."""
    whole = [move("m", n, stable, canary) for n, (stable, canary) in enumerate(versions, 1)]
    history = History(alias="m")
    for each in whole:
        history = history.after(each.generation, each, lambda _: VersionId("base", 1))
    stack: list[VersionId] = []
    for each in whole:
        stack = [*stack[: stack.index(each.stable)], each.stable] if each.stable in stack else [*stack, each.stable]
    assert list(history.stack) == stack
    live = list(dict.fromkeys(reversed(whole[-1].versions))) if whole else []
    past = [id for each in reversed(whole) for id in each.versions]
    expected = [id for id in dict.fromkeys([*reversed(live), *past])][:3][::-1]
    found = resident([history], VersionId("base", 1), 3)
    assert set(found) == set(expected) and set(found[-len(live) :] if live else []) == set(live)
    assert {one.version for one in history.lived if history.was_live(one.version)} == {each.stable for each in whole}


def move(alias: str, n: int, stable: int, canary: int | None = None) -> Generation:
    versions = VersionId("a", stable), VersionId("a", canary) if canary else None
    return Generation(alias=alias, generation=n, stable=versions[0], canary=versions[1], reason="r", author="a", time_s=n)


def test_adapters_on_other_weights_are_not_loaded() -> None:
    history = History(alias="m")
    for n, each in enumerate([move("m", 1, 1), move("m", 2, 2)], 1):
        history = history.after(n, each, lambda id: VersionId("base", id.n))
    assert resident([history], VersionId("base", 2), 9) == [VersionId("a", 2)]


# movers leave snapshots


def test_movers_leave_a_snapshot_every_few_moves_and_only_the_newest(url: str, tmp_path: Path) -> None:
    registry = Registry(Store(url))
    ids = [registry.register("m", "weights", None, weights(tmp_path / "source", bytes([n])), Lineage()).id for n in range(3)]
    for n in range(5 * EVERY + 3):
        registry.move("m", ids[n % 3], "r", "a", after=n)
    assert registry.store.children("aliases/m/snapshots") == [f"{n:08d}.json" for n in (4 * EVERY, 5 * EVERY)]
    store = Counting(url)
    assert Registry(store).past("m") == registry.past("m")
    assert (
        store.asked["get"] <= 2 + 3 + 3 + 1
    )  # the snapshot, three moves, no version that it knows, and the one that is not there


def test_a_store_of_an_older_release_gets_its_snapshot_from_the_first_reader(url: str) -> None:
    lived(Store(url), "m", 600)
    root = Store(url).local_root
    assert root
    for path in (root / "aliases/m/snapshots").iterdir():
        path.unlink()
    first, second = Counting(url), Counting(url)
    found = Registry(first).past("m")
    assert found.number == 600 and first.asked["get"] < 300 and len(found.stack) > 1
    assert Registry(second).past("m") == found and second.asked["get"] < 5


@pytest.mark.parametrize("damage", ["{", None, ""])
def test_damaged_snapshots_cost_time_and_nothing_else(url: str, damage: str | None) -> None:
    lived(Store(url), "m", 100)
    expected = Registry(Store(url)).past("m")
    root = Store(url).local_root
    assert root
    for path in (root / "aliases/m/snapshots").iterdir():
        path.unlink() if damage is None else path.write_text(damage)
    assert Registry(Store(url)).past("m") == expected


# damage


def test_a_damaged_newest_generation_leaves_the_one_before_and_is_told(url: str) -> None:
    """It stopped every round of control: no alias converged."""
    lived(Store(url), "m", 5)
    lived(Store(url), "other", 5)
    root = Store(url).local_root
    assert root
    whole = (root / path_of("aliases/m", 5)).read_bytes()
    (root / path_of("aliases/m", 5)).write_bytes(whole[:40])
    registry = Registry(Store(url))
    assert {name: move.generation for name, move in registry.aliases().items()} == {"m": 4, "other": 5}
    assert [found.path for found in registry.damaged()] == ["aliases/m/00000005.json"]
    assert registry.aliases()["m"].generation == 4
    (root / path_of("aliases/m", 5)).write_bytes(whole)
    assert registry.aliases()["m"].generation == 5 and registry.damaged() == [], "a restored record counts at once"


def test_a_move_takes_the_place_of_a_damaged_one(url: str) -> None:
    """Nobody could move the alias any more."""
    lived(Store(url), "m", 5)
    root = Store(url).local_root
    assert root
    (root / path_of("aliases/m", 5)).write_bytes(b"")
    registry = Registry(Store(url))
    with pytest.raises(Conflict):
        registry.move("m", VersionId("m", 1), "r", "a", after=5)
    assert registry.move("m", VersionId("m", 1), "r", "a", after=4).generation == 6
    assert Registry(Store(url)).alias("m") == registry.alias("m") and registry.alias("m").generation == 6  # pyright: ignore[reportOptionalMemberAccess]


def test_a_damaged_rollout_stops_its_alias_and_no_other(url: str) -> None:
    lived(Store(url), "m", 5)
    lived(Store(url), "other", 5)
    root = Store(url).local_root
    assert root
    (root / path_of("rollouts/m/5", 1)).write_text("{}")
    registry = Registry(Store(url))
    with pytest.raises(RecordDamaged):
        registry.rollout("m")
    assert registry.rollout("other") is not None
    assert [records[-1].number for records in registry.rollouts("m")] == [1, 2, 3, 4]


def test_a_move_whose_answer_was_lost_is_made_once(url: str, tmp_path: Path) -> None:
    """The mover got a Conflict with itself, and so did everybody after it."""
    store = Losing(url)
    registry = Registry(store)
    id = registry.register("m", "weights", None, weights(tmp_path / "source"), Lineage()).id
    store.lost = 1
    made = registry.move("m", id, "r", "a", after=0)
    assert [each.generation for each in Registry(Store(url)).history("m")] == [1] and registry.alias("m") == made
    store.lost = 2
    assert registry.register("m", "weights", None, weights(tmp_path / "source"), Lineage()).id.n == 2


KINDS_OF_DAMAGE = st.sampled_from(["cut", "empty", "gone", "other", "unknown", "newer", "noise"])


def spoil(path: Path, how: str) -> None:
    raw = path.read_bytes()
    if how == "gone":
        return path.unlink()
    values = {**json.loads(raw), "colour": "red"}
    path.write_bytes(
        {
            "cut": raw[: len(raw) // 2],
            "empty": b"",
            "other": b'{"alias": 3}',
            "unknown": json.dumps(values).encode(),
            "newer": json.dumps({**values, "schema": 7}).encode(),
            "noise": bytes(range(256)),
        }[how]
    )


@settings(max_examples=30, deadline=None)
@given(data=st.data(), count=st.integers(1, 20))
def test_whatever_is_damaged_every_other_alias_reads_right(data: st.DataObject, count: int) -> None:
    """One unreadable, missing or newer record stopped convergence for every alias."""
    with tempfile.TemporaryDirectory() as folder:
        url = (Path(folder) / "store").as_uri()
        for alias in ("good", "m", "zeta"):
            lived(Store(url), alias, count, adapters=3)
        whole = Registry(Store(url))
        expected = {alias: (whole.past(alias), whole.rollout(alias)) for alias in ("good", "m", "zeta")}
        root = Store(url).local_root
        assert root
        paths = sorted(path for part in ("aliases/m", "rollouts/m", "versions/m") for path in (root / part).rglob("*.json"))
        chosen = data.draw(
            st.lists(st.tuples(st.sampled_from(paths), KINDS_OF_DAMAGE), min_size=1, max_size=8, unique_by=lambda one: one[0])
        )
        for path, how in chosen:
            spoil(path, how)
        registry = Registry(Store(url))
        histories = registry.moves.all()
        for alias in ("good", "zeta"):
            assert registry.past(alias) == expected[alias][0] and registry.rollout(alias) == expected[alias][1]
            assert histories[alias].moves == expected[alias][0].moves
        for found in registry.past("m").moves:
            assert found.generation <= count
        assert not [found for found in registry.damaged() if "/m/" not in found.path]
        registry.resident_adapters(VersionId("good", 1), 4)
        harmless = all(how == "newer" for _, how in chosen)
        if harmless:
            assert registry.past("m").number == count and registry.damaged() == []
            assert [one.generation for one in histories["m"].moves] == [one.generation for one in expected["m"][0].moves]


def test_unknown_fields_of_a_newer_release_are_read_past(url: str) -> None:
    """Going back to the release before halted every alias."""
    lived(Store(url), "m", 5)
    root = Store(url).local_root
    assert root
    for path in root.rglob("*.json"):
        spoil(path, "newer")
    registry = Registry(Store(url))
    assert registry.alias("m") is not None and registry.rollout("m") is not None and registry.damaged() == []
    assert [manifest.id.n for manifest in registry.resident_adapters(VersionId("m", 1), 2)]
    write(registry.store, "x", b"")
