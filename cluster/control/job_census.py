"""Looks at every job of the store, the newest first and some at a time: when control starts, and once an hour.

A job that has not ended is watched (`JobReaper.find`): a control before this one may have known it, however old it is. When all have been looked
at, `outdated` decides what the store keeps in vain, and that is deleted.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import NamedTuple

from cluster.errors import JobNotFound
from cluster.store.jobs import Damaged, JobStore

KEEP_EVENTS = 1000
"""The newest of the jobs that have ended keep their events. The others keep their spec and their result, which says where they were."""
KEEP_UPLOAD_S = 86_400
"""How long an upload stays that no unfinished job names. Whoever needs it again sends it again; the same bytes get the same name."""
EVERY_S = 3600
AT_ONCE = 100
"""Jobs that are looked at, or cleaned, before the jobs under way have their turn: a bucket answers so many questions in some seconds."""


class Facts(NamedTuple):
    ended: tuple[str, ...]
    """Jobs that have ended, the newest first."""
    uploads: Mapping[str, float]
    """Upload → when it was written, in seconds since the epoch."""
    named: frozenset[str] | None
    """Uploads that unfinished jobs or the configuration name. None where the spec of an unfinished job cannot be read."""


class Outdated(NamedTuple):
    events: tuple[str, ...]
    """Jobs whose events go."""
    uploads: tuple[str, ...]


def outdated(facts: Facts, now_s: float) -> Outdated:
    """What nobody needs any more. Pure.

    >>> outdated(Facts(("b", "a"), {"0a": 0.0, "0b": 0.0, "0c": 99_000.0}, frozenset({"0b"})), now_s=100_000.0)
    Outdated(events=(), uploads=('0a',))
    """
    old = () if facts.named is None else (name for name, at_s in facts.uploads.items() if now_s - at_s > KEEP_UPLOAD_S)
    return Outdated(facts.ended[KEEP_EVENTS:], tuple(name for name in old if name not in (facts.named or ())))


def uploads_in(sources: Iterable[object]) -> Iterator[str]:
    """
    >>> list(uploads_in(["upload:0a#lines.jsonl", "s3://bucket/lines.jsonl", 3]))
    ['0a']
    """
    return (
        one.removeprefix("upload:").partition("#")[0] for one in sources if isinstance(one, str) and one.startswith("upload:")
    )


class Census:
    """Of one store. Used by one thread."""

    def __init__(
        self, jobs: JobStore, watch: Callable[[list[str]], None], configured: Callable[[], Iterable[object]] = tuple
    ) -> None:
        """``watch`` hears of jobs that may not have ended. ``configured``: the files that the configuration names."""
        self.jobs, self.watch, self.configured = jobs, watch, configured
        self.ended: set[str] = set()
        """Jobs that are known to have ended: nobody asks for them again."""
        self.cleaned: set[str] = set()
        """Jobs whose events are deleted."""
        self.round: Iterator[None] | None = None
        self.due_s = float("-inf")

    def go_on(self) -> None:
        """Do the next part of what is due. Raises what the store raises; the round begins anew then, and what was learnt counts."""
        if self.round is None and time.monotonic() < self.due_s:
            return
        self.round = self.round or self._round()
        try:
            next(self.round)
        except StopIteration:
            self.round, self.due_s = None, time.monotonic() + EVERY_S
        except Exception:
            self.round = None
            raise

    def _round(self) -> Iterator[None]:
        for some in portions(id for id in self.jobs.by_age() if id not in self.ended):
            self.watch(some)
            self.ended.update(id for id in some if self._has_ended(id))
            yield
        gone = outdated(self._facts(), time.time())
        written = self.jobs.store.written("uploads") if gone.uploads else {}
        for name in gone.uploads:
            if (
                time.time() - written.get(name, time.time()) > KEEP_UPLOAD_S
            ):  # or somebody has just sent it again for a job to come
                self.jobs.store.delete(f"uploads/{name}")
        for some in portions(id for id in gone.events if id not in self.cleaned):
            for id in some:
                self.jobs.forget_events(id)
                self.cleaned.add(id)
            yield

    def _has_ended(self, id: str) -> bool:
        try:
            return self.jobs.result(id) is not None
        except Damaged:
            return False

    def _facts(self) -> Facts:
        """Uploads before jobs: a job that came meanwhile is looked at."""
        uploads, ids = self.jobs.store.written("uploads"), self.jobs.by_age()
        return Facts(tuple(id for id in ids if id in self.ended), uploads, self._named(id for id in ids if id not in self.ended))

    def _named(self, unfinished: Iterable[str]) -> frozenset[str] | None:
        named = set(uploads_in(self.configured()))
        for id in unfinished:
            try:
                named.update(uploads_in(self.jobs.spec(id).options.values()))
            except Damaged:
                return None
            except JobNotFound:
                continue  # nobody was asked to do anything
        return frozenset(named)


def portions(ids: Iterable[str]) -> Iterator[list[str]]:
    left = iter(ids)
    while some := list(islice(left, AT_ONCE)):
        yield some
