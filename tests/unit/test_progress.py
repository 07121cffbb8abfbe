"""What a run says of how long it takes."""

from typing import Any

import pytest

from jobs.training import progress
from jobs.training.progress import ProgressPrinter


@pytest.mark.parametrize("rank", [0, 1])
def test_after_ten_steps_the_first_worker_says_once_how_long_the_run_takes(rank: int, monkeypatch: Any, capsys: Any) -> None:
    now_s = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now_s)
    printer = ProgressPrinter("finetune", rank, step=40)
    for step in range(41, 80):
        now_s += 60 if step <= 42 else 2  # the first steps are slow
        printer(step, 410, 1.5, 0)
    said = [line for line in capsys.readouterr().out.splitlines() if "left" in line]
    assert said == ([] if rank else ["about 12 min left for 360 steps"])


def test_a_run_of_few_steps_says_nothing_of_it(capsys: Any) -> None:
    printer = ProgressPrinter("finetune", 0)
    for step in range(1, 11):
        printer(step, 10, 1.5, 0)
    assert "left" not in capsys.readouterr().out
