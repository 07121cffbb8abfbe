"""Progress lines: ``progress stage=… step=12/100 loss=1.2345 tokens_per_s=5310 eta_s=17``. `cluster.pool.submit.progress` reads them."""

import time


class Progress:
    """Prints them from rank 0: at most one per ``every_s``, but always the first step and the last."""

    def __init__(self, stage: str, rank: int, step: int = 0, tokens: int = 0, every_s: float = 1.0) -> None:
        """``step`` and ``tokens``: what was done before, which counts neither for the speed nor for the time that is left."""
        self.stage = stage
        self.every_s = every_s
        self.before = step, tokens
        self.started_s = time.monotonic()
        self.printed_s = float("-inf")
        self.first = rank == 0

    def __call__(self, step: int, steps: int, loss: float, tokens: int) -> None:
        """``tokens`` counts from the start of the run."""
        now_s = time.monotonic()
        if self.first and (now_s - self.printed_s >= self.every_s or step == steps):
            self.printed_s = now_s
            print(line(self.stage, step, steps, loss, tokens, now_s - self.started_s, self.before), flush=True)


def line(stage: str, step: int, steps: int, loss: float, tokens: int, elapsed_s: float, before: tuple[int, int] = (0, 0)) -> str:
    """
    >>> line("finetune", 25, 100, 1.23456, 5000, 10.0)
    'progress stage=finetune step=25/100 loss=1.2346 tokens_per_s=500 eta_s=30'
    >>> line("finetune", 60, 100, 1.0, 9000, 10.0, before=(50, 8000))
    'progress stage=finetune step=60/100 loss=1.0000 tokens_per_s=100 eta_s=40'
    """
    per_s, eta_s = (tokens - before[1]) / max(elapsed_s, 1e-9), elapsed_s / max(1, step - before[0]) * (steps - step)
    return f"progress stage={stage} step={step}/{steps} loss={loss:.4f} tokens_per_s={per_s:.0f} eta_s={eta_s:.0f}"
