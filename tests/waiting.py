"""Waiting for something to become true, and how long that took."""

import time
from collections.abc import Callable


def when(condition: Callable[[], bool], timeout_s: float) -> float:
    """Seconds until the condition held. Fails where it does not in time."""
    began_s = time.monotonic()
    while not condition():
        assert time.monotonic() - began_s < timeout_s, f"not within {timeout_s} s"
        time.sleep(0.1)
    return time.monotonic() - began_s
