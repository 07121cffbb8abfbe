"""Canary and stable side by side: which session gets which, what was seen of both, and whether the canary is worse. Pure.

Sessions are split by a hash over alias, version and session, so that a session keeps its version, a higher share only adds sessions,
and the next canary falls on other sessions than this one did.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
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

    def worse(self, margins: Margins) -> str:
        """In what the canary is worse by more than ``margins`` allow, with the numbers; empty where in nothing."""
        canary, stable = self
        found = [
            _errors(canary, stable, margins.error_rate),
            _slower("first token", canary.ttft_s, stable.ttft_s, margins.ttft_ratio),
            _slower("between tokens", canary.itl_s, stable.itl_s, margins.itl_ratio),
            _ends(canary.finish, stable.finish, margins.finish),
            _disagrees(canary, margins.disagreement),
            _shadows(canary, margins.error_rate),
        ]
        return "; ".join(words for words in found if words)


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


def _errors(canary: Tally, stable: Tally, margin: float) -> str:
    ours, theirs = _share(canary.errors, canary.requests), _share(stable.errors, stable.requests)
    if canary.errors < MIN_ERRORS or ours <= theirs + margin:
        return ""
    return f"{ours:.1%} of its requests fail, {theirs:.1%} of the stable version's"


def _slower(what: str, canary_s: Sequence[float], stable_s: Sequence[float], limit: float) -> str:
    if min(len(canary_s), len(stable_s)) < MIN_REQUESTS:
        return ""
    ours_s, theirs_s = median(canary_s), median(stable_s)
    if ours_s <= theirs_s * limit or ours_s - theirs_s < NOTICEABLE_S:
        return ""
    return f"{what} {ours_s * 1000:.0f} ms against {theirs_s * 1000:.0f} ms (median)"


def _ends(canary: dict[str, int], stable: dict[str, int], limit: float) -> str:
    ours, theirs = sum(canary.values()), sum(stable.values())
    if min(ours, theirs) < MIN_REQUESTS:
        return ""
    reasons = sorted({*canary, *stable})
    shares = {reason: (_share(canary.get(reason, 0), ours), _share(stable.get(reason, 0), theirs)) for reason in reasons}
    distance = sum(abs(a - b) for a, b in shares.values()) / 2
    if distance <= limit:
        return ""
    return "answers end otherwise: " + ", ".join(f"{reason} {a:.0%} against {b:.0%}" for reason, (a, b) in shares.items())


def _disagrees(canary: Tally, limit: float) -> str:
    share = _share(canary.disagreed, canary.shadowed)
    if canary.shadowed < MIN_REQUESTS or share <= limit:
        return ""
    return f"{share:.0%} of shadowed answers differ"


def _shadows(canary: Tally, margin: float) -> str:
    """Each was answered by the stable version."""
    share = _share(canary.shadows_failed, canary.shadowed)
    if canary.shadows_failed < MIN_ERRORS or share <= margin:
        return ""
    return f"{share:.1%} of shadowed requests fail"


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
