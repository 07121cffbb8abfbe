"""How much memory there is for one engine: of one GPU, or of this machine where there is no GPU."""

import subprocess
from typing import Literal

from cluster import machine

ASK_GPUS = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
ANSWER_S = 5


def device_bytes(accelerator: Literal["slot", "gpu"]) -> int | None:
    """Of one device of a slot. None: there is no GPU here, or none that can be asked."""
    return gpu_bytes() if accelerator == "gpu" else machine_bytes()


def machine_bytes() -> int:
    """Of this machine, or of this container where it may use less."""
    return machine.memory().total_bytes


def gpu_bytes() -> int | None:
    """Of the smallest GPU here."""
    try:
        asked = subprocess.run(ASK_GPUS, capture_output=True, text=True, timeout=ANSWER_S, check=True)
        return smallest(asked.stdout)
    except (OSError, subprocess.SubprocessError):
        return None


def smallest(answer: str) -> int | None:
    """The least of nvidia-smi's answer, which has a line for each GPU, in MiB.

    >>> smallest("81559\\n40960\\n"), smallest("[N/A]\\n")
    (42949672960, None)
    """
    return min((int(line) << 20 for line in answer.split("\n") if line.strip().isdigit()), default=None)
