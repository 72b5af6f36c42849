"""`likewise export`: an encoder → bundle, with parity proven on real pictures before anything is published."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Literal

from PIL import Image
from rich.console import Console

from export.bundle import (
    Bundle,
    BundleManifest,
    CanaryPicture,
    FileRecord,
    RefusalError,
    Variant,
    changing,
    publish,
    sha256_file,
    write_file,
)
from export.config import Export
from export.onnx_graph import OPSET_REASONS, minimum_onnxruntime
from export.parity import Parity, ParityReport, measure_parity, read_parity, require_parity, table
from export.plot import draw_parity
from export.preprocess import PreprocessSpec, preprocess
from export.providers import CPU, ON_GPU, OPENVINO
from export.runtime import Runtime
from export.sample import CANARIES, Sample, read_sample
from export.shipped import bundle_flag
from export.source import Source, open_source

# Two machines' fp32 kernels agree far better than this; a wrong graph, decoder or provider does not.
CANARY_MIN_COSINE = {"*": 0.9999, OPENVINO: 0.999}  # OpenVINO computes in bfloat16 where the processor has it
CANARY_FLOORS = {"fp16": 0.999, "int8": 0.99}  # or lower, where the graph itself is
# int8 is slower than fp32 on GPUs, fp16 on CPUs.
PROVIDERS = {"fp16": [*ON_GPU], "int8": [CPU]}


def export(asked: Export) -> Bundle:
    """Write a bundle, or nothing; into the bundle of the same encoder the variants that it lacks. Raises `RefusalError`."""
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    source = open_source(asked, console)
    if asked.dimensions is not None:
        from export.projection import projected

        source = projected(source, _pictures(asked, source), asked.dimensions, asked.whitening, console.print)
    bundle = None
    if asked.out.exists():
        bundle = _same_bundle(asked.out, source.space_id)
        fp32 = bundle.manifest.variants["fp32"]
        if bundle.manifest.patches != source.patches or asked.opset not in ("auto", str(fp32.opset)):
            raise RefusalError(
                f"{asked.out} holds this encoder with opset {fp32.opset} and patches {bundle.manifest.patches}: choose "
                "another --out for other graphs"
            )
        if asked.canary is not None:
            raise RefusalError(
                f"{asked.out} holds this encoder's bundle already, with a canary of its own: remove it first, or choose "
                "another --out"
            )
        if set(asked.variants) <= bundle.manifest.variants.keys():
            console.print(f"{asked.out} holds this encoder's bundle already, and its files match their checksums")
            return bundle
    canary = None
    if asked.canary is not None:
        advice = "make a canary of them: pass --canary with another folder"
        canary = read_sample(asked.canary, source.preprocess, CANARIES, CANARIES, advice).encoded
    sample = read_sample(_pictures(asked, source), source.preprocess)
    if bundle is None:
        opset = source.opset or (20 if asked.opset == "auto" else int(asked.opset))
        bundle = write_bundle(source, sample, asked.out, opset, console, asked.stored, canary)
    if set(asked.variants) - bundle.manifest.variants.keys():
        with changing(asked.out):
            bundle = Bundle.open(asked.out)  # as it is now that nobody else changes it
            for name in asked.variants:
                if name not in bundle.manifest.variants:
                    bundle = add_variant(bundle, name, source, sample, console)
            draw_parity(bundle)
    console.print(table(read_parity(bundle)))
    console.print(f"done: {asked.out}, space {bundle.space_id}   next: likewise index build{bundle_flag(asked.out)}")
    return bundle


def write_bundle(
    source: Source, sample: Sample, out: Path, opset: int, console: Console,
    stored: Literal["float32", "float16"] = "float32", canary_of: list[bytes] | None = None,
) -> Bundle:  # fmt: skip
    """Write a bundle whose graph does what the network does, proven on the sample; its canary is made of `canary_of`, kept
    without loss, or of the sample. Raises `RefusalError`."""
    reason = "the file came with it" if source.opset else OPSET_REASONS[opset]
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        console.print(f"exporting {source.encoder.model} at {source.encoder.image_size} px (opset {opset}: {reason})")
        source.write(temporary / "model.onnx", opset)
        if stored == "float16":
            from export import quantise

            quantise.store_fp16(temporary / "model.onnx")
        canary = _write_canary(temporary, source, canary_of or sample.encoded, lossless=canary_of is not None)
        variant = Variant(
            file="model.onnx", opset=opset, opset_reason=reason, minimum_onnxruntime=minimum_onnxruntime(opset),
            providers=["*"], canary_min_cosine=CANARY_MIN_COSINE,
        )  # fmt: skip
        manifest = BundleManifest(
            space_id=source.space_id,
            encoder=source.encoder,
            preprocess=source.preprocess,
            weights_sha256=source.weights_sha256,
            variants={"fp32": variant},
            patches=source.patches,
            provenance=source.provenance | ({"weights_stored_as": stored} if stored != "float32" else {}),
            files=_files(temporary, ["model.onnx", *(picture.file for picture in canary)]),
            canary=canary,
        ).sealed()
        write_file(temporary / "manifest.json", manifest.model_dump_json(indent=2))
        parity = measure_parity(
            source.embed, Runtime(Bundle.open(temporary), device="cpu"), sample.pixels, sample.labels
        )
        write_file(temporary / "parity.json", ParityReport(measurements=[parity]).model_dump_json(indent=2))
        require_parity(parity)
        draw_parity(Bundle(temporary, manifest))
        publish(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    console.print(_said(parity))
    return Bundle(out, manifest)


def add_variant(bundle: Bundle, name: str, source: Source, sample: Sample, console: Console) -> Bundle:
    """Write a variant that passes its gate beside the others. The space stays what it is; a bundle that is read meanwhile
    holds the old manifest or the new one. Raises `RefusalError`, and leaves the bundle as it was."""
    from export import quantise

    file, trial_file = (bundle.folder / n for n in (f"model.{name}.onnx", f".model.{name}.onnx.tmp"))
    recipes: tuple[str, ...] = ("",) if name == "fp16" else quantise.int8_recipes(bundle.graph())
    refused: RefusalError | None = None
    try:
        for recipe in recipes:
            console.print(f"making {name}{f' ({recipe})' if recipe else ''}")
            try:
                if name == "fp16":
                    quantise.write_fp16(bundle.graph(), trial_file)
                else:
                    quantise.write_int8(bundle.graph(), trial_file, recipe, sample.pixels)  # type: ignore[arg-type]
                trial = Bundle(bundle.folder, _with_variant(bundle, name, trial_file, recipe, {"*": -1.0}))
                runtime = Runtime(trial, device="cpu", variant=name)
                parity = measure_parity(source.embed, runtime, sample.pixels, sample.labels)
                require_parity(parity)
            except RefusalError as e:
                console.print(f"refused: {e}")
                refused = e
                continue
            # What this graph gives here, with room for other kernels; a wrong graph or provider is far below.
            floor = min(CANARY_FLOORS[name], 1.0 - 3.0 * (1.0 - runtime.check_canary()))
            publish(trial_file, file)
            manifest = _with_variant(bundle, name, file, recipe, {"*": floor})
            report = read_parity(bundle).with_(parity)
            write_file(bundle.folder / "parity.json", report.model_dump_json(indent=2))
            write_file(bundle.folder / "manifest.json", manifest.model_dump_json(indent=2))
            console.print(_said(parity))
            return Bundle(bundle.folder, manifest)
    finally:
        trial_file.unlink(missing_ok=True)
    assert refused is not None
    raise RefusalError(f"{bundle.folder} stays without {name}: {refused}")


def _with_variant(bundle: Bundle, name: str, file: Path, recipe: str, floors: dict[str, float]) -> BundleManifest:
    fp32 = bundle.manifest.variants["fp32"]
    reason = f"that of the fp32 graph{f'; int8 {recipe}' if recipe else ''}"
    variant = Variant(
        file=file.name, opset=fp32.opset, opset_reason=reason, minimum_onnxruntime=fp32.minimum_onnxruntime,
        providers=PROVIDERS[name], canary_min_cosine=floors,
    )  # fmt: skip
    changed = {
        "variants": {**bundle.manifest.variants, name: variant},
        "files": {**bundle.manifest.files, **_files(bundle.folder, [file.name])},
    }
    return bundle.manifest.model_copy(update=changed).sealed()


def _said(parity: Parity) -> str:
    loss = "" if parity.map_loss is None else f", mAP loss {parity.map_loss:.2f} points"
    return (
        f"{parity.variant} on {parity.pictures} pictures, {parity.provider}: minimum cosine {parity.minimum_cosine:.7f}, "
        f"maximum difference {parity.maximum_difference:.1e}, neighbour overlap@10 {parity.neighbor_overlap_at_10:.3f}{loss}"
    )


def _files(folder: Path, names: list[str]) -> dict[str, FileRecord]:
    return {name: FileRecord(sha256=sha256_file(folder / name), bytes=(folder / name).stat().st_size) for name in names}


def _same_bundle(out: Path, space: str) -> Bundle:
    """The whole bundle of the same space that `out` holds. Raises `RefusalError` where it holds something else."""
    if not (out / "manifest.json").is_file():
        raise RefusalError(f"{out} exists already, and is no bundle: choose another --out, or remove it first")
    try:
        found = Bundle.open(out)
    except RefusalError as e:
        raise RefusalError(
            f"{out} exists already, and is damaged ({e}): remove it first, or choose another --out"
        ) from e
    if found.space_id != space:
        raise RefusalError(
            f"{out} exists already, and holds another encoder's bundle (space {found.space_id}, this one's is {space}): "
            "choose another --out, or remove it first"
        )
    return found


def _pictures(asked: Export, source: Source) -> Path:
    folder = asked.images or source.pictures
    if folder is None:
        raise RefusalError(f"{asked.source} comes without pictures to prove parity on: pass --images FOLDER")
    if not folder.is_dir():
        raise RefusalError(
            f"{folder} is not a folder{'' if asked.images else ' any more, where the pictures of the run lay'}: pass "
            "--images FOLDER to prove parity on"
        )
    return folder


def _write_canary(folder: Path, source: Source, sample: list[bytes], lossless: bool = False) -> list[CanaryPicture]:
    """Shrunk copies of real pictures, encoded as JPEG (the last one, or all, as PNG), with what they must become."""
    spec = source.preprocess
    (folder / "canary").mkdir()
    pictures: list[CanaryPicture] = []
    for data in sample[:CANARIES]:
        # Larger than the input, so that decoding at a scale and resizing are exercised too.
        side = 2 * spec.size if lossless else min(512, 4 * spec.size)
        small = Image.fromarray(preprocess(data, PreprocessSpec(size=side, fit="pad")).pixels)
        name = f"canary/{len(pictures)}.{'png' if lossless or len(pictures) == CANARIES - 1 else 'jpg'}"
        small.save(folder / name, quality=90)
        pixels = preprocess((folder / name).read_bytes(), spec).pixels
        digest = hashlib.sha256(pixels.tobytes()).hexdigest()
        pictures.append(
            CanaryPicture(file=name, pixels_sha256=digest, embedding=source.embed(pixels[None])[0].tolist())
        )
    return pictures
