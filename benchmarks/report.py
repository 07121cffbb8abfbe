"""What a serving comparison found: rows, ratios, verdicts, a table and a chart."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from benchmarks import peers
from benchmarks.cost import per_token_us
from benchmarks.load import Summary
from benchmarks.place import machine, passed

SYSTEMS = (*peers.SYSTEMS, "springtide")
LABELS = {
    "bare_vllm": "bare vLLM",
    "bare_plain": "bare, no adapters",
    "ray_default": "Ray default",
    "ray_direct": "Ray direct",
    "springtide": "Springtide",
}
HEADINGS = ("Load", "System", "Requests/s", "Tokens/s", "First token ms", "Between tokens ms", "Failed")
COLOURS = {
    "bare_vllm": "#9aa5b1",
    "bare_plain": "#c6ced6",
    "ray_default": "#e0b265",
    "ray_direct": "#cf7f3f",
    "springtide": "#0f7c8a",
}


class Measurement(NamedTuple):
    """One case of one system in one round."""

    round: int
    system: str
    streams: int
    streaming: bool
    summary: Summary
    cpu_s: Mapping[str, float]
    """Process → processor seconds it spent meanwhile."""
    tokens: int
    """What was generated."""

    @property
    def per_token_us(self) -> dict[str, float]:
        return per_token_us(self.cpu_s, self.tokens)


@dataclass(frozen=True)
class Spread:
    """A median with the least and the greatest of the values it is of."""

    median: float
    low: float
    high: float

    def text(self, digits: int = 1, unit: str = "") -> str:
        return f"{self.median:.{digits}f}{unit} ({self.low:.{digits}f}–{self.high:.{digits}f})"


def spread(values: Sequence[float]) -> Spread:
    return Spread(median(values), min(values), max(values))


def summarise(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """One row per system and case: medians over rounds, ``failed`` summed."""
    rows: list[dict[str, Any]] = []
    for (system, streams, streaming), summaries in grouped(measurements).items():
        each = [asdict(summary) for summary in summaries]
        medians = {key: _median([one[key] for one in each]) for key in each[0] if key != "failed"}
        failed = sum(summary.failed for summary in summaries)
        cost_us = {name: round(median(values), 1) for name, values in costs_us(measurements, system, streams, streaming).items()}
        case = {"system": system, "streams": streams, "streaming": streaming}
        rows.append({**case, **medians, "failed": failed, "cpu_us_per_token": cost_us})
    return rows


def costs_us(measurements: Sequence[Measurement], system: str, streams: int, streaming: bool) -> dict[str, list[float]]:
    """Process → processor microseconds per token in each round of one case."""
    rounds = [one.per_token_us for one in measurements if one[1:4] == (system, streams, streaming)]
    return {name: [one.get(name, 0.0) for one in rounds] for name in sorted({name for one in rounds for name in one})}


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(median(known), 3) if known else None


def grouped(measurements: Sequence[Measurement]) -> dict[tuple[str, int, bool], list[Summary]]:
    """(system, streams, streaming) → its summaries in order of the rounds."""
    groups: dict[tuple[str, int, bool], list[Summary]] = {}
    for one in measurements:
        groups.setdefault((one.system, one.streams, one.streaming), []).append(one.summary)
    return groups


def ratio(measurements: Sequence[Measurement], system: str, other: str, streams: int) -> Spread | None:
    """Streamed requests per second of ``system`` over those of ``other`` in the same round; None where one was not measured."""
    pairs = _paired(measurements, system, other, streams)
    return spread([a.requests_per_s / b.requests_per_s for a, b in pairs if b.requests_per_s]) if pairs else None


def extra_ttft_ms(measurements: Sequence[Measurement], system: str, other: str, streams: int) -> Spread | None:
    """By how much the median time to first token of ``system`` is above that of ``other`` in the same round."""
    pairs = _paired(measurements, system, other, streams)
    return spread([(a.ttft_p50_ms or 0) - (b.ttft_p50_ms or 0) for a, b in pairs]) if pairs else None


def _paired(measurements: Sequence[Measurement], system: str, other: str, streams: int) -> list[tuple[Summary, Summary]]:
    groups = grouped(measurements)
    return list(zip(groups.get((system, streams, True), []), groups.get((other, streams, True), []), strict=False))


REQUIRED = {"ray_default": 3.0, "ray_direct": 1.0}
"""System → how many times its requests per second Springtide must make, at the most streams."""
OF_BARE_VLLM = 0.95
"""The same for bare vLLM, at any number of streams."""
FIRST_TOKEN_MS = {1: 3.0, 32: 5.0}
"""Streams → how much later than bare vLLM's a first token may come."""


def verdicts(measurements: Sequence[Measurement]) -> list[str]:
    """Springtide against each of the others, with what is required of it."""
    levels = sorted({one.streams for one in measurements})
    lines = [_rate(measurements, other, levels[-1], required) for other, required in REQUIRED.items()]
    lines += [_rate(measurements, "bare_vllm", streams, OF_BARE_VLLM) for streams in levels]
    lines += [_rate(measurements, "bare_plain", streams, None) for streams in levels]
    lines += [_first_token(measurements, streams, most_ms) for streams, most_ms in FIRST_TOKEN_MS.items()]
    failed = sum(one.summary.failed for one in measurements)
    return [*filter(None, lines), f"{failed} failed requests; {passed(failed == 0)}"]


def plural(count: int) -> str:
    return "" if count == 1 else "s"


