"""`likewise export RUN --out BUNDLE`: build beside the target, prove, then rename into place."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict
from pydantic_settings import CliPositionalArg
from rich.console import Console

from export.bundle import (
    Bundle,
    BundleManifest,
    CanaryPicture,
    FileRecord,
    RefusalError,
    RunManifest,
    make_space_id,
    publish,
    read_best,
    read_run,
    read_verdict,
    sha256_file,
    write_file,
)
from export.preprocess import Pixels, PreprocessSpec, UnreadablePictureError, find_pictures, preprocess

CANARIES = 4
PARITY_PICTURES = 256
MIN_PARITY_PICTURES = 8
# Two machines' fp32 kernels agree far better than this; a wrong graph, decoder or provider does not.
CANARY_MIN_COSINE = {"fp32": 0.9999}


class Export(BaseModel):
    """Turn a run into a bundle: one ONNX file, its manifest, a canary, and parity measured on real pictures."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    run: CliPositionalArg[Path]
    """The run folder that `likewise train` wrote."""
    out: Path
    """The bundle folder to write."""
    images: Path | None = None
    """Pictures to prove parity on; the run's own where absent."""
    weights: Literal["auto", "adapted", "initial", "best"] = "auto"
    """The last ones, or of a run that started from trained weights those that its verdict found better; `adapted` or
    `initial` whatever the verdict says; `best`: those with the highest kNN on the way (runs on labelled folders)."""

    def cli_cmd(self) -> int:
        """Run the command."""
        export(self)
        return 0


