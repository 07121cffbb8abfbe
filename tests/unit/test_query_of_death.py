"""A request that ends engines costs two of them at most, and takes no innocent one with it."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import Quarantined
from deployments.routing.payload import Payload
from deployments.routing.query_of_death import (
    CLEARED_BY,
    FORGET_S,
    LONGEST_S,
    MOST_SHAPES,
    PROBE_S,
    REFUSE_S,
    Loss,
    Quarantine,
    Shape,
    Suspicion,
    after_loss,
    unusual,
)

DEADLY = Shape("/v1/completions", (("echo", "true"), ("logprobs", "10")), "≤256")
PLAIN = Shape("/v1/chat/completions", (), "≤256")
OTHER = Shape("/v1/chat/completions", (("top_k", "40"),), "≤256")


def broke(replica: str) -> Loss:
    return Loss(replica, said=False, alone=True)


def died(replica: str, alone: bool = False) -> Loss:
    return Loss(replica, said=True, alone=alone)


def quarantine(*losses: Loss, shape: Shape = DEADLY, at_s: float = 0.0) -> Quarantine:
    made = Quarantine()
    for loss in losses:
        made.lost(shape, loss, at_s)
    return made


def admits(made: Quarantine, shape: Shape, now_s: float) -> bool:
    try:
        made.admit(shape, "id", now_s)
    except Quarantined:
        return False
    return True


@pytest.mark.parametrize(
    ("losses", "admitted"),
    [
        ((), True),
        ((died("a"),), True),
        ((died("a"), died("a"), died("a")), True),  # three requests in flight in one engine
        ((died("a"), died("b")), False),
        ((died("a", alone=True),), False),  # nothing else can have ended it
        ((broke("a"),), True),  # a machine that was switched off
        ((broke("a"), broke("b")), False),
    ],
)
def test_a_shape_is_refused_once_it_has_cost_enough(losses: tuple[Loss, ...], admitted: bool) -> None:
    assert admits(quarantine(*losses), DEADLY, now_s=1) is admitted


def test_what_every_request_looks_like_is_never_refused() -> None:
    assert admits(quarantine(died("a", alone=True), died("b"), died("c"), shape=PLAIN), PLAIN, now_s=1)


def test_other_shapes_are_answered_meanwhile() -> None:
    assert admits(quarantine(died("a"), died("b")), OTHER, now_s=1)


def test_the_refusal_names_the_parameters_the_wait_and_the_request() -> None:
    with pytest.raises(Quarantined) as caught:
        quarantine(died("a"), died("b")).admit(DEADLY, "mine-1", 10)
    words = str(caught.value)
    assert (caught.value.status, caught.value.retry_after_s) == (503, REFUSE_S - 10)
    assert "ended 2 engines" in words and "echo true, logprobs 10" in words and "mine-1" in words


def test_after_a_while_one_is_let_through_and_the_others_wait_for_its_answer() -> None:
    made = quarantine(died("a"), died("b"))
    assert [admits(made, DEADLY, REFUSE_S) for _ in range(3)] == [True, False, False]
    made.answered(DEADLY)
    assert [admits(made, DEADLY, REFUSE_S + 1) for _ in range(2)] == [True, False]
    assert admits(made, DEADLY, REFUSE_S + 1 + PROBE_S), "the client of the one before has left"
    for _ in range(CLEARED_BY - 1):
        made.answered(DEADLY)
    assert not made.suspicions and [admits(made, DEADLY, REFUSE_S + 90) for _ in range(3)] == [True] * 3


def test_each_further_engine_doubles_the_wait_up_to_an_hour() -> None:
    made, now_s, waits = quarantine(died("a"), died("b")), 0.0, list[float]()
    for turn in range(8):
        waits.append(made.suspicions[DEADLY].until_s - now_s)
        now_s = made.suspicions[DEADLY].until_s
        assert admits(made, DEADLY, now_s)
        made.lost(DEADLY, died(f"more-{turn}"), now_s)
    assert waits[:4] == [60, 120, 240, 480] and waits[-1] == LONGEST_S


def test_a_loss_of_long_ago_counts_no_more() -> None:
    made = quarantine(died("a"))
    made.lost(DEADLY, died("b"), FORGET_S + 1)
    assert admits(made, DEADLY, FORGET_S + 2)


def test_answers_clear_a_shape_that_was_there_by_chance() -> None:
    made = quarantine(died("a"))
    for _ in range(CLEARED_BY):
        made.answered(DEADLY)
    made.lost(DEADLY, died("b"), 1)
    assert admits(made, DEADLY, 2)


losses = st.builds(Loss, st.sampled_from("abcdef"), st.booleans(), st.booleans())
steps = st.lists(st.tuples(st.floats(0, 2_000), st.one_of(losses, st.sampled_from(["answer", "ask"]))), max_size=40)


@given(steps)
def test_whatever_happens_a_shape_is_asked_for_again_within_the_longest_wait(steps: list[tuple[float, Any]]) -> None:
    made, now_s = Quarantine(), 0.0
    for pause_s, step in steps:
        now_s += pause_s
        if isinstance(step, Loss):
            made.lost(DEADLY, step, now_s)
        elif step == "answer":
            made.answered(DEADLY)
        else:
            admits(made, DEADLY, now_s)
    assert admits(made, DEADLY, now_s + LONGEST_S)


@given(steps)
def test_while_a_shape_is_refused_at_most_one_is_under_way(steps: list[tuple[float, Any]]) -> None:
    made, now_s, let_s = quarantine(died("x"), died("y")), 0.0, -PROBE_S
    for pause_s, _ in steps:
        now_s += pause_s
        before = made.suspicions.get(DEADLY)
        if admits(made, DEADLY, now_s) and before is not None and not before.stale(now_s):
            assert now_s >= let_s + PROBE_S
            let_s = now_s


@given(st.lists(losses, min_size=1, max_size=6))
def test_each_engine_counts_once_whatever_the_order(losses: list[Loss]) -> None:
    after: Suspicion | None = None
    for loss in losses:
        after = after_loss(after, loss, 5)
    assert after is not None and after.replicas == {loss.replica for loss in losses}


def test_a_gateway_remembers_so_many_shapes_and_no_more() -> None:
    made = Quarantine()
    for n in range(2 * MOST_SHAPES):
        made.lost(Shape("/v1/completions", (("top_k", str(n)),), "≤16"), died("a"), n)
    assert len(made.suspicions) == MOST_SHAPES and min(one.lost_s for one in made.suspicions.values()) == MOST_SHAPES


# shapes

SECRET = "hunter2"


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": SECRET, "echo": True},
        {"messages": [{"role": "user", "content": SECRET}], "tools": [{"function": {"name": SECRET}}]},
        {"prompt": "a", "response_format": {"type": SECRET, SECRET: 1, "json_schema": {"name": SECRET}}},
        {"prompt": "a", "structured_outputs": {"regex": SECRET}, "tool_choice": SECRET},
        {"prompt": "a", SECRET: 1, "bad_words": [SECRET], "chat_template_kwargs": {SECRET: SECRET}},
        {"prompt": "a", "stop": SECRET, "user": SECRET, "reasoning_effort": SECRET, "logit_bias": {SECRET: 1}},
    ],
)
def test_a_shape_holds_nothing_that_the_client_wrote(body: dict[str, Any]) -> None:
    assert SECRET not in str(Payload(body).shape("/v1/completions"))


def test_a_shape_names_parameters_their_values_and_classes_of_size() -> None:
    body = {
        "model": "m", "prompt": "x" * 300, "temperature": 0.3, "echo": True, "logprobs": 5, "min_p": None, "ignore_eos": False,
        "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}, "mine": 1,
    }  # fmt: skip
    assert unusual(body) == (
        ("echo", "true"),
        ("logprobs", "5"),
        ("other parameters", "1"),
        ("response_format.json_schema", "object ≤256"),
        ("response_format.type", "json_schema"),
    )
    assert Payload(body).shape("/v1/completions").body == "≤4096"


def test_two_texts_under_the_same_parameters_have_one_shape() -> None:
    one, other = ({"prompt": text, "seed": seed, "prompt_logprobs": 1} for text, seed in (("Who?", 1), ("Where?", 2)))
    assert Payload(one).shape("/v1/completions") == Payload(other).shape("/v1/completions")
    assert Payload(one).shape("/v1/completions") != Payload({**one, "prompt_logprobs": 2}).shape("/v1/completions")


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from(["structured_outputs", "response_format", "logprobs", "tools", "stop", "prompt"]) | st.text(max_size=9)


@given(st.dictionaries(names, json_values, max_size=6))
def test_any_body_has_a_shape_that_stays_small(body: dict[str, Any]) -> None:
    shape = Payload(body).shape("/v1/completions")
    assert len(str(shape)) < 1_000 and hash(shape) is not None
