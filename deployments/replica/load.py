"""The load of one engine, which vLLM reports after every step by its own hook for statistics."""

import time
from collections import deque
from collections.abc import Collection
from typing import Any, NamedTuple

WINDOW_S = 5.0
"""How far back first tokens count."""
STEPS_S = 1.0
"""How far back steps count. Requests that began together end together, so a single sample may find an overloaded engine idle."""
KEPT = 1_000


class Step(NamedTuple):
    """The engine's load from ``at_s`` until the next step."""

    at_s: float
    running: float
    waiting: float
    kv_use: float


class EngineLoad:
    """A vLLM stat logger (``vllm.v1.metrics.loggers.StatLoggerBase``): called after every engine step, in the replica's event loop."""

    def __init__(self) -> None:
        self.steps: deque[Step] = deque(maxlen=KEPT)
        self.first_tokens: deque[tuple[float, float]] = deque(maxlen=KEPT)
        """(when, seconds that it took)"""

    def factory(self, vllm_config: Any, engine_index: int = 0) -> "EngineLoad":
        """For ``AsyncLLM.from_engine_args(stat_loggers=[…])``, which calls it for each vLLM engine that starts here."""
        self.steps.clear()
        return self

    def record(self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0) -> None:
        now_s = time.monotonic()
        if (stats := scheduler_stats) is not None:
            self.steps.append(Step(now_s, stats.num_running_reqs, stats.num_waiting_reqs, stats.kv_cache_usage))
        if iteration_stats is not None and iteration_stats.time_to_first_tokens_iter:
            self.first_tokens.extend((now_s, took_s) for took_s in iteration_stats.time_to_first_tokens_iter)

    def log(self) -> None: ...

    def log_engine_initialized(self) -> None: ...

    def record_sleep_state(self, is_awake: int, level: int) -> None: ...

    def stats(self, now_s: float, idle: bool = False) -> dict[str, float]:
        """The fields of `deployments.autoscaling.Load`: means over the last `STEPS_S`. ``idle``: no request has been in flight for so long.
        vLLM reports no step then, and its last one may have been a busy one."""
        recent = sorted(took_s for at_s, took_s in self.first_tokens if at_s > now_s - WINDOW_S)
        steps = () if idle else since(self.steps, now_s - STEPS_S)
        return {
            "running": mean(steps, "running", now_s),
            "waiting": mean(steps, "waiting", now_s),
            "kv_use": mean(steps, "kv_use", now_s),
            "ttft_s": recent[int(0.9 * (len(recent) - 1))] if recent else 0.0,
        }


def since(steps: deque[Step], at_s: float) -> list[Step]:
    """The steps that ended after ``at_s``, from the newest back: a busy engine has a thousand, and is asked twice a second.

    >>> since(deque([Step(1.0, 1, 0, 0), Step(2.0, 2, 0, 0), Step(3.0, 3, 0, 0)]), 2.5)
    [Step(at_s=2.0, running=2, waiting=0, kv_use=0), Step(at_s=3.0, running=3, waiting=0, kv_use=0)]
    """
    found: list[Step] = []
    for step in reversed(steps):
        found.append(step)
        if step.at_s <= at_s:
            break
    return found[::-1]


def mean(steps: Collection[Step], field: str, now_s: float) -> float:
    """The mean over the last `STEPS_S`, where each step counts for as long as it lasted.

    >>> mean([Step(7.0, 4, 0, 0.1), Step(9.5, 0, 0, 0.0)], "running", now_s=10.0)
    2.0
    """
    began_s = now_s - STEPS_S
    ends_s = [*(step.at_s for step in steps), now_s][1:]
    parts = [(max(0.0, end_s - max(step.at_s, began_s)), getattr(step, field)) for step, end_s in zip(steps, ends_s, strict=True)]
    whole_s = sum(seconds for seconds, _ in parts)
    return sum(seconds * value for seconds, value in parts) / whole_s if whole_s else 0.0
