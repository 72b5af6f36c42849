"""`likewise bundle list | show | verify | diff`: what a bundle is, whether it is whole and faithful here, how two differ."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from pydantic_settings import CliPositionalArg
from rich.console import Console

from export.bundle import Bundle, Embeddings, RefusalError, changing, write_file
from export.shipped import DEFAULT_NAME, BundleFolder, is_shipped, licence, shipped

_CONFIG = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class List(BaseModel):
    """List the encoders that come with likewise."""

    model_config = _CONFIG
    json_: bool = Field(False, alias="json")
    """Print them as JSON: name → folder."""

    def cli_cmd(self) -> int:
        """Run the command."""
        if self.json_:
            print(json.dumps({name: str(folder) for name, folder in shipped().items()}, indent=2))
            return 0
        for name, folder in shipped().items():
            bundle = Bundle.open(folder)
            size = sum(record.bytes for record in bundle.manifest.files.values()) / 2**20
            encoder = bundle.manifest.encoder
            print(
                f"{name}{' (the default)' if name == DEFAULT_NAME else ''}: {encoder.model} at {encoder.image_size} px, "
                f"{bundle.dim} dimensions, {size:.1f} MiB, space {bundle.space_id}"
            )
            print(f"    {licence(folder)}")
        return 0


class Show(BaseModel):
    """Say what a bundle is: network, preprocessing, graphs, where it comes from, what was measured."""

    model_config = _CONFIG
    bundle: CliPositionalArg[BundleFolder]
    """The bundle folder, or the name of an encoder that comes with likewise."""
    json_: bool = Field(False, alias="json")
    """Print the manifest itself."""

    def cli_cmd(self) -> int:
        """Run the command."""
        bundle = Bundle.open(self.bundle)
        if self.json_:
            print(bundle.manifest.model_dump_json(indent=2))
        else:
            print("\n".join(describe(bundle)))
        return 0


class Verify(BaseModel):
    """Check a bundle on this machine: checksums, canary, and with pictures every graph beside fp32."""

    model_config = _CONFIG
    bundle: CliPositionalArg[BundleFolder]
    """The bundle folder, or the name of an encoder that comes with likewise."""
    images: Path | None = None
    """Pictures to measure parity on; the figures are added to parity.json."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run it."""

    def cli_cmd(self) -> int:
        """Run the command."""
        verify(self)
        return 0


class Diff(BaseModel):
    """Say how two bundles differ; with pictures also how many neighbours they share."""

    model_config = _CONFIG
    one: CliPositionalArg[BundleFolder]
    """A bundle folder."""
    other: CliPositionalArg[BundleFolder]
    """Another one."""
    images: Path | None = None
    """Pictures whose neighbours are compared, each prepared as its bundle wants it."""

    def cli_cmd(self) -> int:
        """Run the command."""
        print("\n".join(differences(Bundle.open(self.one), Bundle.open(self.other), self.images)))
        return 0


def describe(bundle: Bundle) -> list[str]:
    """The summary, line by line."""
    from export.parity import read_parity, table
    from export.tune import read_timings

    m = bundle.manifest
    e, p = m.encoder, m.preprocess
    kwargs = f" {json.dumps(e.kwargs)}" if e.kwargs else ""
    projection = (
        ""
        if e.projection is None
        else f" → PCA of {e.projection.pictures:,} pictures, whitening {e.projection.whitening:g}"
    )
    lines = [
        f"space      {m.space_id}",
        f"encoder    {e.model}{kwargs} at {e.image_size} px → {e.embedding_dim} dimensions, pooling {e.pooling}{projection}",
        f"pixels     {p.fit} to {p.size}, {p.interpolation}, mean {_triple(e.mean)}, deviation {_triple(e.std)}; "
        f"{p.version}{', JPEGs decoded at a scale' if p.scaled_jpeg else ''}",
        f"patches    {'none' if m.patches is None else ' × '.join(map(str, m.patches))}",
        f"source     {_source(m.provenance)}; weights {m.weights_sha256[:12]}…",
        f"canary     {len(m.canary)} pictures",
        "",
        f"{'variant':<8}{'file':<20}{'MiB':>7}  {'opset':<6}{'onnxruntime':<12}{'canary ≥':<10}for",
    ]
    for name, v in m.variants.items():
        size = m.files[v.file].bytes / 2**20
        floor = min(v.canary_min_cosine.values())
        meant = "everything" if "*" in v.providers else ", ".join(v.providers)
        lines.append(f"{name:<8}{v.file:<20}{size:>7.1f}  {v.opset:<6}{v.minimum_onnxruntime:<12}{floor:<10.5f}{meant}")
    report = read_parity(bundle)
    if report.measurements:
        lines += ["", table(report)]
        lines += [f"  measured on {machine}" for machine in sorted({m.machine for m in report.measurements})]
    for machine, timings in read_timings(bundle).machines.items():
        tried = [f"{t.candidate} {t.images_per_second:,.1f} images/s" for t in timings]
        lines.append(f"fastest of {', '.join(tried)} (batches of 8, {machine})")
    return lines


