"""A job's log from an offset on: followers ask again and again, and nobody reads the whole of it each time."""

import codecs
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.errors import BadRequest, JobNotFound
from cluster.pool.submit import JobServer
from cluster.store.jobs import JobRecord, JobSnapshot

PART_BYTES = 1 << 20
"""The most of a log that one answer holds."""
KEEP_S = 2
"""How long a log is kept that only Ray's server can read: it sends the whole of it every time."""
KEPT = 8
"""At most how many of those logs are kept; the one that was asked for longest ago goes first."""


class JobLogs:
    def __init__(self, server: Callable[[], JobServer]) -> None:
        self.server = server
        self.kept: dict[str, tuple[float, bytes]] = {}
        """Job → when Ray sent its log, and the log; the one that was asked for last is the last."""
        self.lock = threading.Lock()

    def read(self, record: JobRecord, last: JobSnapshot | None, offset: int) -> dict[str, Any]:
        """``{"text", "next"}``: the log from byte ``offset`` on, at most `PART_BYTES` of it, and where to go on. Raises `JobNotFound`."""
        if offset < 0:
            raise BadRequest("offset is below 0.", "Send the `next` of the answer before.", "offset")
        raw = self._part(record, last, offset)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = decoder.decode(raw)  # a character that is cut off comes with the next answer
        return {"text": text, "next": offset + len(raw) - len(decoder.getstate()[0])}

    def _part(self, record: JobRecord, last: JobSnapshot | None, offset: int) -> bytes:
        here = Path(last.log) if last and last.log and last.host == socket.gethostname() else None
        if (
            here is not None and here.name == f"job-driver-{record.id}.log" and here.is_file()
        ):  # Ray's name: no other file is read out
            with here.open("rb") as file:
                file.seek(offset)
                return file.read(PART_BYTES)
        if record.spec is not None and not record.spec.submitted:
            raise JobNotFound(f"The log of {record.id} is not here.", "It was started from a shell, and printed there.", "job")
        return self._sent(record.id)[offset : offset + PART_BYTES]

    def _sent(self, id: str) -> bytes:
        """Of a job on another machine, or one that has not begun."""
        with self.lock:
            kept_s, raw = self.kept.pop(id, (float("-inf"), b""))
        if time.monotonic() - kept_s > KEEP_S:
            kept_s, raw = time.monotonic(), self.server().log(id).encode()
        with self.lock:
            self._keep(id, kept_s, raw)
        return raw

    def _keep(self, id: str, kept_s: float, raw: bytes) -> None:
        fresh = {other: kept for other, kept in self.kept.items() if time.monotonic() - kept[0] <= KEEP_S and other != id}
        self.kept = {**fresh, id: (kept_s, raw)}
        if len(self.kept) > KEPT:
            del self.kept[next(iter(self.kept))]
