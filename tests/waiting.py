"""Waiting for something to become true, and how long that took."""

import time
from collections.abc import Callable


def when(condition: Callable[[], bool], timeout_s: float) -> float:
    """Seconds until the condition held. Fails where it does not in time.

    Looks ten times a second, and after five seconds less often, down to three times: asking a pool how it is is work for control and
    for Serve's controller, and what is waited for needs their processors.
    """
    began_s = time.monotonic()
    while not condition():
        waited_s = time.monotonic() - began_s
        assert waited_s < timeout_s, f"not within {timeout_s} s"
        time.sleep(min(0.3, max(0.1, waited_s / 50)))
    return time.monotonic() - began_s
