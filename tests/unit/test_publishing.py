"""Publishers that wait, and rollouts that a control finds half-way: nothing is read where the loop waits, and nobody waits for ever."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.control import admission
from cluster.errors import DoesNotFit, StoreUnavailable, VersionRefused
from cluster.publishing.rollout import DIRECT, begin
from cluster.types import Lineage, VersionId
from tests.controlled import Controlled, adapter, make_base, stop_all, two_fleets, wait_until


@pytest.fixture(autouse=True)
def stopped() -> Iterator[None]:
    yield
    stop_all()


ONE, OTHER = VersionId("m", 1), VersionId("n", 1)
GATED = DIRECT.model_copy(update={"gate": True})


def reads_of_waiters(control: Controlled) -> list[str]:
    """What the store is asked by those that wait for the loop, while the loop waits for their answer. The list grows."""
    asking, reads = threading.local(), list[str]()
    wait = control.reconcilers.loop.wait

    def waiting(done: Callable[[], bool], timeout_s: float) -> bool:
        def ask() -> bool:
            asking.now = True
            try:
                return done()
            finally:
                asking.now = False

        return wait(ask, timeout_s)

    def noted(read: Callable[..., Any]) -> Callable[..., Any]:
        def look(path: str, *rest: Any) -> Any:
            if getattr(asking, "now", False):
                reads.append(path)
            return read(path, *rest)

        return look

    control.reconcilers.loop.wait = waiting  # type: ignore[method-assign]
    for name in ("get", "children", "size", "read_range"):
        setattr(control.registry.store, name, noted(getattr(control.registry.store, name)))
    return reads


def test_a_publisher_that_waits_reads_nothing_and_outlives_a_store_that_fails_meanwhile(tmp_path: Path) -> None:
    """Waiters read the store while they held up the loop, and a record that could not be written was a KeyError to them."""
    config, registry, machines = two_fleets(tmp_path)
    control = Controlled(config, machines)
    first, second = adapter(registry, tmp_path, ONE, 1), adapter(registry, tmp_path, OTHER, 2)
    wait_until(lambda: control.view.aliases.keys() >= {"m", "n"})
    reads, put, lost = reads_of_waiters(control), control.registry.store.put_new, list[str]()

    def failing(path: str, data: bytes) -> None:
        if path.startswith("rollouts/n/") and not path.endswith("00000001.json") and len(lost) < 2:
            lost.append(path)
            raise StoreUnavailable("the connection broke")
        put(path, data)

    assert control.publishing.publish(str(first.id), "m", "", "test", GATED).stage == "registered"
    control.registry.store.put_new = failing  # type: ignore[method-assign]
    assert control.publish(second.id, "n").stage == "live"
    assert len(lost) == 2 and reads == []


def test_a_publisher_whose_rollout_another_hand_has_ended_hears_how(tmp_path: Path) -> None:
    config, registry, machines = two_fleets(tmp_path)
    control = Controlled(config, machines)
    machines.hung["fleet-m"] = threading.Event()
    first, second = adapter(registry, tmp_path, ONE, 1), adapter(registry, tmp_path, ONE, 2)
    reads, heard = reads_of_waiters(control), list[str]()

    def publish() -> None:
        try:
            control.publish(first.id, "m")
        except VersionRefused as error:
            heard.append(error.message)

    waiting = threading.Thread(target=publish)
    waiting.start()
    wait_until(lambda: (one := registry.rollout("m")) is not None and one.stage == "warming")
    warming = registry.rollout("m")
    assert warming is not None
    registry.record(warming.next("rolled_back", "another control was told to", time.time()))
    registry.record(begin("m", 2, second.id, ONE, GATED, "the next one", "test", time.time()))
    waiting.join(20)
    machines.hung["fleet-m"].set()
    assert heard == ["another control was told to"] and reads == []


def test_a_control_that_starts_during_a_rollout_of_weights_compares_them_beside_its_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It read and hashed both versions within a round, and every alias stood still meanwhile."""
    config, registry, machines = two_fleets(tmp_path)
    new = registry.register("m", "weights", None, make_base(tmp_path / "new", 7), Lineage())
    registry.record(first := begin("m", 1, new.id, ONE, DIRECT, "control was killed", "test", time.time()))
    registry.record(first.next("warming", "", time.time()))
    compare, threads, go_on = admission.artefact.difference, list[str](), threading.Event()

    def slow(*both: Any) -> str:
        threads.append(threading.current_thread().name)
        assert go_on.wait(20)
        return compare(*both)

    monkeypatch.setattr(admission.artefact, "difference", slow)
    control = Controlled(config, machines)
    wait_until(lambda: bool(threads))
    made = adapter(registry, tmp_path, OTHER, 1, name="poet")
    assert control.publish(made.id, "poet").stage == "live", "nobody else waits for it"
    assert control.view.aliases["m"].stable == ONE
    go_on.set()
    wait_until(lambda: control.view.aliases["m"].stable == new.id)
    assert len(threads) == 1 and "control-loop" not in threads


