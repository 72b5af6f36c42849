"""parity.json as a picture: how faithful each graph is, how fast, and where its gate lies."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from export.bundle import Bundle
from export.parity import GATE_PICTURES, INT8_OVERLAP, MIN_COSINE, Parity, read_parity
from export.tune import MIN_OVERLAP

# Okabe and Ito's colours, told apart by colour-blind readers too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
_FLOOR = 1e-8  # of float32 cosines, nothing below it is told apart


def draw_parity(bundle: Bundle) -> Path | None:
    """Write parity.png beside parity.json; None where nothing was measured. Raises `OSError` where it cannot be written."""
    measurements = read_parity(bundle).measurements
    if not measurements:
        return None
    figure = Figure(figsize=(11.5, 1.9 + 0.42 * len(measurements)), layout="constrained")
    error, overlap, speed = figure.subplots(1, 3)
    names = [_name(m, measurements) for m in measurements]
    rows = range(len(measurements))
    colours = [_COLOURS[i % len(_COLOURS)] for i in rows]
    error.scatter([max(1 - m.minimum_cosine, _FLOOR) for m in measurements], rows, color=colours, s=42, zorder=2)
    for i, m in enumerate(measurements):
        if m.variant in MIN_COSINE:
            error.plot([1 - MIN_COSINE[m.variant]] * 2, [i - 0.35, i + 0.35], color="#c62828", linewidth=1.2)
    error.set(xscale="log", yticks=rows, yticklabels=names, title="1 − lowest cosine (red: gate)")
    error.set_xlim(_FLOOR / 2, 1)
    error.set_ylim(len(measurements) - 0.5, -0.5)
    overlap.scatter([m.neighbor_overlap_at_10 for m in measurements], rows, color=colours, s=42, zorder=2)
    for value, style in ((INT8_OVERLAP, "-"), (MIN_OVERLAP, ":")):
        overlap.axvline(value, color="#c62828", linewidth=1.2, linestyle=style)
    lowest = min(m.neighbor_overlap_at_10 for m in measurements)
    overlap.set(yticks=[], title=f"overlap@10 (gate of int8 {INT8_OVERLAP}, to be chosen {MIN_OVERLAP})")
    overlap.set_xlim(min(0.9, lowest - 0.05), 1.01)
    overlap.set_ylim(error.get_ylim())
    for i, m in enumerate(measurements):
        few = "" if m.pictures >= GATE_PICTURES else f" ({m.pictures} pictures: says little)"
        overlap.annotate(f"{m.neighbor_overlap_at_10:.3f}{few}", (m.neighbor_overlap_at_10, i), (-8, 0),
                         textcoords="offset points", ha="right", va="center", fontsize=9)  # fmt: skip
    for m, colour in zip(measurements, colours, strict=True):
        speed.plot([s.batch for s in m.speed], [s.images_per_second for s in m.speed], "o-", color=colour, markersize=4)
    speed.set(xscale="log", title="images/s by batch size", xlabel="batch")
    speed.set_xticks([s.batch for s in measurements[0].speed], [str(s.batch) for s in measurements[0].speed])
    speed.minorticks_off()
    fastest, slowest = (pick(s.images_per_second for m in measurements for s in m.speed) for pick in (max, min))
    if fastest > 10 * slowest:  # a GPU beside a CPU
        speed.set_yscale("log")
    else:
        speed.set_ylim(bottom=0)
    for axes in (error, overlap, speed):
        axes.title.set_fontsize(10)
        axes.grid(axis="x" if axes is not speed else "y", color="#e6e8eb", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, labelsize=9)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
    machines = sorted({m.machine for m in measurements})
    figure.supxlabel("; ".join(machines), fontsize=8, color="#555")
    path = bundle.folder / "parity.png"
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=110)
    temporary.replace(path)
    return path


def _name(m: Parity, among: list[Parity]) -> str:
    short = f"{m.variant}, {m.provider.removesuffix('ExecutionProvider')}"
    same = [o for o in among if (o.variant, o.provider) == (m.variant, m.provider)]
    return short if len(same) == 1 else f"{short} ({same.index(m) + 1})"
