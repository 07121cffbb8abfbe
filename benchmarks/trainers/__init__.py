"""One trainer in a process of its own: ``python -m benchmarks.trainers.NAME JOB`` trains as the `Assignment` in the file JOB says, and prints one
line of JSON, a `Finding`."""

import json
import resource
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Assignment:
    """What all trainers of a case do alike."""

    base: str
    """Folder in Hugging Face layout."""
    batches: list[list[dict[str, Any]]]
    """The examples of each step, in order: ``{"input_ids", "prompt_tokens"}``. Trainers may not change which examples share a step."""
    lora: dict[str, Any] | None
    """``{"rank", "alpha"}``; None where all weights are trained."""
    learning_rate: float
    """Falls in a straight line to zero."""
    warm_steps: int
    """Steps before the clock runs."""
    threads: int
    precision: str
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    """Springtide's: those of its `Work`, without the recipe. The rows of a fine-tuning are those of the batches."""


@dataclass(frozen=True)
class Finding:
    tokens: int
    """All tokens of the examples, without padding, in the steps under the clock."""
    seconds: float
    losses: list[float]
    """Of every step, in nats per answer token."""
    peak_memory_mb: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


class Clock:
    """Runs from the end of the warm steps on."""

    def __init__(self, assignment: Assignment) -> None:
        self.assignment = assignment
        self.losses: list[float] = []
        self.began_s = time.perf_counter()

    def step(self, loss: float) -> None:
        self.losses.append(loss)
        if len(self.losses) == self.assignment.warm_steps:
            self.began_s = time.perf_counter()

    def finding(self) -> Finding:
        timed = self.assignment.batches[self.assignment.warm_steps :]
        tokens = sum(len(example["input_ids"]) for batch in timed for example in batch)
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return Finding(tokens, time.perf_counter() - self.began_s, self.losses, peak_mb)


def assignment() -> Assignment:
    """The one that the command line names."""
    return Assignment(**json.loads(Path(sys.argv[1]).read_text()))


def tell(finding: Finding) -> None:
    print(json.dumps(asdict(finding)), flush=True)
