"""How an evaluation of an index is shown: a table, and one HTML file that opens anywhere (no network, no scripts)."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from rich.table import Table

from export.bundle import printable, write_file
from export.preprocess import PreprocessSpec, UnreadablePictureError, preprocess
from service.evaluate import Evaluation, Found, SegmentFigures, Sheet, Shown
from service.quality import Estimate, Hubness, Scores

SIDE = 96  # of a thumbnail, in pixels

_STYLE = """
:root { color-scheme: light dark; --page: #f4f5f7; --paper: #fff; --ink: #1d2129; --quiet: #5b6270; --line: #dfe2e7;
  --a: #2563b8; --b: #b8730f; --right: #2e7d32; --wrong: #c62828; }
@media (prefers-color-scheme: dark) { :root { --page: #14161a; --paper: #1e2127; --ink: #e8eaee; --quiet: #a2a9b5;
  --line: #363b44; --a: #78aef0; --b: #e5a94e; --right: #6cc070; --wrong: #f07f7f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 56px; }
h1 { font-size: 25px; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 18px; margin: 0 0 8px; }
p { margin: 4px 0 10px; } .quiet, small, figcaption { color: var(--quiet); }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; padding: 18px 22px; margin-top: 16px;
  overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
td, th { text-align: left; vertical-align: top; padding: 4px 16px 4px 0; border-bottom: 1px solid var(--line); }
th { color: var(--quiet); font-weight: 500; } td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.figures td:first-child, td.value { white-space: nowrap; }
td.value { font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 20px 26px; }
figure { margin: 0; } figcaption { font-size: 13px; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--quiet); font: 11px system-ui, sans-serif; }
.axis { stroke: var(--line); } .a { fill: var(--a); } .b { fill: var(--b); } .a, .b { fill-opacity: .62; }
polyline { fill: none; stroke: var(--a); stroke-width: 1.5; } circle { fill: var(--a); }
circle.chosen { fill: none; stroke: var(--b); stroke-width: 2.5; }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin: 0 4px 0 10px; }
.key.a { background: var(--a); } .key.b { background: var(--b); }
.row { display: flex; gap: 8px; padding: 8px 0; border-bottom: 1px solid var(--line); }
.row:last-child { border-bottom: 0; }
.row .query { margin-right: 14px; }
.tile { width: 104px; flex: none; font-size: 11px; color: var(--quiet); }
.tile .picture { width: 104px; height: 104px; border: 4px solid transparent; border-radius: 6px; background: var(--page);
  display: flex; align-items: center; justify-content: center; text-align: center; overflow: hidden; }
.tile img { width: 96px; height: 96px; display: block; } .query .picture { border-color: var(--quiet); }
.right .picture { border-color: var(--right); } .wrong .picture { border-color: var(--wrong); }
.tile .name { display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; color: var(--ink); }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def figures_of(found: Evaluation) -> list[tuple[str, str, str]]:
    """What was measured, its value, and a remark: the lines of the table."""
    lines = []
    for each in found.index:
        remark = f"p50 {each.p50_ms:.2f} ms, p95 {each.p95_ms:.2f} ms"
        lines.append((f"recall@{each.k} of the index", _percent(each.recall), remark))
    within, whole = found.hubness.within, found.hubness.collection
    lines += [
        (
            "hubness: skewness of N_10",
            f"{within.skewness:.2f}",
            f"by chance {within.chance_skewness:.2f}; over all items {whole.skewness:.2f}, by chance "
            f"{whole.chance_skewness:.2f}",
        ),
        (
            "anti-hubs",
            f"{100 * within.anti_hubs:.1f} %",
            f"by chance {100 * within.chance_anti_hubs:.1f} %",
        ),
    ]
    lines += [(f"duplicates, score ≥ {d.score:g}", _percent(d.share), "") for d in found.duplicates]
    lines.append(
        (
            "score of the nearest",
            f"{found.scores.nearest_median:.3f}",
            f"random {found.scores.random_median:.3f}; medians",
        )
    )
    if found.labels is not None:
        it = found.labels
        lines.append((
            f"mAP by {it.field}", _percent(it.mean_average_precision),
            f"{it.mean_average_precision.queries:,} queries, {it.gallery:,} items, {it.labels:,} labels; "
            f"{it.without_relevant:,} queries without a relevant item, {it.unlabelled:,} items without a label",
        ))  # fmt: skip
        lines += [(f"Recall@{at.k} by {it.field}", _percent(at.value), "") for at in it.recall_at]
    if found.self_retrieval is not None:
        own = found.self_retrieval
        for i, each_edit in enumerate(own.edits):
            remark = f"@10 {_percent(each_edit.recall_at_10)}"
            if i == 0:
                remark += f"; {own.pictures:,} pictures, {own.unreadable:,} not readable"
            lines.append((f"itself found @1: {each_edit.edit}", _percent(each_edit.recall_at_1), remark))
    if found.against is not None:
        other = found.against
        for i, at in enumerate(other.overlap_at):
            remark = f"{other.missing:,} not there, {other.short:,} with too few shared neighbours" if i == 0 else ""
            lines.append((f"overlap@{at.k} with {other.name}", _percent(at.value), remark))
    return lines


def table_of(found: Evaluation) -> Table:
    """For the terminal."""
    title = f"{found.name}: {found.items:,} items, {found.sampled:,} of them asked"
    table = Table("", "value", "", box=None, title=printable(title), title_justify="left")
    for line in figures_of(found):
        table.add_row(*map(printable, line))
    return table


def _percent(it: Estimate) -> str:
    return f"{100 * it.mean:.1f} ± {100 * it.error:.1f} %"


def write_report(path: Path, found: Found) -> None:
    """Write the page."""
    write_file(path, page(found))


def page(found: Found) -> str:
    """The page. Every name in it is escaped, and nothing in it leads anywhere."""
    it = found.evaluation
    title = _text(f"{it.name}: evaluation of the index")
    parts = [
        _head(it),
        _figures(it),
        _charts(it.scores, it.hubness),
        _segments(it.segments),
        _hubs(found.hubs, it.hubness),
    ]
    parts += [_sheets(found.sheets, it.labels is not None), _configuration(it)]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head>\n<body><main>\n" + "\n".join(filter(None, parts)) + "\n</main></body></html>\n"
    )


