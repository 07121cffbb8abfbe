"""What a day on four slots came to: rows, verdicts, a table and a chart."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.table import Table

from benchmarks.load import Sample, percentile
from benchmarks.place import passed
from cluster.capacity.handover import SlotSnapshot, handovers

TTFT_TARGET_S = 1.0
GLOBAL_BATCH = 114
"""All the examples that there are: a large batch, so that examples take more of a step's time than what every step costs."""
COLOURS = {"serving": "#0f7c8a", "training": "#e0b265", "idle": "#eef1f4", "starting": "#8cc4cc"}
LABELS = {"static": "static split", "stock_ray": "stock Ray", "springtide": "Springtide"}
POINT = 0.01


class Look(NamedTuple):
    """The pool at a moment, as Ray and Serve have it."""

    at_s: float
    """Since the trace began."""
    serving: int
    """Slots of replicas that answer."""
    starting: int
    """Replicas that are wanted and do not answer."""
    used: int
    """Slots that anybody holds."""


class Day(NamedTuple):
    """What one system made of the trace."""

    system: str
    began_s: float
    """Since the epoch."""
    samples: list[Sample]
    looks: list[Look]
    snapshots: list[SlotSnapshot]
    serve_said: str
    """The last that Serve's own log has about replicas that wait for a place; empty where none waited long."""
    trained: int
    """Examples."""
    steps_lost: int


def durations(day: Day) -> dict[str, list[float]]:
    """Hand-overs of the day, in seconds: ``{"slots_free", "resume", "grow_back"}``."""
    done = handovers(day.snapshots)
    return {
        "slots_free": [one.slots_free_s for one in done if one.slots_free_s is not None],
        "resume": [one.training_s for one in done if one.kind == "yield" and one.training_s is not None],
        "grow_back": [one.training_s for one in done if one.kind == "grow" and one.training_s is not None],
    }


def row(day: Day, seconds: float) -> dict[str, Any]:
    """One system's figures. Times in seconds, None where there were no hand-overs."""
    good = [sample for sample in day.samples if sample.ok]
    within = sum(sample.ttft_s <= TTFT_TARGET_S for sample in good)
    took, slots = durations(day), max((look.used for look in day.looks), default=0)
    return {
        "system": day.system,
        "requests": len(day.samples),
        "failed": len(day.samples) - len(good),
        "slo_attainment": within / max(1, len(day.samples)),
        "ttft_p50_s": percentile([sample.ttft_s for sample in good], 50),
        "ttft_p99_s": percentile([sample.ttft_s for sample in good], 99),
        "busy_slot_fraction": sum(look.used for look in day.looks) / max(1, 4 * len(day.looks)),
        "most_slots_used": slots,
        "serving_slot_s": sum(look.serving for look in day.looks) * seconds / max(1, len(day.looks)),
        "training_samples": day.trained,
        "steps_lost": day.steps_lost,
        "hand_overs": len(took["slots_free"]),
        "slots_free_p50_s": percentile(took["slots_free"], 50),
        "slots_free_p99_s": percentile(took["slots_free"], 99),
        "resume_p50_s": percentile(took["resume"], 50),
        "resume_p99_s": percentile(took["resume"], 99),
        "grow_back_p50_s": percentile(took["grow_back"], 50),
        "grow_back_p99_s": percentile(took["grow_back"], 99),
        "starved_s": starved(day),
        "serve_said": day.serve_said,
    }


def starved(day: Day) -> float:
    """The longest time for which a replica was wanted and did not answer, in seconds."""
    longest, since_s = 0.0, None
    for look in day.looks:
        since_s = None if not look.starting else look.at_s if since_s is None else since_s
        longest = max(longest, look.at_s - since_s) if since_s is not None else longest
    return longest


def line(day: Day, seconds: float) -> str:
    found = row(day, seconds)
    return (
        f"{LABELS[day.system]}: {found['slo_attainment']:.1%} of {found['requests']} requests in time, "
        f"{found['training_samples']:,} samples trained, {found['steps_lost']} steps lost"
    )


