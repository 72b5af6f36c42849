"""Results as pictures. Nothing is shown, everything is a PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from export.bundle import printable
from export.preprocess import Pixels
from training.evaluate.metrics import Curve
from training.evaluate.report import TITLES
from training.evaluate.sheets import Sheet

_GREEN, _RED, _GREY = "#1a9850", "#d73027", "#bbbbbb"
_CELL, _GAP, _TITLE = 104, 8, 22  # of a neighbour sheet, in pixels
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


def drawn(name: str) -> str:
    """A name as matplotlib draws it letter by letter: `$` begins no formula, a leading `_` hides no legend entry."""
    text = printable(name).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def bars(results: dict[str, Any], encoders: list[str], path: Path) -> str:
    """A bar chart per task: encoders beside baselines. Returns the file's name."""
    figure = Figure(figsize=(0.6 + 3.2 * len(results), 3.6), layout="constrained")
    axes = figure.subplots(1, len(results), squeeze=False)
    for axis, (task, found) in zip(axes[0], results.items(), strict=True):
        key, title = _HEADLINES.get(task, ("", TITLES[task]))
        values = {name: 100 * row[key] for name, row in found["results"].items() if key in row}
        names = list(values)
        colors = [_ENCODERS[encoders.index(n)] if n in encoders else _GREY for n in names]
        shown = axis.barh(range(len(names)), [values[n] for n in names], color=colors)
        axis.set_yticks(range(len(names)), [drawn(n) for n in names])
        axis.bar_label(shown, fmt="%.1f", padding=2, fontsize=7)
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
        axis.step(100 * curve.recall, 100 * curve.precision, where="post", label=drawn(name), linewidth=1.2)
    axis.set(xlabel="recall, %", ylabel="precision, %", xlim=(0, 100), ylim=(0, 102), title="copy detection")
    axis.axhline(90, color=_GREY, linewidth=0.6, linestyle="--")
    axis.legend(fontsize=7, loc="lower left")
    axis.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def neighbors(sheet: Sheet, path: Path) -> str:
    """Queries at the left, their nearest pictures beside them; frames say right or wrong. Returns the file's name."""
    columns = 1 + max(len(row) for row in sheet.neighbors)
    canvas = Image.new("RGB", (columns * _CELL + _GAP, len(sheet.queries) * _CELL + _TITLE), "white")
    # Pillow's own font has no more than Latin letters.
    title = printable(sheet.title).encode("latin-1", "replace").decode("latin-1")
    ImageDraw.Draw(canvas).text((_GAP, 4), f"{title}: picture, then its nearest", fill="black")
    for r, (query, found) in enumerate(zip(sheet.queries, sheet.neighbors, strict=True)):
        top = _TITLE + r * _CELL
        _put(canvas, query, 0, top, None)
        for c, pixels in enumerate(found):
            color = None if sheet.right is None else (_GREEN if sheet.right[r][c] else _RED)
            _put(canvas, pixels, _GAP + (c + 1) * _CELL, top, color)
    canvas.save(path)
    return path.name


def _put(canvas: Image.Image, pixels: Pixels, left: int, top: int, frame: str | None) -> None:
    if frame is not None:
        ImageDraw.Draw(canvas).rectangle((left + 1, top + 1, left + _CELL - 2, top + _CELL - 2), fill=frame)
    inside = _CELL - 10
    canvas.paste(Image.fromarray(pixels).resize((inside, inside), Image.Resampling.BICUBIC), (left + 5, top + 5))


def _save(figure: Figure, path: Path) -> str:
    figure.savefig(path, dpi=110)  # through Agg: no display, no global state of pyplot
    return path.name
