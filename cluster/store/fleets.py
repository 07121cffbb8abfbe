"""Fleets that were added while the pool runs: ``fleets/<name>/<n>.json``, append-only; the highest n counts.

A fleet of the configuration has no record here. After a restart of the pool control reads these and hosts the same fleets again.
"""

import contextlib
from typing import Any

from pydantic import Field, field_validator

from cluster.config import Config, Fleet, renamed
from cluster.errors import SpringtideError
from cluster.store.journal import Journal
from cluster.store.objects import Store
from cluster.types import Record, check_name


class FleetRecord(Record):
    """What a fleet should be from now on, or that it should be no more."""

    name: str
    n: int
    """Which record of the fleet this is, from 1."""
    overrides: dict[str, Any] = Field(default_factory=dict[str, Any])
    """What it has, or had, of its own; the rest is the ``fleet:`` section of the configuration."""
    author: str
    time_s: float
    ended: bool = False
    """Whether it was removed."""

    @field_validator("overrides")
    @classmethod
    def rename(cls, overrides: dict[str, Any]) -> dict[str, Any]:
        """A record of an older release has the keys of that release, and its fleet must still start."""
        return renamed(overrides)


class FleetRecords:
    def __init__(self, store: Store) -> None:
        self.store = store
        self._journal = Journal(store, FleetRecord)

    def names(self) -> list[str]:
        """Every fleet that was ever added at run time."""
        return self.store.children("fleets")

    def newest(self, name: str) -> FleetRecord | None:
        return self._journal.newest(f"fleets/{check_name(name)}")

    def with_declared(self, config: Config) -> dict[str, Fleet]:
        """Every fleet that there should be, by its name: those that the configuration declares, and those that were added since. A record that
        cannot be read, or is not valid any more, costs its own fleet."""
        fleets = config.fleets
        for name in self.names():
            with contextlib.suppress(SpringtideError, ValueError):
                newest = self.newest(name)
                if newest is not None and not newest.ended and name not in config.fleets:
                    fleets[name] = config.fleet_with(name, newest.overrides)
        return fleets

    def append(self, record: FleetRecord) -> FleetRecord:
        """Raises `Conflict` where somebody else was faster."""
        return self._journal.append(f"fleets/{check_name(record.name)}", record.n, record)