def table(rows: Sequence[dict[str, Any]]) -> Table:
    shown = Table("", *(LABELS[row["system"]] for row in rows), box=box.SIMPLE_HEAD)
    for words, key, form in (
        ("requests in time", "slo_attainment", "{:.2%}"),
        ("failed", "failed", "{}"),
        ("first token, p50", "ttft_p50_s", "{:.3f} s"),
        ("first token, p99", "ttft_p99_s", "{:.3f} s"),
        ("slots held", "busy_slot_fraction", "{:.1%}"),
        ("samples trained", "training_samples", "{:,}"),
        ("steps lost", "steps_lost", "{}"),
        ("hand-overs", "hand_overs", "{}"),
        ("slots free, p50", "slots_free_p50_s", "{:.2f} s"),
        ("slots free, p99", "slots_free_p99_s", "{:.2f} s"),
        ("training again, p50", "resume_p50_s", "{:.2f} s"),
        ("training again, p99", "resume_p99_s", "{:.2f} s"),
        ("whole again, p50", "grow_back_p50_s", "{:.2f} s"),
        ("whole again, p99", "grow_back_p99_s", "{:.2f} s"),
        ("longest wait for a replica", "starved_s", "{:.0f} s"),
    ):
        shown.add_row(words, *("–" if row[key] is None else form.format(row[key]) for row in rows))
    return shown


def verdicts(rows: Sequence[dict[str, Any]]) -> list[str]:
    found = {row["system"]: row for row in rows}
    ours, static = found.get("springtide"), found.get("static")
    lines: list[str] = []
    if ours and static:
        behind = static["slo_attainment"] - ours["slo_attainment"]
        more = ours["training_samples"] / max(1, static["training_samples"])
        lines.append(f"{behind * 100:+.2f} points of requests in time behind the static split; {passed(behind <= POINT)} (≤ 1)")
        lines.append(f"{more:.2f}× the static split's training; {passed(more >= 1.25)} (≥ 1.25×)")
    if ours:
        lines.append(f"{ours['steps_lost']} steps lost; {passed(ours['steps_lost'] == 0)} (0)")
        bars = (
            ("slots free", "slots_free_p99_s", 3),
            ("training again", "resume_p99_s", 8),
            ("whole again", "grow_back_p99_s", 10),
        )
        for words, key, limit in bars:
            took_s = ours[key]
            within = took_s is not None and took_s <= limit
            lines.append(f"{words}, p99: {'never' if took_s is None else f'{took_s:.2f} s'}; {passed(within)} (≤ {limit} s)")
        lines.append(f"{ours['failed']} requests failed; {passed(ours['failed'] == 0)} (0)")
    if stock := found.get("stock_ray"):
        lines.append(f"stock Ray: a replica was wanted and not there for {stock['starved_s']:.0f} s at a stretch")
        lines.append(f"Serve's log: {stock['serve_said'] or 'nothing about it'}")
    return lines


def draw(days: Sequence[Day], seconds: float, path: Path) -> None:
    """For each system its slots over the day, by owner, over every request's time to the first token."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(
        2 * len(days),
        1,
        figsize=(12, 3.1 * len(days)),
        sharex=True,
        height_ratios=[1.1, 1] * len(days),
        layout="constrained",
        squeeze=False,
    )
    for place, day in enumerate(days):
        _draw_slots(rows[2 * place][0], day)
        _draw_requests(rows[2 * place + 1][0], day)
    rows[-1][0].set_xlabel("seconds of the day")
    rows[-1][0].set_xlim(0, seconds)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_slots(axes: Any, day: Day) -> None:
    times_s = [look.at_s for look in day.looks]
    serving = [look.serving for look in day.looks]
    placed = [min(look.starting, max(0, look.used - look.serving)) if day.system != "stock_ray" else 0 for look in day.looks]
    rest = [max(0, look.used - look.serving - starting) for look, starting in zip(day.looks, placed, strict=True)]
    axes.stackplot(
        times_s, serving, placed, rest, step="post", labels=("serving", "starting", "training"),
        colors=(COLOURS["serving"], COLOURS["starting"], COLOURS["training"]),
    )  # fmt: skip
    axes.set_ylim(0, 4)
    axes.set_yticks(range(5))
    axes.set_title(f"{LABELS[day.system]}: slots", loc="left", weight="bold")
    axes.legend(loc="upper right", ncols=3, fontsize=8, framealpha=1)  # training has the colour that lies behind it


def _draw_requests(axes: Any, day: Day) -> None:
    if not day.samples:
        return
    start_s = min(sample.start_s for sample in day.samples)
    points = [(sample.start_s - start_s, sample.ttft_s) for sample in day.samples if sample.ok]
    axes.scatter(*zip(*points, strict=True), s=2, color="#52606d")
    axes.axhline(TTFT_TARGET_S, color="#cf3f3f", linewidth=1)
    axes.set_yscale("log")
    axes.set_title("each request's time to the first token, s; the line is the target", loc="left", fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