def verify(asked: Verify) -> None:
    """Raises `RefusalError` at the first thing that is not as it must be."""
    from export.parity import GATE_PICTURES, INT8_OVERLAP, Parity, measure_parity, read_parity
    from export.runtime import Runtime, offered
    from export.sample import read_sample

    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    bundle = Bundle.open(asked.bundle)
    console.print(f"{len(bundle.manifest.files)} files match their checksums, space {bundle.space_id}")
    sample = None if asked.images is None else read_sample(asked.images, bundle.manifest.preprocess)
    fp32 = Runtime(bundle, "cpu")
    measured: list[Parity] = []
    for provider in offered(asked.device):
        for name, about in bundle.manifest.variants.items():
            if "*" not in about.providers and provider not in about.providers:
                console.print(f"{name} is not meant for {provider}")
                continue
            runtime = Runtime(bundle, asked.device, None, name, provider)  # checks the canary
            line = f"{name} on {runtime.provider}: canary cosine {runtime.check_canary():.7f}"
            if sample is not None and (name, provider) != ("fp32", fp32.provider):
                found = measure_parity(fp32.embed, runtime, sample.pixels, sample.labels)
                measured.append(found)
                line += (
                    f"; {found.pictures} pictures beside fp32 on the CPU: lowest cosine {found.minimum_cosine:.7f}, "
                    f"overlap@10 {found.neighbor_overlap_at_10:.3f}, {found.speed[-1].images_per_second:,.0f} images/s in "
                    f"batches of {found.speed[-1].batch}"
                )
                shows = found.pictures >= GATE_PICTURES
                if found.not_finite or (shows and found.neighbor_overlap_at_10 < INT8_OVERLAP):
                    raise RefusalError(
                        f"{line}; {found.not_finite} embeddings are not finite, an overlap of {INT8_OVERLAP} is needed: do "
                        f"not use {name} here"
                    )
            console.print(line)
    if sample is not None and is_shipped(bundle.folder):
        console.print(f"not kept: {bundle.folder.name} is part of likewise and stays as it is")
    elif sample is not None:
        try:
            with changing(bundle.folder, wait=True):
                for found in measured:
                    report = read_parity(bundle).with_(found)
                    write_file(bundle.folder / "parity.json", report.model_dump_json(indent=2))
                console.print(f"drawn: {_drawn(bundle)}")
        except OSError as e:
            console.print(f"not kept: {bundle.folder} cannot be written ({e.strerror})")
    console.print("the bundle is whole, and faithful on this machine")


def _drawn(bundle: Bundle) -> str:
    if find_spec("matplotlib") is None:
        return "nothing, pip install 'likewise[export]' for the picture"
    from export.plot import draw_parity

    return str(draw_parity(bundle) or "nothing, fp32 on the CPU is what others are measured against")


def differences(one: Bundle, other: Bundle, images: Path | None = None) -> list[str]:
    """What differs, line by line; one line where nothing does."""
    a, b = one.manifest, other.manifest
    lines = []
    if a.space_id == b.space_id:
        lines.append(f"the same space, {a.space_id}: their vectors may be compared")
    else:
        lines.append(f"different spaces, {a.space_id} and {b.space_id}: their vectors may not be compared")
    for part in ("encoder", "preprocess"):
        lines += _changed(part, getattr(a, part).model_dump(mode="json"), getattr(b, part).model_dump(mode="json"))
    plain = [{"weights": m.weights_sha256[:12], "patches": m.patches} for m in (a, b)]
    lines += _changed("", *plain)
    graphs = [{n: (v.opset, m.files[v.file].sha256[:12]) for n, v in m.variants.items()} for m in (a, b)]
    lines += _changed("graph", *graphs)
    lines += _changed("provenance", a.provenance, b.provenance)
    if images is not None:
        lines.append(_neighbours(one, other, images))
    return lines if len(lines) > 1 or a.space_id != b.space_id else [*lines, "nothing else differs"]


def _neighbours(one: Bundle, other: Bundle, images: Path) -> str:
    from export.parity import neighbor_overlap
    from export.runtime import Runtime
    from export.sample import read_sample

    rows: list[Embeddings] = []
    for bundle in (one, other):
        pixels = read_sample(images, bundle.manifest.preprocess).pixels
        runtime = Runtime(bundle, "cpu")
        rows.append(np.concatenate([runtime.embed(pixels[low : low + 32]) for low in range(0, len(pixels), 32)]))
    shared = [100 * neighbor_overlap(rows[0], rows[1], k) for k in (1, 10)]
    chance = 100 * min(10, len(rows[0]) - 1) / (len(rows[0]) - 1)
    return (
        f"neighbours of {len(rows[0])} pictures: {shared[0]:.1f} % share the nearest, of the ten nearest {shared[1]:.1f} % "
        f"are the same (chance {chance:.1f} %)"
    )


def _changed(part: str, a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    found = []
    for key in sorted(a.keys() | b.keys()):
        x, y = a.get(key), b.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            found += _changed(f"{part}.{key}".strip("."), x, y)
        elif x != y:
            found.append(f"{part}.{key}: {x} → {y}".lstrip("."))
    return found


def _source(provenance: dict[str, Any]) -> str:
    kind = provenance.get("kind")
    if kind == "run":
        data = provenance["data"]
        return f"run, {provenance['method']}, {provenance['steps_done']:,} steps on {data['pictures']:,} pictures"
    return f"{kind}, {provenance.get('file', 'unknown')}"


def _triple(values: tuple[float, float, float]) -> str:
    return ", ".join(f"{v:g}" for v in values)