def _text(text: str) -> str:
    return html.escape(printable(text))


def _section(title: str, body: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{body}</section>"


# --- sections -----------------------------------------------------------------------------------------------------


def _head(it: Evaluation) -> str:
    return (
        f"<h1>{_text(it.name)}</h1><p class='quiet'>{it.items:,} items of {it.dim} dimensions; segments: "
        f"{len(it.segments)}, rows in none of them yet: {it.fresh:,}; {it.sampled:,} drawn as queries (seed {it.seed}), "
        "each left out of its own answer</p>"
    )


def _figures(it: Evaluation) -> str:
    rows = "".join(
        f"<tr><td>{_text(name)}</td><td class='value'>{_text(value)}</td><td class='quiet'>{_text(remark)}</td></tr>"
        for name, value, remark in figures_of(it)
    )
    note = "<p class='quiet'>± is one standard error over the queries.</p>"
    if it.labels is not None:
        filters = [
            f"{what}: {text}"
            for what, text in (("queries", it.labels.query_filter), ("gallery", it.labels.gallery_filter))
            if text
        ]
        said = f" {'; '.join(filters)}." if filters else ""
        note += (
            "<p class='quiet'>mAP: the mean over queries of (1/R) Σ i / rank<sub>i</sub>, the gallery ranked whole and "
            f"exactly; equal scores come in together.{_text(said)}</p>"
        )
    return _section("Figures", f"<table class='figures'>{rows}</table>{note}")


def _charts(scores: Scores, hubs: Hubness) -> str:
    used = [i for i in range(len(scores.nearest)) if scores.nearest[i] or scores.random[i]] or [0]
    low, high = min(used), max(used) + 1
    width = 2 / len(scores.nearest)
    parts = [
        _figure(
            "Score of the nearest neighbour <span class='key a'></span>nearest <span class='key b'></span>random pairs",
            _bars(
                [("b", scores.random[low:high]), ("a", scores.nearest[low:high])],
                f"{-1 + low * width:.2f}",
                f"{-1 + high * width:.2f}",
                "share of the queries, of the pairs",
            ),
        ),
        _figure(
            "How often an item is among the ten nearest of others (N_10), within the sample",
            _bars(
                [("a", hubs.counts)],
                "0",
                f"{len(hubs.counts) - 1}{' or more' if len(hubs.counts) > 60 else ''}",
                "share of the items",
            ),
        ),
    ]
    return _section("Distributions", f"<div class='charts'>{''.join(parts)}</div>")


def _segments(segments: Sequence[SegmentFigures]) -> str:
    if not segments:
        return ""
    rows = "".join(
        f"<tr><td>{s.number:04d}</td><td>{s.rows:,}</td><td>{s.dead:,}</td><td>{_text(s.index.factory)}</td>"
        f"<td>{s.index.visits or 'all'}</td><td>{s.index.recall_at_10:.3f}</td><td>{_text(s.index.why)}</td></tr>"
        for s in segments
    )
    head = "".join(f"<th>{name}</th>" for name in ("segment", "rows", "dead", "index", "visits", "recall@10", "why"))
    charts = [_curve(s) for s in segments if len(s.index.curve) > 1][:12]
    body = f"<table><tr>{head}</tr>{rows}</table>"
    if charts:
        body += (
            "<p class='quiet'>As measured when each was built; the ring is what searches use.</p>"
            f"<div class='charts'>{''.join(charts)}</div>"
        )
    return _section("Segments", body)


def _hubs(hubs: Sequence[Shown], hubness: Hubness) -> str:
    if not hubs:
        return ""
    counts = (f"in {hub.occurrences:,} of {hubness.collection.lists:,} lists" for hub in hubness.hubs)
    tiles = "".join(_tile(shown, said, "") for shown, said in zip(hubs, counts, strict=False))
    return _section("Items that are a neighbour most often", f"<div class='row'>{tiles}</div>")


def _sheets(sheets: Sequence[Sheet], labelled: bool) -> str:
    if not sheets:
        return ""
    rows = []
    for sheet in sheets:
        tiles = [_tile(sheet.query, "query", "query")]
        for shown in sheet.neighbours:
            said = "" if shown.score is None else f"{shown.score:.3f}"
            if shown.agrees is not None:
                said += " ✓ same" if shown.agrees else " ✗ other"
            tiles.append(_tile(shown, said, {None: "", True: "right", False: "wrong"}[shown.agrees]))
        rows.append(f"<div class='row'>{''.join(tiles)}</div>")
    note = (
        "a green frame where the label is the query's, a red one where it is another" if labelled else "without labels"
    )
    return _section(
        "Neighbours", f"<p class='quiet'>Queries drawn at random, as the index answers; {note}.</p>{''.join(rows)}"
    )


def _configuration(it: Evaluation) -> str:
    lines = {
        "space": it.space_id,
        "vectors made by": ", ".join(it.origins) or "clients",
        "writes": f"{it.sequence:,}",
        "seed": str(it.seed),
        "machine": it.machine,
        "versions": ", ".join(f"{name} {version}" for name, version in it.versions.items()),
        "took": f"{it.seconds:.1f} s",
    }
    rows = "".join(f"<tr><td>{_text(name)}</td><td>{_text(value)}</td></tr>" for name, value in lines.items())
    return _section("Measured on", f"<table>{rows}</table>")


# --- pieces -------------------------------------------------------------------------------------------------------


def _tile(shown: Shown, said: str, kind: str) -> str:
    thumbnail = _thumbnail(shown.picture)
    key = _text(shown.key)
    picture = "<small>no picture here</small>" if thumbnail is None else f"<img src='{thumbnail}' alt=''>"
    return (
        f"<div class='tile {kind}' title='{key}'><div class='picture'>{picture}</div>"
        f"<span class='name'>{key}</span>{_text(said)}</div>"
    )


def _thumbnail(data: bytes | None) -> str | None:
    """As a data: address; None where there is no picture, or it cannot be read."""
    if data is None:
        return None
    try:
        pixels = preprocess(data, PreprocessSpec(size=SIDE, fit="pad")).pixels
    except UnreadablePictureError:
        return None
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _figure(caption: str, drawing: str) -> str:
    """`caption` is markup."""
    return f"<figure><figcaption>{caption}</figcaption>{drawing}</figure>"


def _bars(series: Sequence[tuple[str, Sequence[int]]], first: str, last: str, axis: str) -> str:
    """Histograms over the same bins, each as shares of its own total."""
    shares = [(name, [count / max(sum(counts), 1) for count in counts]) for name, counts in series]
    top = max(max(values) for _, values in shares) or 1.0
    bars = []
    for name, values in shares:
        step = 330 / len(values)
        bars += [
            f"<rect class='{name}' x='{36 + i * step:.2f}' y='{150 - 130 * value / top:.2f}' "
            f"width='{max(step - 0.6, 0.6):.2f}' height='{130 * value / top:.2f}'/>"
            for i, value in enumerate(values)
            if value
        ]
    return _axes(
        "".join(bars), (first, last), ("0", f"{100 * top:.0f} %" if top >= 0.1 else f"{100 * top:.1f} %"), axis
    )


def _curve(segment: SegmentFigures) -> str:
    """Recall over milliseconds, a line per re-scoring."""
    points = segment.index.curve
    slowest, worst = max(p.ms for p in points) or 1.0, min(p.recall_at_10 for p in points)
    low = min(worst, 0.99)

    def place(ms: float, recall: float) -> tuple[float, float]:
        return 36 + 326 * ms / slowest, 150 - 130 * (recall - low) / (1 - low)

    drawn = []
    for rescore in sorted({p.rescore for p in points}):
        line = sorted((p for p in points if p.rescore == rescore), key=lambda p: p.visits)
        at = [place(p.ms, p.recall_at_10) for p in line]
        drawn.append(f"<polyline points='{' '.join(f'{x:.1f},{y:.1f}' for x, y in at)}'/>")
        for (x, y), point in zip(at, line, strict=True):
            said = f"{point.visits} visits, re-scoring {point.rescore}: {point.recall_at_10:.3f}, {point.ms:.3f} ms"
            drawn.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='2.5'><title>{said}</title></circle>")
            if (point.visits, point.rescore) == (segment.index.visits, segment.index.rescore):
                drawn.append(f"<circle class='chosen' cx='{x:.1f}' cy='{y:.1f}' r='6'/>")
    drawing = _axes("".join(drawn), ("0", f"{slowest:.3g} ms"), (f"{low:.2f}", "1"), "recall@10")
    return _figure(f"Segment {segment.number:04d}, {_text(segment.index.factory)}", drawing)


def _axes(drawing: str, x: tuple[str, str], y: tuple[str, str], axis: str) -> str:
    return (
        "<svg viewBox='-8 0 388 172' role='img'><line class='axis' x1='36' y1='150' x2='368' y2='150'/>"
        f"<line class='axis' x1='36' y1='20' x2='36' y2='150'/>{drawing}"
        f"<text x='36' y='166'>{_text(x[0])}</text><text x='366' y='166' text-anchor='end'>{_text(x[1])}</text>"
        f"<text x='32' y='152' text-anchor='end'>{_text(y[0])}</text>"
        f"<text x='32' y='24' text-anchor='end'>{_text(y[1])}</text><text x='42' y='14'>{_text(axis)}</text></svg>"
    )
