"""Control's decisions, without Ray."""

from cluster.control import answerable, lacks, public, routing
from cluster.types import File, Generation, Lineage, Manifest, ReplicaState, VersionId

ONE, TWO = VersionId("m", 1), VersionId("m", 2)
ADAPTER = Manifest(
    id=TWO, kind="adapter", base=ONE, files=(File(path="a", sha256="s", size_bytes=1),), lineage=Lineage(), created_s=0
)


def move(generation: int, version: VersionId) -> Generation:
    return Generation(alias="m", generation=generation, stable=version, reason="", author="", time_s=0)


def replica(held: dict[str, str], base: str = "m@1", running: int = 0) -> ReplicaState:
    return ReplicaState("r", "http://r", "secret", base, held, {}, running)


def test_an_alias_moves_only_when_somebody_can_answer_for_it() -> None:
    before, newest = {"m": move(1, ONE)}, {"m": move(2, TWO)}
    assert answerable(newest, before, (replica({"m@1": "d"}),)) == before
    assert answerable(newest, before, (replica({"m@1": "d", "m@2": "e"}),)) == newest


def test_an_alias_that_is_new_is_shown_at_once() -> None:
    assert answerable({"m": move(1, ONE)}, {}, ()) == {"m": move(1, ONE)}


def test_a_replica_lacks_a_version_by_digest_and_only_on_its_own_base() -> None:
    assert lacks(replica({}), ADAPTER)
    assert lacks(replica({"m@2": "another digest"}), ADAPTER)
    assert not lacks(replica({"m@2": ADAPTER.digest}), ADAPTER)
    assert not lacks(replica({}, base="other@1"), ADAPTER)


def test_load_alone_is_not_worth_telling_the_gateways() -> None:
    assert routing((replica({}, running=1),)) == routing((replica({}, running=9),))
    assert routing((replica({}),)) != routing((replica({"m@2": "d"}),))


def test_a_secret_is_never_shown() -> None:
    assert "secret" not in public(replica({}))
