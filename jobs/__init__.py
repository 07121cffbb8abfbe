"""What `ray job submit -- python -m jobs.<verb>` runs: one verb, one module."""

import sys
from collections.abc import Callable

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
