"""How many replicas the engines' load wants."""

import time
from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from deployments.autoscaling import Load, LoadPolicy, Target, replicas_for
from deployments.replica.load import WINDOW_S, EngineLoad, Step

CONFIG = SimpleNamespace(target_ongoing_requests=32)
LOADS = st.lists(
    st.builds(Load, *(st.floats(0, 200) for _ in range(2)), st.floats(0, 1), st.floats(0, 5)), min_size=1, max_size=8
)


@given(LOADS)
def test_more_load_never_wants_fewer(loads: list[Load]) -> None:
    busier = [load._replace(running=load.running + 50, kv_use=min(1, load.kv_use * 2)) for load in loads]
    assert replicas_for(busier, Target()) >= replicas_for(loads, Target())


@given(LOADS)
def test_every_engine_would_be_within_its_targets(loads: list[Load]) -> None:
    wanted, target = replicas_for(loads, Target()), Target()
    assert sum(load.running + load.waiting for load in loads) <= wanted * target.running + 1e-6
    assert sum(load.kv_use for load in loads) <= wanted * target.kv_use + 1e-6


def test_nobody_asks_for_anything_wants_nothing() -> None:
    assert replicas_for([Load(), Load()], Target()) == 0
    assert replicas_for([], Target()) == 0


def test_a_late_first_token_wants_one_more_where_requests_wait_and_keeps_what_there_is_where_none_do() -> None:
    late = Load(running=4, waiting=2, ttft_s=2.0)
    assert replicas_for([late, late], Target()) == 3
    assert replicas_for([late._replace(waiting=0)] * 2, Target()) == 2


def test_the_policy_reads_what_serve_aggregates_by_replica() -> None:
    metrics = {"running": {"a": 30.0, "b": 20.0}, "waiting": {"a": 20.0, "b": 0.0}, "kv_use": {"a": 0.2}, "ttft_s": {}}
    context = SimpleNamespace(config=CONFIG, aggregated_metrics=metrics, current_num_replicas=2, target_num_replicas=2)
    assert LoadPolicy(0.8, 1.0)(context) == (3, {})


def test_a_replica_that_says_nothing_keeps_what_there_is() -> None:
    context = SimpleNamespace(
        config=CONFIG, aggregated_metrics={"running": {"a": 0.0}}, current_num_replicas=2, target_num_replicas=3
    )
    assert LoadPolicy(0.8, 1.0)(context) == (3, {})
    context.current_num_replicas = 1
    assert LoadPolicy(0.8, 1.0)(context) == (0, {})


def test_a_fleet_asks_for_no_more_than_its_ceiling() -> None:
    """Another fleet needs the slots more; a load that asks for everything gives replicas back."""
    metrics = {"running": {"a": 90.0, "b": 90.0}, "ceiling": {"a": 1.0, "b": 1.0}}
    context = SimpleNamespace(config=CONFIG, aggregated_metrics=metrics, current_num_replicas=2, target_num_replicas=2)
    assert LoadPolicy(0.8, 1.0)(context) == (1, {})
    context.current_num_replicas = 3
    assert LoadPolicy(0.8, 1.0)(context) == (1, {}), "one that is too busy to say anything is no reason to keep more"


def test_a_fleet_keeps_as_many_replicas_as_its_adapters_need() -> None:
    """Scaled down, the adapters beyond one replica's places had no replica to answer for them."""
    metrics = {"running": {"a": 0.0, "b": 1.0}, "floor": {"a": 3.0, "b": 0.0}}
    context = SimpleNamespace(config=CONFIG, aggregated_metrics=metrics, current_num_replicas=2, target_num_replicas=2)
    assert LoadPolicy(0.8, 1.0)(context) == (3, {}), "one that has just started has not heard it yet"
    metrics["running"]["b"] = 0.0
    assert LoadPolicy(0.8, 1.0)(context) == (3, {}), "Serve would keep one for minutes before it lets all sleep"
    metrics["ceiling"] = {"a": 1.0}
    assert LoadPolicy(0.8, 1.0)(context) == (1, {}), "another fleet needs the slots more"


def test_first_tokens_count_for_some_seconds_only() -> None:
    load = EngineLoad()
    load.record(SimpleNamespace(num_running_reqs=3, num_waiting_reqs=1, kv_cache_usage=0.5), None)
    load.record(None, SimpleNamespace(time_to_first_tokens_iter=[0.1, 0.2, 3.0]))
    now_s = time.monotonic()
    assert load.stats(now_s) == {"running": 3.0, "waiting": 1.0, "kv_use": 0.5, "ttft_s": 0.2}
    assert load.stats(now_s + WINDOW_S + 1)["ttft_s"] == 0.0
    assert load.stats(now_s, idle=True)["running"] == 0.0


def test_requests_that_end_together_do_not_look_like_an_engine_without_work() -> None:
    """Twelve streams in step: between one answer and the next nothing runs for a moment, in which somebody looks."""
    load = EngineLoad()
    now_s = time.monotonic()
    for began_s in (now_s - 3, now_s - 2, now_s - 1):
        load.steps += [Step(began_s, 12, 0, 0.4), Step(began_s + 0.95, 0, 0, 0.0)]
    assert load.stats(now_s)["running"] > 10
