"""Results as pictures: the only importer of matplotlib. Nothing is shown, everything is a PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from training.evaluate.metrics import Curve
from training.evaluate.report import TITLES
from training.evaluate.sheets import Sheet

_GREEN, _RED, _GREY = "#1a9850", "#d73027", "#bbbbbb"
_ENCODERS = ("#2166ac", "#e08214")  # source, against
# Task → the figure that stands for it.
_HEADLINES = {
    "knn": ("top1", "kNN top-1"),
    "linear": ("top1", "linear top-1"),
    "retrieval": ("recall_at_1", "retrieval R@1"),
    "copies": ("micro_ap_best", "copies µAP best"),
    "label-free": ("recall_at_1", "label-free R@1"),
    "revisited": ("medium_map", "revisited M mAP"),
    "agreement": ("agreement", "shared neighbours"),
}


def bars(results: dict[str, Any], encoders: list[str], path: Path) -> str:
    """A bar chart per task: encoders beside baselines. Returns the file's name."""
    figure = Figure(figsize=(0.6 + 3.2 * len(results), 3.6), layout="constrained")
    axes = figure.subplots(1, len(results), squeeze=False)
    for axis, (task, found) in zip(axes[0], results.items(), strict=True):
        key, title = _HEADLINES.get(task, ("", TITLES[task]))
        values = {name: 100 * row[key] for name, row in found["results"].items() if key in row}
        names = list(values)
        colors = [_ENCODERS[encoders.index(n)] if n in encoders else _GREY for n in names]
        drawn = axis.barh(names, [values[n] for n in names], color=colors)
        axis.bar_label(drawn, fmt="%.1f", padding=2, fontsize=7)
        axis.invert_yaxis()
        axis.set_xlim(0, max(1.0, 1.18 * max(values.values(), default=1.0)))
        axis.set_title(f"{title}, %", fontsize=9)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def precision_recall(curves: dict[str, Curve], path: Path) -> str:
    """Copy detection: precision against recall of each query's best candidate. Returns the file's name."""
    figure = Figure(figsize=(5, 4), layout="constrained")
    axis = figure.subplots()
    for name, curve in curves.items():
        axis.step(100 * curve.recall, 100 * curve.precision, where="post", label=name, linewidth=1.2)
    axis.set(xlabel="recall, %", ylabel="precision, %", xlim=(0, 100), ylim=(0, 102), title="copy detection")
    axis.axhline(90, color=_GREY, linewidth=0.6, linestyle="--")
    axis.legend(fontsize=7, loc="lower left")
    axis.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def neighbors(sheet: Sheet, path: Path) -> str:
    """Queries at the left, their nearest pictures beside them; frames say right or wrong. Returns the file's name."""
    rows, columns = len(sheet.queries), 1 + max(len(row) for row in sheet.neighbors)
    figure = Figure(figsize=(0.9 * columns, 0.9 * rows + 0.4))
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.ravel():
        axis.set_axis_off()
    for r, (query, found) in enumerate(zip(sheet.queries, sheet.neighbors, strict=True)):
        axes[r, 0].imshow(query)
        for c, pixels in enumerate(found):
            color = None if sheet.right is None else (_GREEN if sheet.right[r][c] else _RED)
            axes[r, c + 1].imshow(pixels if color is None else _framed(pixels, color))
    figure.suptitle(f"{sheet.title}: query, then its nearest pictures", fontsize=8)
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.93, 0.04, 0.04)
    return _save(figure, path)


def _framed(pixels: Any, color: str) -> Any:
    width = max(1, len(pixels) // 16)
    rgb = np.asarray([int(color[i : i + 2], 16) for i in (1, 3, 5)], np.uint8)
    framed = np.tile(rgb, (len(pixels) + 2 * width, pixels.shape[1] + 2 * width, 1))
    framed[width:-width, width:-width] = pixels
    return framed


def _save(figure: Figure, path: Path) -> str:
    figure.savefig(path, dpi=110)  # through Agg: no display, no global state of pyplot
    return path.name
