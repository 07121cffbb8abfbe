"""What a process of vLLM said before it ended, for the process that had started it.

vLLM's front learns only that another process failed ("Engine core initialization failed. See root cause above."). The cause is in the log of
that process. So each of them writes the exceptions that it logs to a file which the front has named, and the first is the cause: a worker
fails before the engine's core fails over it.
"""

import contextlib
import logging
import multiprocessing
import os
import re
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

VARIABLE = "ENGINE_LAST_WORDS"
"""Names the file to the processes that the front starts."""
KILLED = re.compile(r"': -(\d+)")
"""Where vLLM names the exit status of a process that a signal ended."""


@contextlib.contextmanager
def kept() -> Iterator[Callable[[], str]]:
    """While it is open, processes that start keep their words. Yields what reads the first of them; empty where none had any."""
    descriptor, name = tempfile.mkstemp(prefix="springtide-words-")
    os.close(descriptor)
    os.environ[VARIABLE] = name
    try:
        yield lambda: Path(name).read_text("utf-8").partition("\n")[0]
    finally:
        os.environ.pop(VARIABLE, None)
        os.unlink(name)


def listen() -> None:
    """Keep this process's words, where another waits for them. Every process of vLLM calls it (`deployments.replica.watchdog`)."""
    name = os.environ.get(VARIABLE)
    if name and multiprocessing.parent_process() is not None:
        logging.getLogger("vllm").addHandler(Keeper(name))


class Keeper(logging.Handler):
    """Appends each exception that is logged to a file, one in a line, for as long as the file is there."""

    def __init__(self, name: str) -> None:
        super().__init__(logging.ERROR)
        self.file = name

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is None:
            return
        with contextlib.suppress(OSError):  # the start is over, and the file gone: nobody waits
            descriptor = os.open(self.file, os.O_WRONLY | os.O_APPEND)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(f"{of(error)}\n")


def of(error: BaseException) -> str:
    """An exception's own words in one line. A process that was killed has none, so the signal stands for them.

    >>> of(ValueError("To serve at least one request,\\n  more is needed."))
    'To serve at least one request, more is needed. (ValueError)'
    >>> of(RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': -9}"))
    'its process was ended by SIGKILL, as Linux does when memory runs out'
    """
    words = " ".join(str(error).split())
    if found := KILLED.search(words):
        name = signal.Signals(int(found[1])).name
        return f"its process was ended by {name}{', as Linux does when memory runs out' * (name == 'SIGKILL')}"
    return f"{words} ({type(error).__name__})" if words else type(error).__name__
