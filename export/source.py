"""Where a bundle comes from: a run of ours, a timm model's weights, or a checkpoint of another code base. An ONNX file is
`export/adopt.py`'s."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console

from export.bundle import (
    Embeddings,
    EncoderSpec,
    Pooling,
    RefusalError,
    RunManifest,
    make_space_id,
    read_best,
    read_run,
    read_verdict,
    sha256_file,
    tensors_sha256,
)
from export.config import Export
from export.onnx_graph import (
    EmbeddingGraph,
    build_encoder,
    count_dimensions,
    has_class_token,
    load_encoder,
    write_graph,
)
from export.preprocess import Pixels, PreprocessSpec
from export.weights import fit_state, read_run_weights, read_state

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Source:
    """An encoder that can be written as ONNX and, by itself, says what the file must give."""

    encoder: EncoderSpec
    """The network."""
    preprocess: PreprocessSpec
    """How pictures are prepared for it."""
    weights_sha256: str
    """Digest of its weights."""
    provenance: dict[str, Any]
    """Where they come from."""
    pictures: Path | None
    """Pictures to prove parity on, where none are given."""
    patches: tuple[int, int, int] | None
    """Shape of the second output, where asked for."""
    write: Callable[[Path, int], None]
    """Write the graph into a file, in an opset."""
    embed: Callable[[Pixels], Embeddings]
    """What the network itself gives for uint8 [N, H, W, 3]: float32 [N, D], unit rows."""
    opset: int | None = None
    """The only opset there is; None where any of `OPSETS` can be written."""

    @property
    def space_id(self) -> str:
        """The identity of its embedding space."""
        return make_space_id(self.encoder, self.weights_sha256, self.preprocess)


def open_source(asked: Export, console: Console) -> Source:
    """What `likewise export SOURCE` names. Raises `RefusalError` when it is none of the things that can be exported."""
    path = asked.source
    if (path / "run.json").is_file() or path.is_dir():
        return _open_run(asked, console)
    if not path.is_file():
        raise RefusalError(
            f"{path} does not exist: give a run folder, a file of weights (.safetensors, .pth) with --model, or an .onnx "
            "file"
        )
    if path.suffix.lower() == ".onnx":
        from export.adopt import adopt

        return adopt(asked, console)
    return _open_weights(asked, console)


def exported_with(*packages: str) -> dict[str, str]:
    """Versions of the packages that wrote a bundle."""
    return {name: metadata.version(name) for name in ("onnx", "Pillow", *packages)}


def _open_run(asked: Export, console: Console) -> Source:
    given = [
        f"--{name.replace('_', '-')}"
        for name in ("model", "patch_size", "normalization", "fit", "output")
        if getattr(asked, name) is not None
    ]
    run = read_run(asked.source)
    if given:
        raise RefusalError(f"{asked.source} is a run, which knows its network: leave out {' and '.join(given)}")
    file, run = _choose_weights(asked, run, console)
    state = read_run_weights(file, run)
    size = asked.image_size or run.encoder.image_size
    spec = run.encoder.model_copy(update={"pooling": asked.pooling or run.encoder.pooling, "image_size": size})
    if size != run.encoder.image_size:
        state = fit_state(state, build_encoder(spec), str(file), "leave --image-size out")
        console.print(f"the run saw pictures of {run.encoder.image_size} px, the bundle takes {size} px")
    provenance = {
        "kind": "run", "method": run.method, "seed": run.seed, "steps_done": run.steps_done,
        "data": run.data.model_dump(mode="json"), "git_revision": run.git_revision, "trained_with": run.versions,
        "exported_with": exported_with("torch", "timm", "onnxscript"),
    }  # fmt: skip
    graph = load_encoder(spec, state, str(file), asked.patches)
    preprocess = run.preprocess.model_copy(update={"size": size})
    return of_network(graph, spec, preprocess, run.weights_sha256, provenance, Path(run.data.folder))


def _open_weights(asked: Export, console: Console) -> Source:
    path = asked.source
    if asked.model is None:
        raise RefusalError(
            f"{path} is a file of weights: name its architecture with --model, such as vit_small_patch16_224"
        )
    if asked.output or asked.weights != "auto":
        raise RefusalError(f"{path} is a file of weights: leave --output and --weights out")
    if not timm.is_model(asked.model):
        raise RefusalError(f"timm {timm.__version__} has no model {asked.model!r}: see timm.list_models()")
    with torch.device("meta"):
        native = timm.create_model(asked.model, pretrained=False, num_classes=0)
    config: Any = native.pretrained_cfg
    mean, std = _normalization(asked, config)
    kwargs = {} if asked.patch_size is None else {"patch_size": asked.patch_size}
    size = asked.image_size or int(config["input_size"][-1])
    pooling: Pooling = asked.pooling or ("cls" if has_class_token(native) else "model")
    spec = EncoderSpec(
        model=asked.model, kwargs=kwargs, image_size=size, embedding_dim=1, pooling=pooling, mean=mean, std=std
    )
    advice = "choose the matching --model, --patch-size and --image-size"
    state = fit_state(read_state(path), build_encoder(spec), str(path), advice)
    digest = tensors_sha256({name: value.numpy() for name, value in state.items()})
    console.print(
        f"{path.name}: {len(state)} tensors of {asked.model} at {size} px; normalised with mean {mean}; pooling {pooling}"
    )
    provenance = {
        "kind": "weights", "file": path.name, "file_sha256": sha256_file(path),
        "exported_with": exported_with("torch", "timm", "onnxscript"),
    }  # fmt: skip
    graph = load_encoder(spec, state, str(path), asked.patches)
    return of_network(graph, spec, PreprocessSpec(size=size, fit=asked.fit or "crop"), digest, provenance, None)


def of_network(
    graph: EmbeddingGraph, spec: EncoderSpec, preprocess: PreprocessSpec, digest: str, provenance: dict[str, Any],
    pictures: Path | None,
) -> Source:  # fmt: skip
    """The source that a timm network with its weights is; `pictures` to prove parity on."""
    dim, patches = count_dimensions(graph, spec.image_size)
    spec = spec.model_copy(update={"embedding_dim": dim})

    def embed(pixels: Pixels) -> Embeddings:
        rows: Embeddings = graph.embed(torch.from_numpy(pixels)).numpy()
        return rows

    def write(path: Path, opset: int) -> None:
        write_graph(graph, spec.image_size, path, opset)

    return Source(spec, preprocess, digest, provenance, pictures, patches, write, embed)


def _normalization(
    asked: Export, config: Mapping[str, Any]
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and deviation; a wrong one costs neighbours and shows nowhere, so that a doubt is asked about."""
    (r, g, b), (dr, dg, db) = config["mean"], config["std"]
    theirs = (r, g, b), (dr, dg, db)
    if asked.normalization == "none":
        raise RefusalError("--normalization none is for ONNX files that take 0…1: choose imagenet or model")
    if asked.normalization == "model" or theirs == IMAGENET:
        return theirs
    if asked.normalization == "imagenet":
        return IMAGENET
    raise RefusalError(
        f"timm's own weights of {asked.model} expect pixels with mean {theirs[0]}, many others (DINO, iBOT, SOP) ImageNet's "
        f"{IMAGENET[0]}: say which these are with --normalization model or --normalization imagenet"
    )


