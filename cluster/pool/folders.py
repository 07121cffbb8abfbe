"""The pool's folders on this machine: its home, its temporary files, and where Ray's logs are."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from cluster import machine
from cluster.config import Config
from cluster.errors import PoolUnavailable

RUN = "tide-"
"""How the name of a pool's temporary folder begins. Short, because sockets are in it."""
RAY_LOGS = "ray-logs"
"""What leads to Ray's logs, in the home."""


def home(config: Config) -> Path:
    """The folder of this pool's files, made if need be. Raises `PoolUnavailable` where this user may not write there."""
    pool = config.home / "pool.json"
    if os.path.exists(pool) and not os.access(pool, os.R_OK):
        raise others(pool)
    try:
        config.home.mkdir(parents=True, exist_ok=True)
        if not machine.is_writable(str(config.home)):
            raise PermissionError(0, "this user may not write there")
        return config.home
    except OSError as error:
        raise PoolUnavailable(
            f"The folder {config.home} cannot be used: {error.strerror}.",
            "Set another with SPRINGTIDE_HOME=/PATH, or run the command where you may write.",
            param="home",
        ) from error


def others(path: Path) -> PoolUnavailable:
    """The error for a file of a pool that another user has started from this home."""
    return PoolUnavailable(
        f"{path} is another user's, so this home is too.",
        "Set SPRINGTIDE_HOME to a folder of your own. To use their pool, ask them for what `springtide env --client` prints.",
        param="home",
    )


def account(config: Config) -> dict[str, str]:
    """What libraries ask of the account that the pool runs under: a name, a home to keep caches in, and short names of temporary files.

    Example: in a container under a user id of its own, PyTorch's `getuser` and vLLM's cache in ``/.cache`` end every engine otherwise.
    """
    own = config.home / "home"
    if not machine.has_home(os.environ):
        own.mkdir(exist_ok=True)
    found = {
        "LOGNAME": machine.user(),
        "HOME": os.environ["HOME"] if machine.has_home(os.environ) else str(own),
        "TMPDIR": machine.temporary_folder(os.environ),
    }
    return {name: value for name, value in found.items() if value}


def run_folder() -> Path:
    """A new folder with a short path, ours alone (mode 0700). Raises `PoolUnavailable` where there is no place for one."""
    folder = machine.temporary_folder(os.environ, machine.SOCKET_FOLDER_BYTES)
    if folder is None:
        raise PoolUnavailable("There is no folder for the pool's sockets.", "Set RAY_TMPDIR to a writable folder like /scratch.")
    return Path(tempfile.mkdtemp(prefix=RUN, dir=folder))


def show_logs(config: Config, run: Path) -> None:
    """Make Ray's logs reachable as ``ray-logs`` in the home while the pool runs."""
    link = config.home / RAY_LOGS
    if link.is_symlink():
        link.unlink()
    shutil.rmtree(link, ignore_errors=True)
    link.symlink_to(run / "ray" / "session_latest" / "logs")


def keep_logs(config: Config, run: Path) -> None:
    """Move Ray's logs into the home, and remove everything else that Ray has left. They are only for people: a full disk stops nothing here."""
    link = config.home / RAY_LOGS
    with contextlib.suppress(OSError):
        logs = link.resolve(strict=True)
        link.unlink()
        shutil.move(logs, link)
    shutil.rmtree(run, ignore_errors=True)
