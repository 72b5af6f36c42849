"""SOURCE → an encoder to evaluate: a run, a bundle (its ONNX graph, no torch network), or a file of timm weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.bundle import (
    Bundle,
    Embeddings,
    RefusalError,
    printable,
    read_run,
    sha256_file,
    sha256_json,
)
from export.preprocess import Pixels, PreprocessSpec
from export.weights import fit_state, read_run_weights, read_state
from training.encoder import architecture, build_backbone, encode, reset_linear_layers, width
from training.evaluate.config import Evaluate
from training.evaluate.features import Extractor

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MULTI_SCALE = (1.0, 2**-0.5, 0.5)


class Encoder(NamedTuple):
    """What is evaluated."""

    kind: Literal["run", "bundle", "weights"]
    """Where it comes from."""
    extractor: Extractor
    """Name, digest, preprocessing and the function."""
    network: Network | None
    """The torch network behind it; None for a bundle."""
    about: dict[str, Any]
    """What results.json says of it."""
    untrained: Callable[[], Extractor] | None
    """Builds the same architecture with random weights; None for a bundle."""


class Network:
    """A backbone with its normalisation: [CLS] after the final norm, or the pooled features, as unit rows.

    `patch`: sides of larger pictures are rounded to multiples of it.
    """

    def __init__(
        self, backbone: nn.Module, patch: int, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
    ) -> None:
        self.backbone = backbone.eval().requires_grad_(False).to(device)
        self.patch = patch
        self._mean = torch.tensor(mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(std, device=device).view(1, 3, 1, 1)
        self._device = device

    def normalise(self, pixels: Pixels) -> Tensor:
        """uint8 [M, H, W, 3] → float32 [M, 3, H, W] on the device."""
        x = torch.from_numpy(np.require(pixels, requirements=["C", "W"])).to(self._device).permute(0, 3, 1, 2)
        return (x.float() / 255.0 - self._mean) / self._std

    @torch.no_grad()
    def rows(self, images: Tensor) -> Tensor:
        """Normalised [M, 3, H, W] → [M, C]."""
        return encode(self.backbone, images)[0].float()

    def embed(self, pixels: Pixels) -> Embeddings:
        """uint8 [M, S, S, 3] → unit rows [M, C]."""
        rows: Embeddings = F.normalize(self.rows(self.normalise(pixels)), dim=1).cpu().numpy()
        return rows

    def embed_scales(self, pixels: Pixels, scales: tuple[float, ...] = MULTI_SCALE) -> Embeddings:
        """One whole picture uint8 [H, W, 3] of any size → [C]: [CLS] averaged over `scales`, then length 1.

        Bilinear; each side is rounded to a multiple of the patch, at least one patch (spec/sop.md section 5).
        """
        images = self.normalise(pixels[None])
        total = torch.zeros(width(self.backbone))
        for scale in scales:
            sides = [max(self.patch, round(s * scale / self.patch) * self.patch) for s in pixels.shape[:2]]
            scaled = images
            if sides != list(pixels.shape[:2]):
                scaled = F.interpolate(images, size=sides, mode="bilinear", align_corners=False)
            total += self.rows(scaled)[0].cpu()
        row: Embeddings = F.normalize(total / len(scales), dim=0).numpy()
        return row


def open_source(
    source: Path, asked: Evaluate, device: torch.device, threads: int, say: Callable[[str], None] = lambda _: None
) -> Encoder:
    """Open a run folder, a bundle folder or a weights file; `say` hears what is measured on the way. Raises `RefusalError`
    when it is none of them, or damaged."""
    if (source / "manifest.json").is_file():
        return _open_bundle(source, asked, threads, say)
    if (source / "run.json").is_file():
        return _open_run(source, asked, device)
    if source.is_file():
        return _open_weights(source, asked, device)
    raise RefusalError(
        f"{source} is neither a run (run.json), nor a bundle (manifest.json), nor a file of weights: give what "
        "`likewise train` or `likewise export` wrote, or a .safetensors or .pth file with --model NAME"
    )


def _open_bundle(folder: Path, asked: Evaluate, threads: int, say: Callable[[str], None]) -> Encoder:
    from export.tune import open_runtime

    given = [f"--{name.replace('_', '-')}" for name in ("fit", "image_size") if getattr(asked, name) is not None]
    if given:
        raise RefusalError(
            f"{folder} is a bundle, whose preprocessing is fixed: leave out {' and '.join(given)}, or evaluate the run"
        )
    runtime = open_runtime(Bundle.open(folder), asked.device, threads, asked.variant, say)
    manifest = runtime.bundle.manifest
    identity = sha256_json(
        ["bundle", manifest.space_id, manifest.files[manifest.variants[runtime.variant].file].sha256, runtime.provider]
    )
    about = {"kind": "bundle", "space_id": manifest.space_id, "model": manifest.encoder.model,
             "image_size": manifest.encoder.image_size, "variant": runtime.variant,
             "provider": runtime.provider}  # fmt: skip
    extractor = Extractor(_name(folder), identity, manifest.preprocess, runtime.embed)
    return Encoder("bundle", extractor, None, about, None)


def _open_run(folder: Path, asked: Evaluate, device: torch.device) -> Encoder:
    run = read_run(folder)
    spec = run.encoder
    state = read_run_weights(folder / "encoder.safetensors", run)

    def build() -> nn.Module:
        return build_backbone(spec.model, spec.kwargs, spec.image_size)

    backbone = build()
    backbone.load_state_dict(state)
    prepared = _preprocess(run.preprocess, asked)
    about = {"kind": "run", "model": spec.model, "kwargs": spec.kwargs, "method": run.method,
             "steps_done": run.steps_done, "weights_sha256": run.weights_sha256,
             "views": run.config.get("views")}  # fmt: skip
    standard = run.config.get("weight_init") == "default"
    return _network_encoder("run", folder, backbone, build, standard, (spec.mean, spec.std), run.weights_sha256, prepared,
                            about, asked, device)  # fmt: skip


def _open_weights(path: Path, asked: Evaluate, device: torch.device) -> Encoder:
    if asked.model is None:
        raise RefusalError(
            f"{path} is a file of weights: name its architecture with --model, such as vit_small_patch16_224"
        )
    native = architecture(asked.model)
    patch = asked.patch_size or native.patch
    if native.convolutional and asked.patch_size:
        raise RefusalError(f"{asked.model} is a convolutional network, it has no patches: leave --patch-size out")
    kwargs: dict[str, Any] = {"patch_size": patch} if patch != native.patch else {}
    size = asked.image_size or native.size

    def build() -> nn.Module:
        return build_backbone(asked.model or "", kwargs, size)

    backbone = build()
    advice = "choose the matching --model, --patch-size and --image-size"
    backbone.load_state_dict(fit_state(read_state(path), backbone, str(path), advice))
    config: Any = backbone.pretrained_cfg
    normal = (tuple(config["mean"]), tuple(config["std"])) if asked.normalization == "model" else IMAGENET
    prepared = _preprocess(PreprocessSpec(size=size), asked)
    about = {
        "kind": "weights",
        "model": asked.model,
        "kwargs": kwargs,
        "normalization": asked.normalization or "imagenet",
    }
    return _network_encoder("weights", path, backbone, build, False, normal, sha256_file(path), prepared, about, asked,
                            device)  # fmt: skip


def _network_encoder(
    kind: Literal["run", "weights"], source: Path, backbone: nn.Module, build: Callable[[], nn.Module],
    standard_init: bool, normal: tuple[tuple[float, ...], tuple[float, ...]], weights: str, spec: PreprocessSpec,
    about: dict[str, Any], asked: Evaluate, device: torch.device,
) -> Encoder:  # fmt: skip
    native = architecture(about["model"])
    patch = int(about["kwargs"].get("patch_size", native.patch))
    if spec.size % patch and not native.convolutional:
        raise RefusalError(f"--image-size {spec.size} is not a multiple of the patch size {patch}: choose another")
    network = Network(backbone, patch, *normal, device)
    parts = [kind, weights, {k: v for k, v in about.items() if k in ("model", "kwargs")}, normal, device.type]

    def untrained() -> Extractor:
        with torch.random.fork_rng():
            torch.manual_seed(asked.seed)
            fresh = build()
            if standard_init:
                reset_linear_layers(fresh)
        identity = sha256_json(["untrained", asked.seed, standard_init, spec.size, *parts[2:]])
        return Extractor("untrained network", identity, spec, Network(fresh, patch, *normal, device).embed)

    about = {**about, "image_size": spec.size, "fit": spec.fit, "embedding_dim": width(backbone)}
    extractor = Extractor(_name(source), sha256_json(parts), spec, network.embed)
    return Encoder(kind, extractor, network, about, untrained)


def _preprocess(spec: PreprocessSpec, asked: Evaluate) -> PreprocessSpec:
    changed = {"fit": asked.fit, "size": asked.image_size}
    return spec.model_copy(update={name: value for name, value in changed.items() if value is not None})


def _name(source: Path) -> str:
    return printable(source.resolve().name)


def multi_scale(encoder: Encoder) -> Extractor:
    """Whole pictures at three scales where there is a torch network; a bundle's fixed square input otherwise."""
    plain, network = encoder.extractor, encoder.network
    if network is None:
        return plain
    identity = sha256_json([plain.digest, "scales", MULTI_SCALE])
    return plain._replace(digest=identity, embed=lambda pixels: network.embed_scales(pixels[0])[None], whole=True)


def renamed(encoder: Encoder, name: str) -> Encoder:
    """The same encoder under another name in the output."""
    return encoder._replace(extractor=encoder.extractor._replace(name=name), about=copy.deepcopy(encoder.about))
