"""Canary and stable side by side: which session gets which, what was seen of both, and whether the canary is worse. Pure.

Sessions are split by a hash over alias, version and session, so that a session keeps its version, a higher share only adds sessions,
and the next canary falls on other sessions than this one did.

**Looks.** Whoever compares two equal versions again and again finds a difference some time. So the canary is compared only when it has
answered 4, 8, 16, 32, … requests (`looks`), and look k may be wrong with probability `ALPHA` / (k·(k+1)) at most, which is `ALPHA` in all
however long the canary runs: a group sequential test with an alpha-spending function (Lan & DeMets, "Discrete sequential boundaries for
clinical trials", Biometrika 70, 1983; the bound over all looks and measures is Bonferroni's). A margin that is passed counts only where chance
does not explain it at that level.

Example: the margin allows 2 % more errors than the stable version's 0 %. At look 4, after 32 answers, 3 errors (9 %) are explained by chance
with probability 0.026, above 0.1 / (4·5 · 6 measures): nothing happens. At look 6, after 128 answers, 12 errors (9 %) are not: rolled back.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from math import exp, lgamma, log, sqrt
from statistics import median
from typing import NamedTuple

from pydantic import Field

from cluster.types import Durable, VersionId

BUCKETS = 10_000
MIN_REQUESTS = 20
"""Fewer answers than this on either side say nothing about latency or about how answers end."""
MIN_ERRORS = 3
NOTICEABLE_S = 0.02
"""A slower median that nobody can notice is not worse, whatever its ratio."""
ALPHA = 0.1
"""How likely it may be that a canary which is as bad as its margins allow is rolled back, over all looks and measures together. One that is
better than that, as any that is no worse than the stable version, is rolled back far more rarely."""
FIRST_LOOK = 4
"""Answers before the first look; each further one takes twice as many."""
MEASURES = 6
KEPT = 500
"""Latest latencies that a gateway remembers of one version."""


class Margins(Durable):
    """By how much a canary may be worse before it is rolled back."""

    error_rate: float = Field(default=0.02, ge=0)
    """Failed requests, as a share, above the stable version's."""
    ttft_ratio: float = Field(default=1.5, ge=1)
    """Median time to first token over the stable version's."""
    itl_ratio: float = Field(default=1.5, ge=1)
    """Median time between tokens over the stable version's."""
    finish: float = Field(default=0.3, ge=0, le=1)
    """Distance between the shares of finish reasons: 0 the same, 1 disjoint (total variation)."""
    disagreement: float = Field(default=1.0, ge=0, le=1)
    """Share of shadowed requests whose answer may differ from the stable version's. 1: any."""


class Tally(NamedTuple):
    """What the gateways saw of one version during one rollout."""

    requests: int = 0
    errors: int = 0
    ttft_s: tuple[float, ...] = ()
    itl_s: tuple[float, ...] = ()
    """Mean seconds between tokens, one per answer."""
    finish: dict[str, int] = {}  # noqa: RUF012 (a NamedTuple's default, never changed)
    """Finish reason → answers that ended so."""
    shadowed: int = 0
    disagreed: int = 0
    shadows_failed: int = 0
    """Of the shadowed requests; no client saw them."""


class Comparison(NamedTuple):
    canary: Tally
    stable: Tally

    @property
    def evidence(self) -> int:
        """Answers by the canary, those to shadowed requests included."""
        return max(self.canary.requests, self.canary.shadowed)

    def worse(self, margins: Margins, look: int = 1) -> str:
        """In what the canary is worse by more than ``margins`` allow and chance explains at this ``look``, with the numbers; empty where in
        nothing."""
        canary, stable = self
        alpha = ALPHA / (look * (look + 1) * MEASURES)
        found = [
            _errors(canary, stable, margins.error_rate, alpha),
            _slower("first token", canary.ttft_s, stable.ttft_s, margins.ttft_ratio, alpha),
            _slower("between tokens", canary.itl_s, stable.itl_s, margins.itl_ratio, alpha),
            _ends(canary.finish, stable.finish, margins.finish, alpha),
            _disagrees(canary, margins.disagreement, alpha),
            _shadows(canary, margins.error_rate, alpha),
        ]
        return "; ".join(words for words in found if words)