def _choose_weights(asked: Export, run: RunManifest, console: Console) -> tuple[Path, RunManifest]:
    """File of the encoder to export, and the run as it was when it held those weights."""
    if asked.weights == "best":
        best = read_best(asked.source)
        if best is None:
            raise RefusalError(
                f"{asked.source} knows no best encoder, its pictures carry no labels or it was not measured yet: leave "
                "--weights out"
            )
        console.print(f"the encoder of step {best.step:,} is exported, kNN {best.knn:.1f} %")
        changed = {"weights_sha256": best.weights_sha256, "steps_done": best.step}
        return asked.source / "best.safetensors", run.model_copy(update=changed)
    adapted = asked.source / "encoder.safetensors", run
    verdict = read_verdict(asked.source)
    if asked.weights == "auto" and verdict is None and run.initial_sha256 is not None:
        raise RefusalError(
            f"{asked.source} started from trained weights and has no verdict yet, it stopped at step {run.steps_done:,} of "
            f"{run.steps_total:,}: continue it with --resume, or pass --weights adapted or --weights initial"
        )
    if asked.weights == "adapted" or (asked.weights == "auto" and (verdict is None or verdict.export == "adapted")):
        return adapted
    if run.initial_sha256 is None:
        raise RefusalError(
            f"{asked.source} did not start from trained weights, there is no initial encoder: leave --weights out"
        )
    if asked.weights == "auto" and verdict is not None:
        console.print(
            f"the initial encoder is exported, as the run's verdict says: {verdict.sentence} (--weights adapted "
            "exports the other one all the same)"
        )
    # No step of the run is in them.
    changed = {"weights_sha256": run.initial_sha256, "steps_done": 0, "method": "none (initial weights)"}
    return asked.source / "initial.safetensors", run.model_copy(update=changed)
