"""Members come and go, and what is learnt stays the same: real processes and process groups, no Ray."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.training.worker import ProcessGroup, Worker
from tests.members import EXAMPLES, Group, Small

EPOCHS = 600
STEPS = EPOCHS * 5


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Group]:
    group = Group(tmp_path, EPOCHS)
    yield group
    group.leave()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> float:
    """The loss at the end of a run that nobody disturbs."""
    group = Group(tmp_path_factory.mktemp("alone"), EPOCHS)
    group.come(0)
    group.learn(0)
    [end] = group.hear(0)
    group.leave()
    assert end.ended and end.step == STEPS
    return end.metrics["eval_loss"]


def test_three_then_one_then_two_then_three_learn_what_one_alone_does(group: Group, alone: float, tmp_path: Path) -> None:
    """From every example once an epoch."""
    (tmp_path / "seen").mkdir()
    group.settings["seen"] = str(tmp_path / "seen")
    group.come(0, 1, 2)
    first = 0
    for members, told in (((0, 1, 2), 1), ((0,), 0), ((0, 2), 2)):
        group.learn(*members)
        time.sleep(0.5)
        group.stop(told)
        outcomes = group.hear(*members)
        assert {one.first for one in outcomes} == {first} and len({one.step for one in outcomes}) == 1
        first = outcomes[0].step
        assert 0 < first < STEPS
    group.leave(1)
    group.come(1)  # it knows nothing, and takes over what the others know
    group.learn(0, 1, 2)
    ends = group.hear(0, 1, 2)
    assert {one.first for one in ends} == {first} and [one.ended for one in ends] == [True, False, False]
    assert {one.metrics["eval_loss"] for one in ends} == {ends[0].metrics["eval_loss"]}
    seen = Counter(example for file in (tmp_path / "seen").iterdir() for example in file.read_text().split())
    assert seen == {str(example): EPOCHS for example in range(EXAMPLES)}
    assert ends[0].metrics["eval_loss"] == pytest.approx(alone, rel=1e-3)


def test_a_member_that_is_killed_within_a_step_costs_no_step(group: Group, alone: float) -> None:
    group.come(0, 1, 2)
    group.learn(0, 1, 2)
    time.sleep(0.7)
    group.kill(2)
    broken = group.hear(0, 1)
    assert all(one.broken for one in broken) and max(one.step for one in broken) > 0
    group.learn(0, 1)
    ends = group.hear(0, 1)
    assert ends[0].first == max(one.step for one in broken)
    assert ends[0].metrics["eval_loss"] == pytest.approx(alone, rel=1e-3)


def test_everybody_leaves_and_others_go_on_from_what_was_kept(group: Group, alone: float) -> None:
    group.come(0, 1)
    group.learn(0, 1)
    time.sleep(0.5)
    group.stop(1)
    stopped = group.hear(0, 1)
    assert group.settle(0) == stopped[0].step
    group.leave(0, 1)
    group.come(2)
    group.learn(2)
    [end] = group.hear(2)
    assert end.first == stopped[0].step and end.metrics["eval_loss"] == pytest.approx(alone, rel=1e-3)


def test_who_comes_back_alone_goes_on_from_what_others_did_meanwhile(group: Group, alone: float) -> None:
    group.come(0, 1)
    group.learn(0, 1)
    time.sleep(0.2)
    group.stop(1)
    left = group.hear(0, 1)[1].step
    group.learn(0)
    time.sleep(0.3)
    group.stop(0)
    [kept] = group.hear(0)
    assert group.settle(0) == kept.step > left
    group.leave(0)
    group.learn(1)
    [end] = group.hear(1)
    assert end.first == kept.step and end.metrics["eval_loss"] == pytest.approx(alone, rel=1e-3)


def test_where_a_formation_met_is_gone_before_anybody_leaves(tmp_path: Path) -> None:
    """PyTorch waits for its file, if it vanishes while a member leaves: for ten minutes, and with the slots."""
    settings = {"epochs": 2, "stage": "small", "checkpoint_s": 3600, "report_s": 3600}
    member = Worker(Small, settings, (tmp_path / "store").as_uri(), "run")
    member.work, seen = Small(settings), list[bool]()
    member.work.optimizer.register_step_post_hook(lambda *_: seen.append(folder.exists()))
    meeting = member.meeting(alone=True)
    folder = Path(meeting.removeprefix("file://")).parent
    assert folder.exists() and member.reached()[:2] == (-1, False)
    assert member.learn(ProcessGroup(1, 0, 1, meeting)).ended and member.reached()[:2] == (10, False) and member.trains(1)
    assert seen == [False] * 10


class Slow(Small):
    """Its optimizer takes a moment between the tensors and the end of the step; remembers what every step began with."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.began = list[torch.Tensor]()
        self.optimizer.register_step_post_hook(lambda *_: time.sleep(0.002))

    def gradients(self, batch: list[int], rank: int, world: int) -> tuple[torch.Tensor, int]:
        self.began.append(self.trained[0].detach().clone())
        return super().gradients(batch, rank, world)


def test_what_is_kept_while_it_trains_is_the_state_of_one_moment(tmp_path: Path) -> None:
    member = Worker(Slow, {"epochs": 60, "stage": "small", "checkpoint_s": 3600, "report_s": 3600}, tmp_path.as_uri(), "run")
    member.work = work = Slow(member.settings)
    training = threading.Thread(target=member.learn, args=(ProcessGroup(1, 0, 1, member.meeting(alone=True)),))
    training.start()
    seen = dict[int, torch.Tensor]()
    while training.is_alive():
        member.keep()
        if newest := member.checkpoints.newest():
            seen[newest.step] = newest.tensors["0"]
    training.join()
    assert len(seen) > 10 and all(torch.equal(weights, work.began[step]) for step, weights in seen.items() if step < 300)
