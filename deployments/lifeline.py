"""An engine ends when its replica does, however that happened, and gives its memory back.

vLLM loads this in each of its processes (the entry point ``vllm.general_plugins`` in pyproject.toml). Its engine core outlives a
parent that was killed; Ray's own clean-up of grandchildren (``RAY_kill_child_processes_on_worker_exit_with_raylet_subreaper``) would
end it, but also collects the exit status of submitted jobs, which then count as succeeded when they failed.
"""

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """In a process that multiprocessing started: exit as soon as the parent is gone. Elsewhere: nothing."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)  # nothing to save: whoever could ask for it is gone

    threading.Thread(target=wait, name="lifeline", daemon=True).start()
