"""Who ends with whom: an engine with its replica and the replica with its engine, however that happened, so that memory comes back.

vLLM's engine core outlives a parent that was killed; Ray's own clean-up of grandchildren
(``RAY_kill_child_processes_on_worker_exit_with_raylet_subreaper``) would end it, but also collects the exit status of submitted jobs, which
then count as succeeded when they failed.
"""

import asyncio
import multiprocessing
import os
import threading
from collections.abc import Callable


def end_with_parent() -> None:
    """In a process that multiprocessing started: exit as soon as the parent is gone. Elsewhere: nothing.

    vLLM calls this in each of its processes (the entry point ``vllm.general_plugins`` in pyproject.toml).
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)  # nothing to save: whoever could ask for it is gone

    threading.Thread(target=wait, name="lifeline", daemon=True).start()


def when_gone(pid: int, act: Callable[[], None]) -> Callable[[], None]:
    """Call ``act`` in this event loop once the process ends; at once where it has. Returns what takes that back."""
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