def looks(evidence: int) -> int:
    """How many looks are due by the time that the canary has answered so often.

    >>> [looks(answers) for answers in (3, 4, 7, 8, 1000)]
    [0, 1, 1, 2, 8]
    """
    return (evidence // FIRST_LOOK).bit_length()


def tail(successes: int, trials: int, p: float) -> float:
    """The probability that at least so many of so many trials succeed where each does with probability ``p``.

    >>> round(tail(3, 32, 0.02), 3), tail(0, 5, 0.0), tail(1, 5, 0.0)
    (0.026, 1.0, 0.0)
    """
    if successes <= 0 or p >= 1:
        return 1.0
    if p <= 0:
        return 0.0
    ways = (lgamma(trials + 1) - lgamma(k + 1) - lgamma(trials - k + 1) for k in range(successes, trials + 1))
    terms = (exp(way + k * log(p) + (trials - k) * log(1 - p)) for k, way in enumerate(ways, successes))
    return min(1.0, sum(terms))


def takes_canary(alias: str, canary: VersionId, percent: float, session: str) -> bool:
    """Whether ``session`` is among the ``percent`` of sessions that get ``canary``. Stable over time, machines and processes."""
    digest = hashlib.sha256(f"{alias}\0{canary}\0{session}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % BUCKETS < percent * BUCKETS / 100


def merge(tallies: Iterable[Tally]) -> Tally:
    """What several gateways saw, as one."""
    parts = list(tallies)
    return Tally(
        requests=sum(t.requests for t in parts),
        errors=sum(t.errors for t in parts),
        ttft_s=tuple(value for t in parts for value in t.ttft_s),
        itl_s=tuple(value for t in parts for value in t.itl_s),
        finish=dict(sum((Counter(t.finish) for t in parts), Counter[str]())),
        shadowed=sum(t.shadowed for t in parts),
        disagreed=sum(t.disagreed for t in parts),
        shadows_failed=sum(t.shadows_failed for t in parts),
    )


def _errors(canary: Tally, stable: Tally, margin: float, alpha: float) -> str:
    ours, theirs = _share(canary.errors, canary.requests), _share(stable.errors, stable.requests)
    if canary.errors < MIN_ERRORS or ours <= theirs + margin or tail(canary.errors, canary.requests, theirs + margin) > alpha:
        return ""
    return f"{ours:.1%} of its requests fail, {theirs:.1%} of the stable version's"


def _slower(what: str, canary_s: Sequence[float], stable_s: Sequence[float], limit: float, alpha: float) -> str:
    """A sign test: were the canary's median within the limit, at most about half of its times would be above it."""
    if min(len(canary_s), len(stable_s)) < MIN_REQUESTS:
        return ""
    ours_s, theirs_s = median(canary_s), median(stable_s)
    if ours_s <= theirs_s * limit or ours_s - theirs_s < NOTICEABLE_S:
        return ""
    above = sum(took_s > theirs_s * limit for took_s in canary_s)
    if tail(above, len(canary_s), 0.5) > alpha:
        return ""
    return f"{what} {ours_s * 1000:.0f} ms against {theirs_s * 1000:.0f} ms (median)"


def _ends(canary: dict[str, int], stable: dict[str, int], limit: float, alpha: float) -> str:
    ours, theirs = sum(canary.values()), sum(stable.values())
    if min(ours, theirs) < MIN_REQUESTS:
        return ""
    reasons = sorted({*canary, *stable})
    shares = {reason: (_share(canary.get(reason, 0), ours), _share(stable.get(reason, 0), theirs)) for reason in reasons}
    distance = sum(abs(a - b) for a, b in shares.values()) / 2
    if distance <= limit + _chance(len(reasons), ours, alpha / 2) + _chance(len(reasons), theirs, alpha / 2):
        return ""
    return "answers end otherwise: " + ", ".join(f"{reason} {a:.0%} against {b:.0%}" for reason, (a, b) in shares.items())


def _chance(kinds: int, answers: int, alpha: float) -> float:
    """How far the shares that were seen may be from the true ones, in total variation: more only with probability ``alpha`` (Weissman et al.,
    "Inequalities for the L1 deviation of the empirical distribution", 2003)."""
    return sqrt(2 * log((2**kinds - 1) / alpha) / answers) / 2


def _disagrees(canary: Tally, limit: float, alpha: float) -> str:
    share = _share(canary.disagreed, canary.shadowed)
    if canary.shadowed < MIN_REQUESTS or share <= limit or tail(canary.disagreed, canary.shadowed, limit) > alpha:
        return ""
    return f"{share:.0%} of shadowed answers differ"


def _shadows(canary: Tally, margin: float, alpha: float) -> str:
    """Each was answered by the stable version."""
    share = _share(canary.shadows_failed, canary.shadowed)
    if canary.shadows_failed < MIN_ERRORS or share <= margin or tail(canary.shadows_failed, canary.shadowed, margin) > alpha:
        return ""
    return f"{share:.1%} of shadowed requests fail"


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
