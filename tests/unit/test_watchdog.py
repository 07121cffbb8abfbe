"""No process outlives the one that it works for: see `deployments.replica.watchdog`."""

import asyncio
import subprocess

from deployments.replica.watchdog import when_gone


def test_the_end_of_a_process_is_heard_of_at_once_and_only_once() -> None:
    async def heard() -> list[str]:
        process, acts = subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE), list[str]()
        when_gone(process.pid, lambda: acts.append("gone"))
        await asyncio.sleep(0.1)
        assert acts == []
        process.kill()
        await asyncio.sleep(0.2)
        process.wait()
        when_gone(process.pid, lambda: acts.append("was gone"))
        return acts

    assert asyncio.run(heard()) == ["gone", "was gone"]


def test_nothing_is_heard_of_a_process_that_was_released() -> None:
    async def heard() -> list[str]:
        process, acts = subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE), list[str]()
        release = when_gone(process.pid, lambda: acts.append("gone"))
        release()
        release()
        process.kill()
        process.wait()
        await asyncio.sleep(0.1)
        return acts

    assert asyncio.run(heard()) == []
