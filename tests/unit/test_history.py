"""The history checker finds each kind of wrong history, and passes a right one."""

from typing import Any

import pytest

from tests.history import Event, problems

EXPECTED = {("m@1", "hi"): "one", ("m@2", "hi"): "two"}


def event(start_s: float, version: str, generation: int, **other: Any) -> Event:
    text = EXPECTED[version, "hi"]
    return Event(**{"start_s": start_s, "end_s": start_s + 1, "session": "s", "alias": "m", "prompt": "hi", "version": version,
                    "generation": generation, "text": text} | other)  # fmt: skip


GOOD = [event(0, "m@1", 1), event(1, "m@1", 1), event(2, "m@2", 2), event(3, "m@1", 3)]


def test_a_publish_and_a_rollback_are_a_good_history() -> None:
    assert problems(GOOD, EXPECTED, {"m@2": 2.5}) == []


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (event(4, "m@1", 3, error="truncated"), "failed: truncated"),
        (event(4, "m@1", 3, text="two"), "does not answer"),
        (event(4, "m@1", 1), "went back from generation 3 to 1"),
        (event(4, "m@2", 3), "saw ['m@1', 'm@2'] in generation 3"),
        (event(4, "m@2", 4), "after its rollback"),
    ],
)
def test_each_wrong_is_found(bad: Event, words: str) -> None:
    (found,) = [problem for problem in problems([*GOOD, bad], EXPECTED, {"m@2": 2.5}) if words in problem]
    assert found


def test_two_sessions_may_see_two_versions_in_one_generation() -> None:
    assert problems([event(0, "m@1", 2), event(0, "m@2", 2, session="other")], EXPECTED) == []
