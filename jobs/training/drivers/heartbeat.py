"""A job's heartbeats to control, in a thread of their own. Each says which slots the job holds, and the answer is the grant."""

import contextlib
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from ray.exceptions import RayError

from cluster.capacity.allocator import Grant, Heartbeat
from cluster.capacity.arbiter import Job
from cluster.control import client
from cluster.errors import JobFailed, PoolUnavailable
from jobs.training.drivers.grants import Heard, hear, no_control

EVERY_S = 0.25


def ignore(*_: Any) -> None: ...


class Heartbeats:
    def __init__(self, job: Job, note: Callable[[str, str], None] = ignore) -> None:
        self.job, self.note = job, note
        self.driver = uuid.uuid4().hex
        self.holds: tuple[int, int] = (0, 0)
        """Slots that the job holds, and those whose workers train."""
        self.requested = 0
        """Of the held ones, those that Ray Train requests itself."""
        self.grant: Grant | None = None
        """Control's newest answer."""
        self.answered_s = time.monotonic()
        """When control last answered; before the first time, when this began."""
        self.heard = Heard()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self.thread.start()

    def wanted(self, held: int) -> int:
        """The slots that a job without an elastic driver may have. Before control's first answer these are the slots that it holds.

        It prints the messages of `jobs.training.drivers.grants.hear`. Raises `JobFailed` if there is no control.
        """
        grant, silent_s = self.grant, time.monotonic() - self.answered_s
        if (failure := no_control(grant, silent_s)) is not None:
            raise JobFailed(*failure)
        self.heard, words = hear(self.heard, grant, silent_s, held)
        for line in words:
            print(line, flush=True)
            self.note(line, self.heard.waits_for)
        return held if grant is None else grant.slots

    def _run(self) -> None:
        while not self.done.is_set():
            # This thread must live whatever goes wrong: without it the job would never yield. `hear` says when control has been silent for
            # long.
            with contextlib.suppress(Exception):
                self.grant = client.connect().heartbeat(Heartbeat(self.job, *self.holds, self.driver, self.requested))
                self.answered_s = time.monotonic()
            self.done.wait(EVERY_S)

    def end(self) -> None:
        self.done.set()
        self.thread.join()
        with contextlib.suppress(PoolUnavailable, RayError):
            client.connect().leave(self.job.id, self.driver)
