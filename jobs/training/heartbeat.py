"""A job's side of the allocator: what it holds is said to control, and what it may have is heard, beside everything else."""

import contextlib
import threading
import uuid
from collections.abc import Callable

from ray.exceptions import RayError

from cluster.capacity.allocator import Grant, Heartbeat
from cluster.capacity.arbiter import Job, counted
from cluster.control import client
from cluster.errors import PoolUnavailable

ASK_S = 0.25
"""How often control is asked what the job has."""


class Heartbeats:
    """Says to control, beside everything else, that the job lives and what it holds, and hears what it may have."""

    def __init__(self, job: Job, note: Callable[[str], None]) -> None:
        self.job, self.note = job, note
        self.driver = uuid.uuid4().hex
        self.holds: tuple[int, int] = (0, 0)
        """Slots held, and those that train."""
        self.grant: Grant | None = None
        self.said = ""
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self.thread.start()

    def wanted(self, held: int) -> int:
        """Slots that the job may have; what it holds while control does not answer."""
        grant = self.grant
        if grant is None:
            return held
        self._say("" if grant.slots or held else grant.reason, grant.slots)
        return grant.slots

    def _say(self, why: str, slots: int) -> None:
        """Once, that it waits and ``why``, and once that it does not any more."""
        if why != self.said:
            words = f"waiting for slots: {why}" if why else f"may have {counted(slots)}"
            print(words, flush=True)
            self.note(words)
        self.said = why

    def _run(self) -> None:
        while not self.done.is_set():
            # Whatever it was, nothing changes meanwhile; a job that heard no more would never yield.
            with contextlib.suppress(Exception):
                self.grant = client.connect().heartbeat(Heartbeat(self.job, *self.holds, self.driver))
            self.done.wait(ASK_S)

    def end(self) -> None:
        self.done.set()
        self.thread.join()
        with contextlib.suppress(PoolUnavailable, RayError):
            client.connect().leave(self.job.id, self.driver)