def test_a_rollout_whose_weights_nobody_hosts_any_more_is_refused_with_what_is_hosted(tmp_path: Path) -> None:
    """It would have waited for its replicas for ever: the fleet had left for other weights meanwhile."""
    config, registry, machines = two_fleets(tmp_path)
    made = adapter(registry, tmp_path, OTHER, 3, name="poet")
    left = registry.register("n", "weights", None, make_base(tmp_path / "new", 7), Lineage())
    registry.record(first := begin("poet", 1, made.id, None, DIRECT, "control was killed", "test", time.time()))
    registry.record(first.next("warming", "", time.time()))
    registry.move("n", left.id, "by hand", "test", after=1)
    machines.start("replica-n", "fleet-n", left.id)
    control = Controlled(config, machines)
    wait_until(lambda: (one := registry.rollout("poet")) is not None and one.stage == "rolled_back")
    refused = registry.rollout("poet")
    assert refused is not None and refused.reason == f"no fleet hosts {OTHER} any more; train it on {ONE}, {left.id}"
    wait_until(lambda: control.view.aliases["n"].stable == left.id)
    assert "poet" not in control.view.aliases


def test_an_adapter_onto_an_architecture_without_any_is_refused_in_words(tmp_path: Path) -> None:
    """vLLM starts such a model without places for adapters."""
    config, registry, _ = two_fleets(tmp_path)
    base = make_base(tmp_path / "encoder", 3)
    (base / "config.json").write_text(
        '{"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 4, "num_hidden_layers": 1}'
    )
    encoder = registry.register("m", "weights", None, base, Lineage())
    tuned = adapter(registry, tmp_path, encoder.id, 4, "tuned")
    with pytest.raises(
        VersionRefused, match=r"tuned@1 is an adapter on m@2, and vLLM loads no adapters onto a BertModel"
    ) as refused:
        admission.check(config.spec("m"), registry, tuned, encoder.id)
    assert "Train all of its weights" in refused.value.do


def test_weights_that_fit_on_no_slot_are_refused_before_any_replica_hears_of_them(tmp_path: Path) -> None:
    config, registry, machines = two_fleets(tmp_path)
    control = Controlled(config, machines)
    control.hosting.device_bytes = lambda: 1 << 30
    made = registry.register("m", "weights", None, make_base(tmp_path / "new", 7), Lineage())
    with pytest.raises(DoesNotFit, match=r"m@2 does not fit: weights, adapters and the engine itself need 2.0 GiB"):
        control.publish(made.id, "m")
    assert registry.rollout("m") is None
    with pytest.raises(DoesNotFit, match="n@1 does not fit"):
        control.fleets.add("third", {"model": "n@1"}, "somebody")
    assert control.fleets.records.names() == []
    control.publish(ONE, "m")  # what was live is not asked again: going back is urgent
