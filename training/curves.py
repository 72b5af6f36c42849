"""The report's curves: what metrics.jsonl holds, as SVG."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from training.monitor import BASELINES, Health, read_history

# Okabe and Ito's colours, told apart by colour-blind readers too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_GREY = "#8a8f98"
STABILISERS = ("koleo", "variance", "sigreg", "mean_entropy_gap")


class Metrics(NamedTuple):
    """metrics.jsonl, sorted by kind."""

    steps: list[dict[str, Any]]
    history: list[Health]
    alarms: list[dict[str, Any]]


class Line(NamedTuple):
    """One curve; dashed grey where it is something to compare with."""

    name: str
    at: list[float]
    values: list[float]
    reference: bool = False


class Panel(NamedTuple):
    """One chart."""

    title: str
    note: str
    """What to look for, in a sentence."""
    lines: list[Line]


def read_metrics(run: Path) -> Metrics:
    """What a run logged; empty where it logged nothing."""
    path = run / "metrics.jsonl"
    lines = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue  # cut short by a kill
    return Metrics(
        [line for line in lines if "loss" in line], read_history(path), [line for line in lines if "alarm" in line]
    )


def panels(metrics: Metrics) -> list[Panel]:
    """The charts that the metrics can fill."""
    history = metrics.history
    at = [float(h.step) for h in history]

    def health(name: str, value: Callable[[Health], float], reference: bool = False) -> Line:
        return Line(name, at, [value(h) for h in history], reference)

    def method(name: str, key: str, reference: bool = False) -> Line:
        return health(name, lambda h: h.diagnostics.get(key, math.nan), reference)

    def logged(key: str, name: str | None = None) -> Line:
        rows = [(float(s["step"]), float(s[key])) for s in metrics.steps if key in s]
        return Line(name or key.replace("_", " "), [a for a, _ in rows], [v for _, v in rows])

    terms = sorted({k for s in metrics.steps for k in s if k.startswith("loss") or k in STABILISERS})
    rates = [
        k
        for k in ("lr", "momentum", "weight_decay", "teacher_temperature", "koleo_weight")
        if any(k in s for s in metrics.steps)
    ]
    knn = [health("this encoder", lambda h: h.knn)]
    knn += [
        health(name, lambda h, n=name: h.knn - h.lead[n][0] if n in h.lead else math.nan, True)  # type: ignore[misc]
        for name in BASELINES
    ]
    shared = [health(name, lambda h, n=name: 100 * h.overlap.get(n, math.nan)) for name in BASELINES]  # type: ignore[misc]
    found = [
        Panel("Loss", "A loss near ln P is no alarm by itself.", [logged(k) for k in terms]),
        Panel("kNN accuracy, %", "Leave one out, by folder. It must leave the baselines behind.", knn),
        Panel("Neighbours shared with the baselines, %", "Of the 10 nearest. Lines that stay high: the encoder adds little.",
              [*shared, health("chance", lambda h: 100 * h.chance, True)]),
        Panel("Mean cosine between different pictures", "1 is collapse to a point. An early rise is healthy.",
              [health("features", lambda h: h.features.mean_cosine), health("head", lambda h: h.heads.mean_cosine)]),
        Panel("Effective rank (RankMe)", "Low and still falling after warm-up is dimensional collapse.",
              [health("features", lambda h: h.features.effective_rank), health("head", lambda h: h.heads.effective_rank)]),
        Panel("Neighbour cosine over the random level", "In standard deviations of the pairwise cosines.",
              [health("features", lambda h: h.features.neighbour_excess),
               health("head", lambda h: h.heads.neighbour_excess)]),
        Panel("Entropy of the votes, nats", "The mean vote should stay near its maximum, single votes below it.",
              [method("single vote", "vote_entropy"), method("mean vote", "mean_vote_entropy"),
               method("over voters", "voter_entropy"), method("maximum", "max_entropy", True)]),
        Panel("Leak and support", "Share of leaked votes; mean cosine of anchors and their support.",
              [method("leak", "leak"), method("support cosine", "support_cosine")]),
        Panel("Memory age, steps", "Since the oldest row was written.", [method("oldest row", "memory_age")]),
        *(Panel({"lr": "Learning rate"}.get(k, k.replace("_", " ").capitalize()), "", [logged(k)]) for k in rates),
        Panel("Speed, images/s", "", [logged("images_per_second", "images/s")]),
        Panel("Waiting for data", "Share of a step's time.", [logged("data_wait")]),
    ]  # fmt: skip
    kept = []
    for panel in found:
        lines = [line for line in panel.lines if any(math.isfinite(v) for v in line.values)]
        if any(not line.reference for line in lines):
            kept.append(panel._replace(lines=lines))
    return kept


def draw(panel: Panel, alarm_steps: list[float], last_step: float) -> str:
    """The chart as an SVG data URI; vertical lines where an alarm was raised."""
    with matplotlib.rc_context({"font.family": "sans-serif", "font.size": 9, "svg.hashsalt": panel.title}):
        figure = Figure(figsize=(4.8, 2.7))
        figure.subplots_adjust(left=0.13, right=0.975, top=0.97, bottom=0.17)  # an automatic layout costs as much again
        axes = figure.subplots()
        colours = iter(_COLOURS)
        dashes = iter(("--", ":", "-.", (0, (1, 3))))
        for line in panel.lines:
            few = len(line.at) <= 30
            if line.reference:
                axes.plot(line.at, line.values, linestyle=next(dashes), color=_GREY, linewidth=1.3, label=line.name)
            else:
                axes.plot(
                    line.at, line.values, color=next(colours), linewidth=1.6, marker="o" if few else None, markersize=3,
                    label=line.name,
                )  # fmt: skip
        for step in alarm_steps:
            axes.axvline(step, color="#c62828", linewidth=0.8, alpha=0.35, zorder=0)
        axes.set_xlim(0, max(last_step, 1))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel("step", color="#555")
        axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors="#555", length=0)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color("#c9ccd1")
        if len(panel.lines) > 1:
            axes.legend(frameon=False, fontsize=8, labelcolor="#333", handlelength=1.8)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
