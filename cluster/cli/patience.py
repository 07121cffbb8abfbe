"""Asks a pool again and again, also while its gateway or control restarts."""

import time
from collections.abc import Callable
from typing import Generic, TypeVar

from cluster.errors import PoolUnavailable

GONE_S = 60
"""How long a gateway that has answered may be silent. A restart takes some time."""

Known = TypeVar("Known")


class Patient(Generic[Known]):
    """Asks on every call. While the gateway is silent it returns the last answer, and after `GONE_S` it raises `PoolUnavailable`."""

    def __init__(self, ask: Callable[[], Known], known: Known) -> None:
        self.ask = ask
        self.known = known
        self.heard_s = time.monotonic()

    def __call__(self) -> Known:
        try:
            self.known = self.ask()
            self.heard_s = time.monotonic()
        except PoolUnavailable:
            if time.monotonic() - self.heard_s > GONE_S:
                raise
        return self.known
