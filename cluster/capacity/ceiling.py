"""How many slots may be asked for, learnt from what Ray's autoscaler refuses. No side effects: `cluster.control.lease` passes in what it hears.

The autoscaler says yes or no, and the less jobs are allowed, the less is asked for (`Allocator.floor`). So the most that it grants
lies between what it granted and what it refused, and each answer halves what is left between them.
"""

from typing import NamedTuple


class Ceiling(NamedTuple):
    fits: int = 0
    """The pool has so many slots, or what was asked for when so many were allowed was not refused."""
    too_many: int | None = None
    """The fewest that were refused; more than ``fits``. None where nothing was."""

    def most(self, again: bool = False) -> int | None:
        """The most slots that may be asked for now; None for as many as anybody likes. ``again``: the refusal is old, somebody may have
        allowed more machines since. Then the fewest that were refused are tried, which costs one round where nothing has changed."""
        if self.too_many is None:
            return None
        return self.too_many if again else (self.fits + self.too_many) // 2

    def has(self, total: int) -> "Ceiling":
        """The pool has ``total`` slots. That does not take back a refusal: it may lack a machine for another reason, one that drains."""
        return self._replace(fits=max(self.fits, total if self.too_many is None else min(total, self.too_many - 1)))

    def granted(self, asked: int, most: int | None) -> "Ceiling":
        """``asked`` was not refused, when ``most`` were allowed. Jobs come in lumps, so it may be fewer; allowing as many does no harm then."""
        fits = max(self.fits, asked, most or 0)
        return Ceiling(fits, None if self.too_many is not None and self.too_many <= fits else self.too_many)

    def refused(self, asked: int, total: int) -> "Ceiling":
        """Of a pool with ``total`` slots. Where so many fitted once, nothing is known any more but what the pool has."""
        fits = self.fits if self.fits < asked else min(total, asked - 1)
        return Ceiling(fits, asked if self.too_many is None else min(asked, self.too_many))
