"""Waits until an accelerator's memory is really free before an engine takes it.

Ray passes a slot on once its process lets go of its socket; the driver may need a moment more to free what that process had. An engine that
wakes takes its memory within milliseconds, and one that starts gives up where there is too little. What is free is asked of NVML, which
needs no CUDA context.
"""

import asyncio
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from cluster.errors import NoMemory

PATIENCE_S = 30
LOOK_S = 0.05
GIB = 1 << 30


class Memory(NamedTuple):
    """Of one accelerator, in bytes."""

    device: str
    """As in ``CUDA_VISIBLE_DEVICES``."""
    free: int
    total: int
    pids: tuple[int, ...] = ()
    """Of the processes that have some of it."""


def memories(visible: str) -> list[Memory]:
    """Of every accelerator in ``visible``, the value of ``CUDA_VISIBLE_DEVICES``: numbers or NVML's ids."""
    import pynvml  # pyright: ignore[reportMissingImports] (nvidia-ml-py, which vLLM needs on NVIDIA's accelerators)

    nvml: Any = pynvml
    nvml.nvmlInit()
    try:
        return [_memory(nvml, device.strip()) for device in visible.split(",")]
    finally:
        nvml.nvmlShutdown()


def _memory(nvml: Any, device: str) -> Memory:
    handle = nvml.nvmlDeviceGetHandleByIndex(int(device)) if device.isdigit() else nvml.nvmlDeviceGetHandleByUUID(device)
    said = nvml.nvmlDeviceGetMemoryInfo(handle)
    processes = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    return Memory(device, said.free, said.total, tuple(process.pid for process in processes))


async def room(visible: str, needed: Sequence[int]) -> float:
    """Wait until every accelerator in ``visible`` has ``needed`` bytes free. Seconds that it took; `NoMemory` after `PATIENCE_S`."""
    began_s = time.monotonic()
    while short := lacking(memories(visible), needed):
        if time.monotonic() - began_s > PATIENCE_S:
            raise NoMemory(f"After {PATIENCE_S} s {short}.", "End what holds the rest: nvidia-smi shows it.")
        await asyncio.sleep(LOOK_S)
    return time.monotonic() - began_s


def lacking(there: Sequence[Memory], needed: Sequence[int]) -> str:
    """What is too little, in words; empty where there is enough.

    >>> lacking([Memory("0", 70 << 30, 80 << 30)], [72 << 30])
    'accelerator 0 has 70.0 GiB free and the engine needs 72.0'
    """
    for one, bytes_ in zip(there, needed, strict=True):
        if one.free < bytes_:
            held = f"; processes {', '.join(map(str, one.pids))} have some of it" if one.pids else ""
            return f"accelerator {one.device} has {one.free / GIB:.1f} GiB free and the engine needs {bytes_ / GIB:.1f}{held}"
    return ""
