"""The time of day by a clock that does not jump, for deadlines.

Example: somebody sets the machine's clock an hour ahead. By `time.time`, every job would have been silent for an hour and lose its slots, and
a rollout would be overdue. Time in which the machine sleeps counts. A control that starts again takes the time of day as it is then.
"""

import time


def _since_boot_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


_BOOTED_S = time.time() - _since_boot_s()


def now_s() -> float:
    """Seconds since the epoch, by the machine's clock as it was set when this process began."""
    return _BOOTED_S + _since_boot_s()
