"""What `ray job submit -- python -m jobs.<verb>` runs: one verb, one module."""

import os
import sys
from collections.abc import Callable

from cluster import pool
from cluster.config import Config
from cluster.errors import BadRequest, SpringtideError


def main(verb: Callable[[], None]) -> None:
    """Run a verb as a command: an error of ours is one line, never a traceback.

    Exit status 2 is for what the caller can mend (data, names, configuration), as argparse does; 1 is for everything else.
    """
    try:
        verb()
    except SpringtideError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(error, BadRequest) else 1)


def reach(config: Config) -> None:
    """Point this process at the pool started from this home, unless it is a job on a pool already. Raises `PoolUnavailable`.

    Call it before Ray is imported, because Ray reads its network settings once, at that moment.
    """
    if "://" in os.environ.get("RAY_ADDRESS", "://"):  # none, or the dashboard's, which is for `ray job submit`
        os.environ["RAY_ADDRESS"] = pool.require(config).address
