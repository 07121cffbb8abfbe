"""What the engine says about its load, gathered by vLLM's own hook for statistics."""

import time
from collections import deque
from typing import Any

WINDOW_S = 5.0
"""How far back first tokens count."""
KEPT = 1_000


class EngineLoad:
    """A vLLM stat logger (``vllm.v1.metrics.loggers.StatLoggerBase``): called after every engine step, in the replica's event loop."""

    def __init__(self) -> None:
        self.running = self.waiting = 0
        self.kv_use = 0.0
        self.first_tokens: deque[tuple[float, float]] = deque(maxlen=KEPT)
        """(when, seconds that it took)"""

    def factory(self, vllm_config: Any, engine_index: int = 0) -> "EngineLoad":
        """For ``AsyncLLM.from_engine_args(stat_loggers=[…])``. A replica has one engine, and another one after that."""
        self.running = self.waiting = 0
        return self

    def record(self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0) -> None:
        if scheduler_stats is not None:
            self.running, self.waiting = scheduler_stats.num_running_reqs, scheduler_stats.num_waiting_reqs
            self.kv_use = scheduler_stats.kv_cache_usage
        if iteration_stats is not None and iteration_stats.time_to_first_tokens_iter:
            now_s = time.monotonic()
            self.first_tokens.extend((now_s, took_s) for took_s in iteration_stats.time_to_first_tokens_iter)

    def log(self) -> None: ...

    def log_engine_initialized(self) -> None: ...

    def record_sleep_state(self, is_awake: int, level: int) -> None: ...

    def stats(self, now_s: float, idle: bool = False) -> dict[str, float]:
        """What `deployments.autoscaling.Load` consists of. ``idle``: nobody is connected, although the last step may have said otherwise."""
        recent = sorted(took_s for at_s, took_s in self.first_tokens if at_s > now_s - WINDOW_S)
        return {
            "running": 0.0 if idle else float(self.running),
            "waiting": 0.0 if idle else float(self.waiting),
            "kv_use": 0.0 if idle else self.kv_use,
            "ttft_s": recent[int(0.9 * (len(recent) - 1))] if recent else 0.0,
        }
