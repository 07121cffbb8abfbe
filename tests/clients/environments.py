"""An environment for each client under ``.clients``, made anew where its lock has changed."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
ENVIRONMENTS = ROOT / ".clients"
LOCKS = ROOT / "requirements" / "clients"
INSTALL_TIMEOUT_S = 600


class NotInstalled(Exception):
    """The client is not to be had here, and why."""


def python(name: str) -> list[str]:
    """The command that runs ``python/NAME_client.py`` with what ``requirements/clients/NAME.txt`` lists. Raises `NotInstalled`."""
    folder, lock = ENVIRONMENTS / name, LOCKS / f"{name}.txt"
    interpreter = folder / "bin" / "python"
    if not _is_of(folder, lock):
        _install([sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder)])
        pip = [sys.executable, "-m", "pip", "--python", str(interpreter), "install", "--quiet", "--no-compile"]
        _install([*pip, "--no-deps", "--requirement", str(lock)])
        shutil.copy(lock, folder / lock.name)
    return [str(interpreter), _script(name)]


def own(name: str) -> list[str]:
    """The same in the project's own environment."""
    return [sys.executable, _script(name)]


def node(name: str) -> list[str]:
    """The command that runs ``node/NAME_client.mjs`` with what ``node/package-lock.json`` lists. Raises `NotInstalled`."""
    folder, lock = ENVIRONMENTS / "node", HERE / "node" / "package-lock.json"
    if shutil.which("node") is None:
        raise NotInstalled("There is no node on the path.")
    if not _is_of(folder / "node_modules", lock):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(HERE / "node", folder)
        _install(["npm", "ci", "--no-audit", "--no-fund", "--prefix", str(folder)])
        shutil.copy(lock, folder / "node_modules" / lock.name)
    shutil.copytree(HERE / "node", folder, dirs_exist_ok=True)  # a module is found from where the script is
    return ["node", str(folder / f"{name}_client.mjs")]


def _script(name: str) -> str:
    return str(HERE / "python" / f"{name}_client.py")


def _is_of(folder: Path, lock: Path) -> bool:
    """Whether the environment was made completely, and from this lock."""
    made = folder / lock.name
    return made.is_file() and made.read_bytes() == lock.read_bytes()


def _install(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        words = [line for line in done.stderr.splitlines() if "error" in line.lower()] or [done.stderr]
        raise NotInstalled(f"{command[0]} failed: {words[0].strip()[:300]}")
