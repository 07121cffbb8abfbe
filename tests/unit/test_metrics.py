"""What the metrics of slots say: every level of a snapshot, every decision and hand-over once, and nothing that stops the loop."""

import re
from collections import deque
from typing import Any

from cluster.capacity.allocator import GrantChange
from cluster.capacity.arbiter import FleetGrant
from cluster.capacity.handover import Allocation, SlotSnapshot
from cluster.control import metrics
from cluster.control.metrics import MOST_JOBS, Board, Sample, decided, levels, publish
from cluster.metrics import CHECKPOINTS, JOB_SLOTS, METRICS


def at(at_s: float, grant: int, held: int, active: int, serving: int = 1) -> SlotSnapshot:
    return SlotSnapshot(at_s, 4, serving, serving, serving, (Allocation("a", grant, held, active),))


def said(samples: list[Sample]) -> dict[tuple[str, ...], float]:
    return {(sample.metric.name, *sample.tags): sample.value for sample in samples}


def test_names_carry_their_unit_and_no_label_is_prometheus_own() -> None:
    for metric in METRICS:
        assert re.fullmatch(r"springtide_[a-z_]+_(slots|seconds|jobs|total)|springtide_slots", metric.name)
        assert (metric.kind == "histogram") == metric.name.endswith("_seconds")
        assert (metric.kind == "counter") == metric.name.endswith("_total")
        assert metric.help.endswith(".") and not {"job", "instance", "le", "quantile"} & set(metric.tags)
    assert len({metric.name for metric in METRICS}) == len(METRICS)


def test_a_snapshot_gives_every_level() -> None:
    snapshot = SlotSnapshot(0, 8, 3, 2, 4, (Allocation("a", 2, 3, 1), Allocation("b", 0, 0, 0)))
    assert said(levels(snapshot)) == {
        ("springtide_slots", "serving"): 2,
        ("springtide_slots", "training"): 3,
        ("springtide_slots", "idle"): 3,
        ("springtide_lease_slots",): 3,
        ("springtide_wanted_slots",): 4,
        ("springtide_waiting_jobs",): 1,
        ("springtide_job_slots", "a", "grant"): 2,
        ("springtide_job_slots", "a", "held"): 3,
        ("springtide_job_slots", "a", "active"): 1,
        ("springtide_job_slots", "b", "grant"): 0,
        ("springtide_job_slots", "b", "held"): 0,
        ("springtide_job_slots", "b", "active"): 0,
    }


def test_a_job_that_has_left_is_zero_once_and_then_gone() -> None:
    board, gone = Board(), SlotSnapshot(2, 4, 1, 1, 1)
    board.news([at(1, 3, 3, 3)], [])
    first, then = said(board.news([at(1, 3, 3, 3), gone], [])), said(board.news([at(1, 3, 3, 3), gone], []))
    assert first["springtide_job_slots", "a", "held"] == 0
    assert not any(key[0] == JOB_SLOTS.name for key in then)


def test_the_number_of_series_is_bounded_and_who_holds_slots_is_shown() -> None:
    waiting = tuple(Allocation(f"w{n}", 0, 0, 0) for n in range(500))
    samples = said(levels(SlotSnapshot(0, 8, 1, 1, 1, (*waiting, Allocation("a", 2, 2, 2)))))
    assert sum(1 for key in samples if key[0] == JOB_SLOTS.name) == MOST_JOBS * 3
    assert samples["springtide_job_slots", "a", "held"] == 2
    assert samples["springtide_waiting_jobs",] == 500


def test_a_decision_counts_by_kind_of_owner_and_act() -> None:
    changes = [GrantChange(1, "serving", 1, 3, ""), GrantChange(1, "finetune-1", 3, 1, "")]
    assert [sample.tags for sample in decided(changes)] == [("serving", "grow"), ("training", "shrink")]


def test_decisions_count_once() -> None:
    board, snapshots = Board(), [at(0, 3, 3, 3)]
    changes = deque([GrantChange(1, "serving", 1, 3, "")], maxlen=2)

    def counted() -> int:
        return sum(1 for sample in board.news(snapshots, changes) if sample.metric.kind == "counter")

    assert counted() == 1
    assert counted() == 0
    changes.extend([GrantChange(0.5, "serving", 3, 1, "a clock went back"), GrantChange(2, "serving", 3, 1, "")])
    assert counted() == 2
    assert counted() == 0


def test_each_fleet_has_its_levels_and_one_that_was_removed_falls_to_zero() -> None:
    board, oak, elm = Board(), FleetGrant("oak", 2, 1, 2, ""), FleetGrant("elm", 1, 0, 1, "")
    first = said(board.news([at(0, 3, 3, 3)], [], [oak, elm]))
    assert first["springtide_fleet_slots", "oak", "grant"] == 2 and first["springtide_fleet_slots", "oak", "lacking"] == 1
    second = said(board.news([at(0, 3, 3, 3)], [], [oak]))
    assert second["springtide_fleet_slots", "elm", "grant"] == 0
    assert ("springtide_fleet_slots", "elm", "grant") not in said(board.news([at(0, 3, 3, 3)], [], [oak]))


def test_hand_overs_are_observed_once_when_they_end() -> None:
    board, done = Board(), dict[tuple[str, ...], float]()
    story = [at(0.1, 3, 3, 3), at(10.1, 1, 3, 3), at(11.3, 1, 1, 0), at(11.9, 1, 1, 1), at(20, 3, 1, 1), at(24.7, 3, 3, 3)]
    seen: list[int] = []
    for n in range(1, len(story) + 1):
        for _ in range(2):
            new = [sample for sample in board.news(story[:n], []) if sample.metric.kind == "histogram"]
            done |= said(new)
            seen += [n] * len(new)
    assert seen == [4, 4, 6]
    assert {key: round(value, 3) for key, value in done.items()} == {
        ("springtide_handover_slots_free_seconds", "yield"): 1.2,
        ("springtide_handover_training_seconds", "yield"): 1.8,
        ("springtide_handover_training_seconds", "grow"): 4.7,
    }


def test_every_metric_can_be_told_without_ray() -> None:
    board = Board()
    story = [at(0, 3, 3, 3), at(10, 1, 3, 3), at(11, 1, 1, 1)]
    publish(board, story, [GrantChange(10, "a", 3, 1, "")], [FleetGrant("oak", 2, 1, 2, "")])
    assert not board.failing
    assert set(board.instruments) == {metric.name for metric in METRICS if metric is not CHECKPOINTS}


def test_trouble_with_metrics_is_logged_once_and_stops_nothing(monkeypatch: Any) -> None:
    logged: list[str] = []

    def broken(self: Board, sample: Sample) -> None:
        raise RuntimeError("no agent")

    monkeypatch.setattr(metrics.log, "exception", logged.append)
    board = Board()
    with monkeypatch.context() as patch:
        patch.setattr(Board, "tell", broken)
        for _ in range(3):
            publish(board, [at(0, 3, 3, 3)], [])
    assert len(logged) == 1 and board.failing
    publish(board, [at(0, 3, 3, 3)], [])
    assert not board.failing


def test_before_the_first_turn_there_is_nothing_to_say() -> None:
    assert Board().news([], []) == []
