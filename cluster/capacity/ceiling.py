"""The ceiling of a pool that grows: how many slots Ray's autoscaler gives at most. Learnt from what it refuses.

The autoscaler says only whether it refuses a request, not how large the pool can become. So the answer is found by bisection: it lies
between the largest request that was not refused (``fits``) and the smallest that was (``too_many``), and each answer halves the rest.

Example: the pool has 1 slot and can have 4. 100 slots are requested and refused: the ceiling is between 1 and 100, so 50 may be requested
next. 50, 25, 13, 7 are refused, then 4 are not, then 5 are: the ceiling is 4.

Without side effects: `cluster.control.lease` passes in what it hears. Jobs shrink what they request to fit under the ceiling
(`Allocator.requested`).
"""

from typing import NamedTuple


class Ceiling(NamedTuple):
    fits: int = 0
    """The pool has so many slots, or a request was not refused when so many were allowed."""
    too_many: int | None = None
    """The smallest request that was refused; more than ``fits``. None if nothing was refused."""

    def slots(self, retry: bool = False) -> int | None:
        """The most slots to request now. None means: no limit is known. ``retry``: the refusal is old, and somebody may have allowed more
        machines since. Then the smallest refused request is tried again, which costs one round if nothing has changed."""
        if self.too_many is None:
            return None
        return self.too_many if retry else (self.fits + self.too_many) // 2

    def has(self, total: int) -> "Ceiling":
        """The pool has ``total`` slots. This does not take back a refusal: a machine may be missing for another reason, for example because
        one drains."""
        return self._replace(fits=max(self.fits, total if self.too_many is None else min(total, self.too_many - 1)))

    def granted(self, asked: int, allowed: int | None) -> "Ceiling":
        """A request of ``asked`` slots was not refused, when ``allowed`` were allowed. Jobs need several slots at once, so it may be less than
        allowed; then nothing waits for the difference, and allowing as much again does no harm."""
        fits = max(self.fits, asked, allowed or 0)
        return Ceiling(fits, None if self.too_many is not None and self.too_many <= fits else self.too_many)

    def refused(self, asked: int, total: int) -> "Ceiling":
        """A request of ``asked`` slots was refused when the pool had ``total``. If as many fitted once, that is out of date: all that is
        known then is what the pool has."""
        fits = self.fits if self.fits < asked else min(total, asked - 1)
        return Ceiling(fits, asked if self.too_many is None else min(asked, self.too_many))


def room(total: int, most: int | None, grows: bool) -> int | None:
    """The slots that the pool has or may come to have; None where no limit is known. ``most``: what `Ceiling.slots` says. ``grows``: whether
    there is an autoscaler, which may add machines.

    >>> room(4, None, grows=False), room(4, 7, grows=True), room(4, 3, grows=True), room(4, None, grows=True)
    (4, 7, 4, None)
    """
    if not grows:
        return total
    return None if most is None else max(total, most)