def _rate(measurements: Sequence[Measurement], other: str, streams: int, required: float | None) -> str:
    """Empty where one of the two was not measured so. ``required``: the bar, where there is one."""
    found = ratio(measurements, "springtide", other, streams)
    if found is None:
        return ""
    text = (
        f"Springtide makes {found.text(2, '×')} the requests per second of {LABELS[other]} at {streams} stream{plural(streams)}"
    )
    return text if required is None else f"{text}; {passed(found.median >= required)} (≥ {required:g}×)"


def _first_token(measurements: Sequence[Measurement], streams: int, most_ms: float) -> str:
    found = extra_ttft_ms(measurements, "springtide", "bare_vllm", streams)
    if found is None:
        return ""
    text = f"its first token at {streams} stream{plural(streams)} comes {found.text(1, ' ms')} after bare vLLM's"
    return f"{text}; {passed(found.median <= most_ms)} (≤ {most_ms:g} ms)"


def cells(measurements: Sequence[Measurement]) -> Iterator[tuple[str, ...]]:
    """The table's rows as text, under `HEADINGS`: rates with their spread over rounds, latencies as p50 / p99."""
    rates = {key: spread([s.requests_per_s for s in summaries]) for key, summaries in grouped(measurements).items()}
    for row in sorted(
        summarise(measurements), key=lambda row: (not row["streaming"], row["streams"], SYSTEMS.index(row["system"]))
    ):
        yield (
            f"{row['streams']} {'streamed' if row['streaming'] else 'whole'}",
            LABELS[row["system"]],
            rates[row["system"], row["streams"], row["streaming"]].text(),
            f"{row['output_tokens_per_s']:.0f}",
            _pair(row["ttft_p50_ms"], row["ttft_p99_ms"]),
            _pair(row["itl_p50_ms"], row["itl_p99_ms"]),
            str(row["failed"]),
        )


def _pair(p50: float | None, p99: float | None) -> str:
    return "–" if p50 is None or p99 is None else f"{p50:.1f} / {p99:.1f}"


def results(measurements: Sequence[Measurement]) -> Table:
    table = Table(title="Medians over rounds (lowest–highest); latencies p50 / p99", box=box.SIMPLE_HEAD)
    for place, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if place < 2 else "right", no_wrap=True)
    previous = ""
    for case, *rest in cells(measurements):
        if previous not in ("", case):
            table.add_section()
        table.add_row("" if case == previous else case, *rest, style="bold" if rest[0] == LABELS["springtide"] else None)
        previous = case
    return table


def markdown(measurements: Sequence[Measurement]) -> str:
    """The same table and verdicts for a README."""
    lines = [HEADINGS, ("---", "---", *["---:"] * (len(HEADINGS) - 2)), *cells(measurements)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    said = "\n".join(f"- {Text.from_markup(line).plain}" for line in verdicts(measurements))
    return f"{table}\n\n{said}\n\nMedians over rounds (lowest–highest), latencies p50 / p99. Measured on {machine()}.\n"


def draw(measurements: Sequence[Measurement], path: Path) -> None:
    """Three panels: requests per second as a share of bare vLLM's at the most streams, then in full, and time to first token."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    most = max(m.streams for m in measurements)
    systems = [system for system in SYSTEMS if any(m.system == system for m in measurements)]
    figure, (shares, rates, firsts) = pyplot.subplots(
        1, 3, figsize=(13, 4.2), width_ratios=(1.15, 1.3, 1.3), layout="constrained"
    )
    _draw_shares(shares, measurements, systems, most)
    _draw_levels(rates, measurements, systems, lambda summary: summary.requests_per_s)
    rates.set_title("Requests per second", loc="left")
    _draw_levels(firsts, measurements, systems, lambda summary: summary.ttft_p50_ms or 0)
    firsts.set_yscale("log")
    firsts.set_title("Time to first token, p50 in ms (log)", loc="left")
    for axes in (shares, rates, firsts):
        axes.spines[["top", "right"]].set_visible(False)
    rates.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _draw_shares(axes: Any, measurements: Sequence[Measurement], systems: Sequence[str], streams: int) -> None:
    for place, system in enumerate(reversed(systems)):
        found = ratio(measurements, system, "bare_vllm", streams)
        if found is not None:
            axes.barh(place, found.median, height=0.6, color=COLOURS[system], xerr=_whiskers([found]), ecolor="#444", capsize=3)
            axes.text(found.high + 0.02, place, f"{found.median:.2f}×", va="center", weight="bold")
    axes.set_yticks(range(len(systems)), [LABELS[system] for system in reversed(systems)])
    axes.set_title(f"{streams} streams: share of bare vLLM", loc="left")
    axes.margins(x=0.18)


def _draw_levels(
    axes: Any, measurements: Sequence[Measurement], systems: Sequence[str], value: Callable[[Summary], float]
) -> None:
    """Bars in a group per number of streams, whiskers from the lowest to the highest round."""
    groups = grouped(measurements)
    levels = sorted({m.streams for m in measurements})
    width = 0.8 / len(systems)
    for place, system in enumerate(systems):
        spreads = [spread([value(summary) for summary in groups[system, streams, True]]) for streams in levels]
        at = [level + (place - (len(systems) - 1) / 2) * width for level in range(len(levels))]
        heights = [one.median for one in spreads]
        axes.bar(
            at, heights, width, color=COLOURS[system], label=LABELS[system], yerr=_whiskers(spreads), ecolor="#444", capsize=2
        )
    axes.set_xticks(range(len(levels)), [f"{streams} stream{'s' if streams > 1 else ''}" for streams in levels])


def _whiskers(spreads: Sequence[Spread]) -> list[list[float]]:
    return [[one.median - one.low for one in spreads], [one.high - one.median for one in spreads]]
