"""report.html: a run on one page that opens anywhere (no network, no scripts), from what the run folder holds."""

from __future__ import annotations

import base64
import html
import io
import json
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from export.bundle import RefusalError, RunManifest, read_run, write_file
from training.curves import Metrics, draw, panels, read_metrics
from training.snapshots import MAPS, QUERIES, NeighbourSheet, SeenPictures, read_snapshots

NAME = "report.html"
SHEETS = 4  # steps shown of the neighbours

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f5f7; color: #1d2129; font: 15px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 0 0 6px; } h3 { font-size: 15px; margin: 18px 0 8px; }
p { margin: 4px 0 10px; } .quiet { color: #5b6270; } code { font: 13px ui-monospace, Menlo, Consolas, monospace; }
section { background: #fff; border: 1px solid #e3e5e9; border-radius: 10px; padding: 20px 24px; margin-top: 18px; }
.good { border-left: 5px solid #2e7d32; } .bad { border-left: 5px solid #c62828; }
.neutral { border-left: 5px solid #8a8f98; }
.figures { display: flex; flex-wrap: wrap; gap: 10px 26px; margin-top: 14px; }
.figures div { min-width: 110px; } .figures b { display: block; font-size: 21px; font-weight: 600; }
.figures span { color: #5b6270; font-size: 13px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(420px, 1fr)); gap: 22px 26px; }
figure { margin: 0; } figcaption { font-weight: 600; } figcaption small { display: block; font-weight: 400; color: #5b6270; }
.charts img { width: 100%; }
.sheet { display: grid; grid-template-columns: repeat(2, 1fr); gap: 10px 36px; }
.row { display: flex; gap: 5px; } .row .query { margin-right: 12px; }
.thumb { width: 57px; text-align: center; font-size: 11px; color: #5b6270; }
.thumb i { display: block; width: 57px; height: 57px; border: 3px solid transparent; border-radius: 6px;
  background-size: cover; background-origin: border-box; }
.query i { border-color: #1d2129; } .same i { border-color: #2e9e44; } .other i { border-color: #e05252; }
.maps { display: flex; flex-wrap: wrap; gap: 14px 22px; }
.maps figure { text-align: center; font-size: 12px; color: #5b6270; }
.maps img { width: 147px; height: 147px; border-radius: 6px; margin: 0 1px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; } td, th { text-align: left; vertical-align: top;
  padding: 5px 14px 5px 0; border-bottom: 1px solid #eceef1; } th { color: #5b6270; font-weight: 500; }
td:nth-child(n+2) { font-variant-numeric: tabular-nums; }
@media (max-width: 720px) { .sheet { grid-template-columns: 1fr; } .charts { grid-template-columns: 1fr; } }
"""


def write_report(run: Path) -> Path:
    """Write `report.html` of a run folder and return its path.

    It needs run.json; metrics, sheets and verdict.json are shown as far as they exist. Raises `RefusalError` where the
    folder is no run or a file in it is damaged.
    """
    manifest = read_run(run)
    metrics = read_metrics(run)
    sheets, seen = read_snapshots(run)
    title = html.escape(f"{manifest.method.upper()} on {Path(manifest.data.folder).name}")
    parts = [
        _head(manifest, metrics, title),
        _alarms(metrics),
        _verdict(run),
        _curves(metrics, manifest),
        _neighbours(sheets, seen),
        _maps(sheets, seen),
        _configuration(manifest),
    ]
    thumbnails = "".join(f".p{i} {{ background-image: url({_jpeg(x)}); }}\n" for i, x in seen.thumbnails.items())
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}{thumbnails}</style></head>\n<body><main>\n" + "\n".join(parts) + "\n</main></body></html>\n"
    )
    path = run / NAME
    write_file(path, page)
    return path


# --- sections -----------------------------------------------------------------------------------------------------


def _head(manifest: RunManifest, metrics: Metrics, title: str) -> str:
    figures = [
        (f"{manifest.data.pictures:,}", "pictures"),
        (f"{manifest.steps_done:,}", f"of {manifest.steps_total:,} steps"),
    ]
    if metrics.history:
        last = metrics.history[-1]
        if last.knn == last.knn:
            figures.append((f"{last.knn:.1f} %", f"kNN; best baseline {last.knn - _best(last.lead):.1f} %"))
        figures.append((f"{last.features.effective_rank:.1f}", "effective rank"))
        figures.append((f"{last.features.mean_cosine:.2f}", "mean cosine"))
    cells = "".join(f"<div><b>{html.escape(a)}</b><span>{html.escape(b)}</span></div>" for a, b in figures)
    encoder = manifest.encoder
    return (
        f"<h1>{title}</h1><p class='quiet'>{html.escape(encoder.model)} at {encoder.image_size} px, "
        f"{encoder.embedding_dim} numbers per picture</p><div class='figures'>{cells}</div>"
    )


def _best(lead: dict[str, tuple[float, float]]) -> float:
    """The smallest lead: over the best baseline."""
    return min((points for points, _ in lead.values()), default=0.0)


def _alarms(metrics: Metrics) -> str:
    if not metrics.history:
        return _section("Alarms", "<p>Nothing was measured yet.</p>", "neutral")
    if not metrics.alarms:
        return _section("Alarms", "<p>No alarm.</p>", "good")
    latest = metrics.history[-1].step
    items = []
    in_order = sorted(metrics.alarms, key=lambda a: (str(a.get("kind")), a["step"]))
    for _, group in groupby(in_order, key=lambda a: str(a.get("kind"))):
        same = list(group)
        steps = [int(a["step"]) for a in same]
        when = (
            f"at step {steps[0]:,}" if len(steps) == 1 else f"{len(steps)} times, steps {steps[0]:,} to {steps[-1]:,}"
        )
        state = "still at the end" if steps[-1] == latest else "no longer at the end"
        items.append(
            f"<p><b>{html.escape(str(same[-1]['alarm']))}</b><br><span class='quiet'>{when}; {state}</span></p>"
        )
    return _section("Alarms", "".join(items), "bad")


def _verdict(run: Path) -> str:
    path = run / "verdict.json"
    if not path.is_file():
        return ""
    try:
        verdict = json.loads(path.read_bytes())
        export, sentence, scores = verdict["export"], verdict["sentence"], verdict.get("scores", {})
    except (ValueError, KeyError, TypeError) as e:
        raise RefusalError(f"{path} cannot be read ({e}): expected export, sentence and scores; remove it") from e
    body = f"<p><b>Export the {html.escape(str(export))} encoder.</b> {html.escape(str(sentence))}</p>"
    rows = "".join(_row(name, value) for name, value in scores.items())
    return _section(
        "Verdict", body + (f"<table>{rows}</table>" if rows else ""), "good" if export == "adapted" else "neutral"
    )


def _curves(metrics: Metrics, manifest: RunManifest) -> str:
    alarms = sorted({float(a["step"]) for a in metrics.alarms})
    charts = [
        f"<figure><figcaption>{html.escape(panel.title)}<small>{html.escape(panel.note)}&nbsp;</small></figcaption>"
        f'<img alt="{html.escape(panel.title)}" src="{draw(panel, alarms, manifest.steps_done)}"></figure>'
        for panel in panels(metrics)
    ]
    if not charts:
        return _section("Curves", "<p>Nothing was logged.</p>")
    note = "<p class='quiet'>Red lines: steps with an alarm.</p>" if alarms else ""
    return _section("Curves", note + f"<div class='charts'>{''.join(charts)}</div>")


def _neighbours(sheets: list[NeighbourSheet], seen: SeenPictures) -> str:
    if not sheets:
        return ""
    frames = (
        "Green frame: the same folder as the query; red: another one."
        if seen.labels
        else "Without labels there is no right or wrong here: do the neighbours show what you call similar?"
    )
    parts = [
        f"<p>Fixed queries (dark frame) and their nearest other pictures of the sample, with cosines. {frames}</p>"
    ]
    for sheet in _spread(sheets, SHEETS):
        right = ""
        if seen.labels:
            hits = [
                seen.labels[q] == seen.labels[int(i)]
                for q, row in zip(seen.queries, sheet.rows, strict=True)
                for i in row
            ]
            right = f" — {100 * sum(hits) / len(hits):.0f} % from the query's folder"
        rows = []
        for query, indices, cosines in zip(seen.queries, sheet.rows.tolist(), sheet.cosines.tolist(), strict=True):
            cells = [f"<div class='thumb query'><i class='p{query}'></i>&nbsp;</div>"]
            for index, cosine in zip(indices, cosines, strict=True):
                kind = ""
                if seen.labels:
                    kind = " same" if seen.labels[index] == seen.labels[query] else " other"
                cells.append(f"<div class='thumb{kind}'><i class='p{index}'></i>{cosine:.2f}</div>")
            rows.append(f"<div class='row'>{''.join(cells)}</div>")
        parts.append(f"<h3>Step {sheet.step:,}{right}</h3><div class='sheet'>{''.join(rows)}</div>")
    return _section("Nearest neighbours", "".join(parts))


def _maps(sheets: list[NeighbourSheet], seen: SeenPictures) -> str:
    if not sheets:
        return ""
    parts = [
        "<p>Cosine of each patch with the whole-picture token [CLS] (middle) and with the patch in the centre (right); "
        "bright is similar, each map scaled to its own range, which is given below it. These are similarities of the last "
        "layer's outputs, not attention weights.</p>"
    ]
    for sheet in _spread(sheets, 2):
        figures = []
        for query, (cls, centre) in zip(seen.queries[:: QUERIES // MAPS], sheet.maps, strict=True):
            picture = seen.thumbnails[query]
            images = [_jpeg(picture), _overlay(picture, cls), _overlay(picture, centre)]
            row = "".join(f'<img alt="" src="{image}">' for image in images)
            ranges = "; ".join(f"{float(m.min()):.2f} to {float(m.max()):.2f}" for m in (cls, centre))
            figures.append(f"<figure>{row}<div>{ranges}</div></figure>")
        parts.append(f"<h3>Step {sheet.step:,}</h3><div class='maps'>{''.join(figures)}</div>")
    return _section("What the patches see", "".join(parts))


def _configuration(manifest: RunManifest) -> str:
    names = [*manifest.config, *(name for name in manifest.reasons if name not in manifest.config)]
    rows = "".join(_row(n, manifest.config.get(n, ""), manifest.reasons.get(n, "")) for n in names)
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    revision = f"; revision {manifest.git_revision[:10]}" if manifest.git_revision else ""
    table = f"<table><tr><th>Setting</th><th>Value</th><th>Why</th></tr>{rows}</table>"
    return _section("Configuration", f"{table}<p class='quiet'>{html.escape(versions + revision)}</p>")


# --- pieces -------------------------------------------------------------------------------------------------------


def _section(title: str, body: str, kind: str = "") -> str:
    return f"<section class='{kind}'><h2>{title}</h2>{body}</section>"


def _row(name: str, value: Any, why: str | None = None) -> str:
    shown = f"{value:g}" if isinstance(value, float) else "–" if value is None else str(value)
    cells = [f"<code>{html.escape(name)}</code>", html.escape(shown)] + ([] if why is None else [html.escape(why)])
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _spread(sheets: list[NeighbourSheet], count: int) -> list[NeighbourSheet]:
    """First, last and evenly between."""
    at = np.unique(np.linspace(0, len(sheets) - 1, count).round().astype(int))
    return [sheets[i] for i in at]


def _jpeg(picture: Tensor) -> str:
    """A data URI of uint8 [s, s, 3]."""
    return _uri(Image.fromarray(picture.numpy()), "JPEG", quality=85)


def _overlay(picture: Tensor, similarity: Tensor, side: int = 160) -> str:
    """The picture in grey under a map [h, w], from dark blue (its lowest) to yellow (its highest)."""
    low, high = similarity.min(), similarity.max()
    scaled = (similarity - low) / (high - low).clamp_min(1e-6)
    large = F.interpolate(scaled[None, None], size=(side, side), mode="bilinear", align_corners=False)[0, 0]
    colour = torch.from_numpy(colormaps["viridis"](large.clamp(0, 1).numpy())[..., :3]).float()
    grey = np.asarray(Image.fromarray(picture.numpy()).convert("L").resize((side, side), Image.Resampling.BICUBIC))
    mixed = 0.65 * colour + 0.35 * torch.from_numpy(grey.astype(np.float32))[..., None] / 255
    return _uri(Image.fromarray((255 * mixed).round().byte().numpy()), "JPEG", quality=88)


def _uri(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()
