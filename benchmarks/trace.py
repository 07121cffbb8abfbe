"""When requests come: a day of traffic in some minutes, with bursts, or a recorded one. Pure but for reading the file."""

import csv
import math
import random
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from cluster.errors import DataError


class Shape(NamedTuple):
    """Requests per second over time."""

    duration_s: float
    low: float
    """At night."""
    high: float
    """At noon."""
    bursts: tuple[float, ...] = (0.15, 0.5, 0.8)
    """Where they begin, as a share of the duration."""
    burst_factor: float = 3.0
    """As Azure's traces of LLM requests have them within a minute (DynamoLLM, HPCA '25)."""
    burst_s: float = 40.0
    rise_s: float = 5.0

    def rate(self, at_s: float) -> float:
        """A cosine from night to noon and back, times the burst that there is: it rises within `rise_s`, stays, and falls as it rose."""
        day = self.low + (self.high - self.low) * (1 - math.cos(2 * math.pi * at_s / self.duration_s)) / 2
        strongest = max((self._strength(at_s - share * self.duration_s) for share in self.bursts), default=0.0)
        return day * (1 + (self.burst_factor - 1) * strongest)

    def _strength(self, since_s: float) -> float:
        """0 before and after, 1 at the burst's height."""
        return max(0.0, min(1.0, since_s / self.rise_s, (self.burst_s - since_s) / self.rise_s))


def arrivals(shape: Shape, seed: int) -> list[float]:
    """Seconds from the start at which requests come: a Poisson process of the shape's rate (Lewis and Shedler's thinning)."""
    generator = random.Random(seed)  # noqa: S311 (reproducible, not secret)
    most = shape.high * shape.burst_factor
    times_s: list[float] = []
    at_s = generator.expovariate(most)
    while at_s < shape.duration_s:
        if generator.random() * most < shape.rate(at_s):
            times_s.append(at_s)
        at_s += generator.expovariate(most)
    return times_s


def recorded(path: Path, duration_s: float, mean_per_s: float, seed: int) -> list[float]:
    """Arrivals of a trace file, stretched to the duration and thinned, or sent more than once, to the mean rate.

    A CSV file whose first column is the time, in seconds or as a timestamp: Azure's LLM inference traces are such files
    (github.com/Azure/AzurePublicDataset). Raises `DataError`.
    """
    times_s = sorted(_times(path))
    if len(times_s) < 2 or times_s[-1] == times_s[0]:
        raise DataError(f"{path} has no times to replay.", "Give a CSV file whose first column is the time of a request.")
    scale = duration_s / (times_s[-1] - times_s[0])
    copies = mean_per_s * duration_s / len(times_s)
    generator = random.Random(seed)  # noqa: S311
    stretched = ((at_s - times_s[0]) * scale for at_s in times_s)
    return sorted(at_s + generator.random() * scale for at_s in stretched for _ in range(_count(copies, generator)))


def _count(copies: float, generator: random.Random) -> int:
    return int(copies) + (generator.random() < copies % 1)


def _times(path: Path) -> Iterable[float]:
    try:
        rows = list(csv.reader(path.read_text("utf-8").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}.", "Give a CSV file.") from error
    return [time for row in rows if row and (time := seconds(row[0])) is not None]  # the first row may name the columns


def seconds(text: str) -> float | None:
    """
    >>> seconds("12.5"), seconds("1970-01-01 00:01:00.5000000+00:00"), seconds("TIMESTAMP")
    (12.5, 60.5, None)
    """
    try:
        return float(text)
    except ValueError:
        pass
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None
