"""What a gateway's process leaves out, so that it is smaller.

``from ray import serve`` imports pandas where it is installed, to encode data frames that an application may return (2.60,
``ray/serve/_private/utils.py``), and pandas imports pyarrow. No gateway uses either. Ray runs a hook in each worker's process before the
worker's code is loaded (``ray/_private/workers/default_worker.py``), and names the hook in a variable of that process, which
``ray.init(runtime_env={"worker_process_setup_hook": …})`` sets for all workers of a job. A contract test names what this relies on.
"""

import sys

HOOK = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"
LEAN = {HOOK: "cluster.pool.lean.leave_out_pandas", "MALLOC_ARENA_MAX": "2"}
"""A gateway's variables. Ray has many threads there, and each of the allocator's arenas keeps what one of them once needed."""
WHOLE = {HOOK: "", "MALLOC_ARENA_MAX": ""}
"""For what a gateway starts, which inherits its variables."""


def leave_out_pandas() -> None:
    """Whoever imports it from now on hears that it is not installed."""
    sys.modules["pandas"] = None  # pyright: ignore[reportArgumentType] (the import system's own mark)
