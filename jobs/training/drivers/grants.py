"""What a job's log says about its grant, and when the job fails because control is away. Pure.

>>> heard, words = hear(Heard(), Grant(0, "serving has 2"), silent_s=0.1, held=0)
>>> words
['waiting for slots: serving has 2']
>>> hear(heard, Grant(1, ""), silent_s=0.1, held=0)
(Heard(waiting='', silent=False), ['may have 1 slot'])
"""

from typing import NamedTuple

from cluster.capacity.allocator import Grant
from cluster.capacity.arbiter import counted

SILENT_S = 10
"""The log mentions control once it has not answered for this long. The job keeps its slots."""
NO_CONTROL_S = 60
"""A job fails if control has not answered it once within this time. Control restarts within about ten seconds."""


class Heard(NamedTuple):
    """What the log last said."""

    waiting: str = ""
    """Why the job waits for slots."""
    silent: bool = False
    """Control does not answer."""

    @property
    def waits_for(self) -> str:
        """As a job's record has it; empty where the job does not wait.

        >>> Heard("serving has 2").waits_for
        'slots: serving has 2'
        """
        return f"slots: {self.waiting}" if self.waiting else ""


class Failure(NamedTuple):
    """Why a job fails, and what to do about it."""

    words: str
    do: str = ""


def hear(heard: Heard, grant: Grant | None, silent_s: float, held: int) -> tuple[Heard, list[str]]:
    """The new messages for the log, each once: control does not answer, it answers again, the job waits for slots, the job has some.

    ``grant``: control's last answer, None where it never answered. ``silent_s``: how long ago that was. ``held``: slots.
    """
    words: list[str] = []
    if (silent := silent_s > SILENT_S) != heard.silent:
        stays = f"the job keeps its {counted(held)}" if held else "the job waits"
        words.append(f"control has not answered for {silent_s:.0f} s: {stays}" if silent else "control answers again")
    waiting = heard.waiting if grant is None else "" if grant.slots or held else grant.reason
    if grant is not None and waiting != heard.waiting:
        words.append(f"waiting for {Heard(waiting).waits_for}" if waiting else f"may have {counted(grant.slots)}")
    return Heard(waiting, silent), words


def no_control(grant: Grant | None, silent_s: float) -> Failure | None:
    """The failure of a job that control has never answered. Without it the job would wait for ever, because control gives out the slots."""
    if grant is not None or silent_s <= NO_CONTROL_S:
        return None
    words = f"Control has not answered for {silent_s:.0f} s, and jobs get their slots from it."
    return Failure(words, "Start the pool with `springtide up`.")
