"""Control's decisions, without Ray."""

from cluster.control import public
from cluster.gateways import routing
from cluster.placement import answerable, lacks
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
    history = [move(1, ONE), move(2, TWO)]
    assert answerable(history, (replica({"m@1": "d"}),)).generation == 1
    assert answerable(history, (replica({"m@1": "d", "m@2": "e"}),)).generation == 2
    assert answerable(history, ()).generation == 2


def test_a_rollback_is_followed_although_both_versions_are_held() -> None:
    history = [move(1, ONE), move(2, TWO), move(3, ONE)]
    assert answerable(history, (replica({"m@1": "d", "m@2": "e"}),)).generation == 3


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
