"""The life of an engine: which states it has, and which may follow which. Pure.

An engine outlives its replica. Example: it starts for replica A (NEW → STARTING → SERVING), takes other weights over in place (DRAINING →
SWAPPING → SERVING), lets A go (LEAVING → FALLING_ASLEEP → ASLEEP) and serves again for replica B (WAKING → SERVING).
"""

from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple


class State(Enum):
    NEW = auto()
    """Nobody has owned the engine yet; vLLM has not started."""
    STARTING = auto()
    """vLLM starts for the first owner."""
    WAKING = auto()
    """The engine slept. It loads what went live meanwhile."""
    SERVING = auto()
    DRAINING = auto()
    """The engine will take other weights over. It waits for its streams and admits no request."""
    SWAPPING = auto()
    """The running vLLM engine reads other weights in."""
    RESTARTING = auto()
    """Weights of another shape: another vLLM engine takes the place of this one."""
    LEAVING = auto()
    """The replica ends. The engine serves until its streams have ended: a gateway may not know yet."""
    FALLING_ASLEEP = auto()
    ASLEEP = auto()
    """The engine has no owner and no slot. Any replica of its fleet may own it."""
    BROKEN = auto()
    """vLLM died, or could not go back to the weights that it had. The process ends soon."""
    ENDED = auto()
    """The process ends as soon as its last answers are sent."""


S = State
TRANSITIONS: dict[State, frozenset[State]] = {
    S.NEW: frozenset({S.STARTING, S.ENDED}),
    S.STARTING: frozenset({S.SERVING, S.NEW, S.ENDED}),  # NEW: its files could not be read, so vLLM did not start
    S.WAKING: frozenset({S.SERVING, S.ASLEEP, S.ENDED}),  # ENDED: the fleet hosts another shape by now
    S.SERVING: frozenset({S.DRAINING, S.LEAVING, S.BROKEN}),
    S.DRAINING: frozenset({S.SWAPPING, S.RESTARTING, S.SERVING, S.BROKEN, S.ENDED}),
    S.SWAPPING: frozenset({S.SERVING, S.BROKEN, S.ENDED}),
    S.RESTARTING: frozenset({S.RESTARTING, S.SERVING, S.BROKEN, S.ENDED}),  # itself: back to the weights that it had
    S.LEAVING: frozenset({S.FALLING_ASLEEP, S.BROKEN, S.ENDED}),
    S.FALLING_ASLEEP: frozenset({S.ASLEEP, S.BROKEN, S.ENDED}),
    S.ASLEEP: frozenset({S.WAKING, S.ENDED}),
    S.BROKEN: frozenset({S.ENDED}),
    S.ENDED: frozenset(),
}
UNOWNED = frozenset({S.NEW, S.ASLEEP, S.ENDED})
ADMITTING = frozenset({S.SERVING, S.LEAVING})
OWNING = {S.NEW: S.STARTING, S.ASLEEP: S.WAKING}
"""State in which a replica may take the engine → the state that follows."""


class IllegalTransition(RuntimeError):
    """A bug: a state that the engine's present state does not allow."""


class Owner(NamedTuple):
    """The replica that an engine works for."""

    id: str
    app: str
    """The Serve application."""
    pid: int


@dataclass
class Life:
    """One engine's state and owner. There is an owner in every state but those of `UNOWNED`."""

    state: State = State.NEW
    owner: Owner | None = None

    @property
    def admits(self) -> bool:
        """Whether new requests are answered."""
        return self.state in ADMITTING

    def acquire(self, owner: Owner) -> bool:
        """Give the engine to a replica. False where it has one, or ends."""
        if self.state not in OWNING:
            return False
        self.state, self.owner = OWNING[self.state], owner
        return True

    def to(self, state: State) -> None:
        """Enter ``state``. Raises `IllegalTransition`, and changes nothing, where the present state does not allow it."""
        if state not in TRANSITIONS[self.state] or state in OWNING.values():  # only `acquire` names the owner that those need
            raise IllegalTransition(f"an engine that is {self.state.name} cannot be {state.name}")
        self.state = state
        self.owner = None if state in UNOWNED else self.owner

    def may(self, state: State) -> bool:
        return state in TRANSITIONS[self.state]
