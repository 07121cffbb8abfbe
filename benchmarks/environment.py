"""Packages that only a benchmark's peer needs, in a folder of their own under ``.bench``, made anew where their lock has changed.

They lie before ours on a peer's path. So a peer runs on the same PyTorch and transformers as we do.
"""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".bench"
LOCKS = ROOT / "requirements" / "bench"
INSTALL_TIMEOUT_S = 600


class NotInstalled(Exception):
    """The packages are not to be had here, and why."""


def installed(name: str) -> Path:
    """The folder with what ``requirements/bench/NAME.txt`` lists. Raises `NotInstalled`."""
    folder, lock = FOLDER / name, LOCKS / f"{name}.txt"
    made = folder / lock.name
    if made.is_file() and made.read_bytes() == lock.read_bytes():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
    done = subprocess.run(
        [*pip, "--target", str(folder), "--requirement", str(lock)],
        capture_output=True,
        text=True,
        timeout=INSTALL_TIMEOUT_S,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode != 0:
        words = [line for line in done.stderr.splitlines() if "error" in line.lower()] or [done.stderr]
        raise NotInstalled(words[0].strip()[:300])
    shutil.copy(lock, made)
    return folder
