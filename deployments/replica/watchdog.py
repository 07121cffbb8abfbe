"""Watches processes, so that none outlives the process that it works for: an engine ends with its replica, and a replica with its engine.

vLLM's engine process outlives a parent that was killed, and keeps its memory. Ray can end grandchildren too
(``RAY_kill_child_processes_on_worker_exit_with_raylet_subreaper``), but it then also collects the exit status of submitted jobs, and a job
that failed counts as succeeded.
"""

import asyncio
import multiprocessing
import os
import threading
from collections.abc import Callable

from deployments.replica import last_words


def end_with_parent() -> None:
    """Exit as soon as the parent is gone, in a process that multiprocessing started, and keep its last words. Elsewhere do nothing.

    vLLM calls this in each of its processes (the entry point ``vllm.general_plugins`` in pyproject.toml).
    """
    last_words.listen()
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)  # nothing to save: nobody can ask for it any more

    threading.Thread(target=wait, name="parent-watchdog", daemon=True).start()


def when_gone(pid: int, act: Callable[[], None]) -> Callable[[], None]:
    """Call ``act`` in this event loop once the process ends; at once where it has ended. Returns a function that stops watching."""
    loop = asyncio.get_running_loop()
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        act()
        return lambda: None

    def release() -> None:
        if loop.remove_reader(descriptor):
            os.close(descriptor)

    def gone() -> None:
        release()
        act()

    loop.add_reader(descriptor, gone)
    return release
