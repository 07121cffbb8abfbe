"""What `ray job submit -- python -m jobs.<verb>` runs: one verb, one module. `cluster.jobspec` has their options, `jobs.record` their record."""

import io
import os
import signal
import sys
from collections.abc import Callable

from cluster.config import Config
from cluster.errors import BadRequest, SpringtideError
from cluster.pool import local


def main(verb: Callable[[], None]) -> None:
    """Run a verb as a command. An error of ours is one line without a traceback.

    The exit status is 2 for what the caller can fix (data, names, configuration), as with argparse, and 1 for everything else.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # also into a file: Ray passes on what workers print, and does not flush
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # cancelled: the exit lets the verb clean up
    try:
        verb()
    except SpringtideError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(error, BadRequest) else 1)


def reach(config: Config) -> None:
    """Point this process at the pool that runs from this home, or else at the pool that started it as a job.

    The home comes first, because Ray tells its jobs the address of the newest Ray on the machine, which may be another pool. Call this before
    Ray is imported: Ray reads its network settings at that moment. Raises `PoolUnavailable`.
    """
    if running := local.find(config):
        os.environ["RAY_ADDRESS"] = running.address
    elif "://" in os.environ.get("RAY_ADDRESS", "://"):  # none, or the dashboard's, which is for `ray job submit`
        local.require(config)