def export(asked: Export) -> Bundle:
    """Write a bundle, or nothing. Raises `RefusalError`."""
    from export.onnx_graph import MINIMUM_ONNXRUNTIME, OPSET, load_encoder, write_graph
    from export.parity import measure_parity, require_parity
    from export.runtime import Runtime

    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    run = read_run(asked.run)
    weights, run = _choose_weights(asked, run, console)
    if asked.out.exists():
        bundle = _same_bundle(asked.out, run)
        if bundle is None:
            raise RefusalError(f"{asked.out} exists already: choose another --out, or remove it first")
        console.print(f"{asked.out} holds this run's bundle already, and its files match their checksums")
        return bundle
    _check_weights(weights, run)
    folder = asked.images or Path(run.data.folder)
    sample = _sample(folder, run.preprocess)
    pixels = np.stack([picture for picture, _ in sample])

    temporary = asked.out.with_name(f".{asked.out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        console.print(f"exporting {run.encoder.model} at {run.encoder.image_size} px (opset {OPSET})")
        graph = load_encoder(run.encoder, weights)
        write_graph(graph, run.encoder.image_size, temporary / "model.onnx")
        canary = _write_canary(temporary, graph, [data for _, data in sample], run.preprocess)
        names = ["model.onnx", *(picture.file for picture in canary)]
        manifest = BundleManifest(
            space_id=make_space_id(run.encoder, run.weights_sha256, run.preprocess),
            encoder=run.encoder,
            preprocess=run.preprocess,
            weights_sha256=run.weights_sha256,
            opset=OPSET,
            minimum_onnxruntime=MINIMUM_ONNXRUNTIME,
            provenance=_provenance(run),
            files={name: FileRecord(sha256=sha256_file(temporary / name), bytes=(temporary / name).stat().st_size)
                   for name in names},
            canary=canary,
            canary_min_cosine=CANARY_MIN_COSINE,
        )  # fmt: skip
        manifest = manifest.sealed()
        write_file(temporary / "manifest.json", manifest.model_dump_json(indent=2))
        parity = measure_parity(graph, Runtime(Bundle.open(temporary), device="cpu"), pixels)
        write_file(temporary / "parity.json", parity.model_dump_json(indent=2))
        require_parity(parity)
        publish(temporary, asked.out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    console.print(
        f"parity on {parity.pictures} pictures, {parity.provider}: minimum cosine {parity.minimum_cosine:.7f}, "
        f"maximum difference {parity.maximum_difference:.1e}, neighbour overlap@10 {parity.neighbor_overlap_at_10:.3f}"
    )
    console.print(f"done: {asked.out}, space {manifest.space_id}   next: likewise index build --bundle {asked.out}")
    return Bundle(asked.out, manifest)


def _choose_weights(asked: Export, run: RunManifest, console: Console) -> tuple[Path, RunManifest]:
    """File of the encoder to export, and the run as it was when it held those weights."""
    if asked.weights == "best":
        best = read_best(asked.run)
        if best is None:
            raise RefusalError(
                f"{asked.run} knows no best encoder, its pictures carry no labels or it was not measured yet: leave "
                "--weights out"
            )
        console.print(f"the encoder of step {best.step:,} is exported, kNN {best.knn:.1f} %")
        changed = {"weights_sha256": best.weights_sha256, "steps_done": best.step}
        return asked.run / "best.safetensors", run.model_copy(update=changed)
    adapted = asked.run / "encoder.safetensors", run
    verdict = read_verdict(asked.run)
    if asked.weights == "auto" and verdict is None and run.initial_sha256 is not None:
        raise RefusalError(
            f"{asked.run} started from trained weights and has no verdict yet, it stopped at step {run.steps_done:,} of "
            f"{run.steps_total:,}: continue it with --resume, or pass --weights adapted or --weights initial"
        )
    if asked.weights == "adapted" or (asked.weights == "auto" and (verdict is None or verdict.export == "adapted")):
        return adapted
    if run.initial_sha256 is None:
        raise RefusalError(
            f"{asked.run} did not start from trained weights, there is no initial encoder: leave --weights out"
        )
    if asked.weights == "auto" and verdict is not None:
        console.print(
            f"the initial encoder is exported, as the run's verdict says: {verdict.sentence} (--weights adapted "
            "exports the other one all the same)"
        )
    # No step of the run is in them.
    changed = {"weights_sha256": run.initial_sha256, "steps_done": 0, "method": "none (initial weights)"}
    return asked.run / "initial.safetensors", run.model_copy(update=changed)


def _same_bundle(out: Path, run: RunManifest) -> Bundle | None:
    """The whole bundle of the same weights that `out` holds, if it does."""
    try:
        found = Bundle.open(out)
    except RefusalError:
        return None
    return found if found.space_id == make_space_id(run.encoder, run.weights_sha256, run.preprocess) else None


def _check_weights(path: Path, run: RunManifest) -> None:
    from safetensors.numpy import load_file

    from export.bundle import tensors_sha256

    if not path.is_file():
        raise RefusalError(f"{path} is missing: resume the run so that it writes its encoder")
    try:
        found = tensors_sha256(load_file(path))
    except Exception as e:  # safetensors raises a type of its own
        raise RefusalError(f"{path} cannot be read as weights ({e}): resume the run so that it writes it again") from e
    if found != run.weights_sha256:
        raise RefusalError(
            f"{path} has weights {found[:12]}…, run.json says {run.weights_sha256[:12]}…: the run was interrupted while "
            "saving; continue it with --resume"
        )


def _sample(folder: Path, spec: PreprocessSpec) -> list[tuple[Pixels, bytes]]:
    """Up to 256 readable pictures, spread over the folder: pixels and encoded bytes."""
    if not folder.is_dir():
        raise RefusalError(
            f"{folder}, where the run's pictures lay, is not a folder any more: pass --images FOLDER to prove parity on"
        )
    found = find_pictures(folder)
    order = np.random.default_rng(0).permutation(len(found))
    sample: list[tuple[Pixels, bytes]] = []
    for i in order:
        if len(sample) == PARITY_PICTURES:
            break
        try:
            data = found[i].read()
            sample.append((preprocess(data, spec).pixels, data))
        except UnreadablePictureError:
            continue
    if len(sample) < MIN_PARITY_PICTURES:
        raise RefusalError(
            f"{folder} holds {len(sample)} readable pictures, at least {MIN_PARITY_PICTURES} are needed to prove parity: "
            "pass --images FOLDER"
        )
    return sample


def _write_canary(folder: Path, graph: Any, sample: list[bytes], spec: PreprocessSpec) -> list[CanaryPicture]:
    """Shrunk copies of real pictures, encoded as JPEG (the last one as PNG), with what they must become."""
    import torch

    (folder / "canary").mkdir()
    pictures: list[CanaryPicture] = []
    for data in sample:
        if len(pictures) == CANARIES:
            break
        # Larger than the input, so that decoding at a scale and resizing are exercised too.
        side = min(512, 4 * spec.size)
        small = Image.fromarray(preprocess(data, PreprocessSpec(size=side, fit="pad")).pixels)
        name = f"canary/{len(pictures)}.{'png' if len(pictures) == CANARIES - 1 else 'jpg'}"
        small.save(folder / name, quality=90)
        pixels = preprocess((folder / name).read_bytes(), spec).pixels
        with torch.no_grad():
            embedding = graph(torch.from_numpy(pixels[None]))[0]
        digest = hashlib.sha256(pixels.tobytes()).hexdigest()
        pictures.append(CanaryPicture(file=name, pixels_sha256=digest, embedding=embedding.tolist()))
    return pictures


def _provenance(run: RunManifest) -> dict[str, Any]:
    from importlib import metadata

    versions = {name: metadata.version(name) for name in ("torch", "timm", "onnx", "onnxscript", "Pillow")}
    return {
        "method": run.method,
        "seed": run.seed,
        "steps_done": run.steps_done,
        "data": run.data.model_dump(mode="json"),
        "git_revision": run.git_revision,
        "trained_with": run.versions,
        "exported_with": versions,
    }
