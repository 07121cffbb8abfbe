"""What this gateway sees of a canary and of the stable version beside it. Nothing is measured while no canary runs."""

import re
import time
from collections import Counter, deque
from dataclasses import dataclass, field

from cluster.publishing.canary import KEPT, Tally
from cluster.types import Generation, VersionId
from deployments.wire import EVENT_END

FINISH = re.compile(rb'"(?:finish|stop)_reason":\s*"(\w+)"')
"""OpenAI's name for it and Anthropic's."""


@dataclass
class Trace:
    """One request's course."""

    start_s: float = field(default_factory=time.monotonic)
    first_s: float = 0.0
    end_s: float = 0.0
    events: int = 0
    finish: str = ""
    failed: bool = False
    text: list[bytes] | None = None
    """Everything that was answered, where a shadow is to be compared with it."""

    def saw(self, chunk: bytes) -> None:
        """Bytes of the answer, whole events or a whole document."""
        self.end_s = time.monotonic()
        self.first_s = self.first_s or self.end_s
        self.events += chunk.count(EVENT_END)
        if found := FINISH.search(chunk):
            self.finish = found[1].decode()
        if self.text is not None:
            self.text.append(chunk)


@dataclass
class _Sums:
    requests: int = 0
    errors: int = 0
    ttft_s: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    itl_s: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    finish: Counter[str] = field(default_factory=Counter[str])
    shadowed: int = 0
    disagreed: int = 0
    shadows_failed: int = 0

    def add(self, trace: Trace) -> None:
        self.requests += 1
        self.errors += trace.failed
        if trace.failed or not trace.first_s:
            return
        self.ttft_s.append(trace.first_s - trace.start_s)
        if trace.events > 1:
            self.itl_s.append((trace.end_s - trace.first_s) / (trace.events - 1))
        if trace.finish:
            self.finish[trace.finish] += 1

    def tally(self) -> Tally:
        return Tally(
            self.requests,
            self.errors,
            tuple(self.ttft_s),
            tuple(self.itl_s),
            dict(self.finish),
            self.shadowed,
            self.disagreed,
            self.shadows_failed,
        )


class Recorder:
    """Tallies per version of the rollouts that run, kept while their alias has a canary. Forgotten with this process."""

    def __init__(self) -> None:
        self.sums: dict[tuple[str, int | None], dict[str, _Sums]] = {}

    def trace(self, move: Generation | None, keep_text: bool) -> Trace | None:
        """A trace where there is something to compare, None where a request need not pay for one."""
        return Trace(text=[] if keep_text else None) if move is not None and move.canary is not None else None

    def record(self, move: Generation, version: VersionId, trace: Trace) -> None:
        self._of(move, version).add(trace)

    def shadow(self, move: Generation, canary: VersionId, agrees: bool, failed: bool) -> None:
        """A request of the stable version that the canary answered too."""
        sums = self._of(move, canary)
        sums.shadowed += 1
        sums.disagreed += not agrees and not failed
        sums.shadows_failed += failed

    def _of(self, move: Generation, version: VersionId) -> _Sums:
        key = (move.alias, move.rollout)
        if any(alias == move.alias and (rollout or 0) > (move.rollout or 0) for alias, rollout in self.sums):
            return _Sums()  # a late answer of a rollout that is over
        if key not in self.sums:  # another rollout of this alias is over
            self.sums = {other: sums for other, sums in self.sums.items() if other[0] != move.alias} | {key: {}}
        return self.sums[key].setdefault(str(version), _Sums())

    def measured(self, alias: str, rollout: int) -> dict[str, Tally]:
        return {id: sums.tally() for id, sums in self.sums.get((alias, rollout), {}).items()}
