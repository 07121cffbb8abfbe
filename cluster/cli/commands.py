"""The `springtide` command. Commands stay thin: each says what it does, calls one function, and prints the answer.

Each file has the commands of one topic. Importing the file adds them.
"""

import shutil
import sys

from rich.console import Console
from rich.markup import escape

from cluster.cli import fleets, jobs, machine, publishing, serving
from cluster.cli.app import app
from cluster.errors import SpringtideError

TOPICS = (fleets, jobs, machine, publishing, serving)


def main() -> None:
    """The console script. Our own errors become one message and exit status 2. Anything else is a bug and shows its traceback."""
    try:
        app(global_first(sys.argv[1:]))
    except SpringtideError as error:
        width = shutil.get_terminal_size().columns
        Console(stderr=True, width=max(width, 60)).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        sys.exit(2)


def global_first(words: list[str]) -> list[str]:
    """The command line with ``--pool`` moved before the name of the command.

    >>> global_first(["logs", "job", "--pool", "http://host:8000", "--follow"])
    ['--pool', 'http://host:8000', 'logs', 'job', '--follow']
    """
    for at, word in enumerate(words):
        if word == "--":
            break
        if word == "--pool" or word.startswith("--pool="):
            end = at + (2 if word == "--pool" else 1)
            return [*words[at:end], *words[:at], *words[end:]]
    return words


if __name__ == "__main__":
    main()
