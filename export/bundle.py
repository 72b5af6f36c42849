"""The contract between the rooms: what a run and a bundle are on disk, how they are verified, how refusals look.

    run/                     (training writes, export reads)
        run.json             RunManifest
        encoder.safetensors  the teacher's backbone
        initial.safetensors  what it started from, and verdict.json, which of both is better (runs with --init)
        best.safetensors     the backbone of the measurement with the highest kNN, and best.json (labelled folders)
    bundle/                  (export writes, service reads)
        manifest.json        BundleManifest: identity, checksums, canary
        model.onnx           uint8 [batch, H, W, 3] → float32 [batch, D], unit rows
        canary/*             small encoded pictures whose embeddings are known
        parity.json          measurements and the machines they were made on, outside every hash; parity.png, their picture
        machine.json         speed of each graph on the machines that opened it, outside every hash
        .lock                held by a process that adds to it

Free of torch.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from export.preprocess import PictureFile, PreprocessSpec, find_pictures

Embeddings = npt.NDArray[np.float32]

Pooling = Literal["cls", "mean", "gem", "cls+mean", "model"]
"""cls: the class token after the final norm. mean: the mean of the patches or of the feature map. gem: their generalised
mean with p = 3 (Radenović et al. 2018). cls+mean: both, each of length 1, one after the other. model: what the model gives
by itself (timm's own pooling, or an adopted graph's output)."""

RUN_FORMAT = 1
BUNDLE_FORMAT = 2


class RefusalError(Exception):
    """An input is refused. The message is a whole sentence: what was found, what was expected, what to do."""


class Contract(BaseModel):
    """Base of everything stored: immutable, no unknown keys, a sentence per field."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Sealed(Contract):
    """A contract that carries a digest of itself."""

    seal: str = ""
    """Digest of everything else in it."""

    def digest(self) -> str:
        """What `seal` must be."""
        return sha256_json({**self.model_dump(mode="json"), "seal": ""})

    def sealed(self) -> Self:
        """A copy with the right seal."""
        return self.model_copy(update={"seal": self.digest()})


class ProjectionSpec(Contract):
    """What `export/projection.py` put behind the network."""

    dimensions: int
    """Length of an embedding."""
    whitening: float
    """0: plain PCA; 1: every axis counts alike."""
    pictures: int
    """How many it was fitted to."""
    sha256: str
    """Digest of mean and matrix."""


class EncoderSpec(Contract):
    """Which network the weights belong to: enough to build it with timm and nothing of ours."""

    model: str
    """timm's name of the model."""
    kwargs: dict[str, Any] = {}
    """What `timm.create_model` gets beside the name and the image size."""
    image_size: int
    """Input height and width, in pixels."""
    embedding_dim: int
    """Length of the embedding."""
    pooling: Pooling = "cls"
    """How the last features become one vector (`Pooling`)."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """RGB mean that is subtracted from pixels scaled to 0…1."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """RGB deviation that they are divided by."""
    projection: ProjectionSpec | None = None
    """What follows the pooling, where the embedding has fewer dimensions than the network gives."""


class DataFingerprint(Contract):
    """Which pictures a run saw."""

    folder: str
    """Where they lay."""
    pictures: int
    """How many were readable."""
    unreadable: int
    """How many were not."""
    sha256: str
    """Digest over keys and sizes of the readable files, in key order."""


class RunManifest(Contract):
    """run.json."""

    format_version: int = RUN_FORMAT
    """Format of the run folder."""
    method: str
    """Name of the pretraining method."""
    config: dict[str, Any]
    """The resolved configuration."""
    reasons: dict[str, str]
    """Why each automatic choice was made."""
    encoder: EncoderSpec
    """The network."""
    preprocess: PreprocessSpec
    """How pictures must be prepared for it."""
    data: DataFingerprint
    """The pictures."""
    versions: dict[str, str]
    """Library versions."""
    git_revision: str | None
    """Revision of the code, where known."""
    seed: int
    """Random seed."""
    steps_done: int
    """Optimiser steps behind the exported weights."""
    steps_total: int
    """Optimiser steps that were planned."""
    weights_sha256: str
    """Digest of the teacher's tensors (`tensors_sha256`)."""
    initial_sha256: str | None = None
    """Digest of the tensors that the run started from, where it had trained ones (initial.safetensors)."""


class Verdict(Contract):
    """verdict.json: whether a run that started from trained weights made them better."""

    export: Literal["initial", "adapted"]
    """Which encoder to use."""
    sentence: str
    """Why, with figures."""
    scores: dict[str, float]
    """What was measured."""


class Best(Contract):
    """best.json: the measurement of a run with the highest kNN accuracy, where folder names serve as labels."""

    step: int
    """Steps done then."""
    knn: float
    """Leave-one-out kNN accuracy of the sample in %, k = 20."""
    weights_sha256: str
    """Digest of the tensors in best.safetensors."""


class CanaryPicture(Contract):
    """A picture whose pixels and embedding are known."""

    file: str
    """Name below the bundle folder."""
    pixels_sha256: str
    """Digest of the preprocessed pixels: a decoder that drifts is caught here."""
    embedding: list[float]
    """The embedding that the source network gives."""


class FileRecord(Contract):
    """One file of a bundle."""

    sha256: str
    """Hex digest of its bytes."""
    bytes: int
    """Its size."""


class Variant(Contract):
    """One graph of a bundle. All of them embed into the same space, within what their gates allow."""

    file: str
    """Name below the bundle folder."""
    opset: int
    """ONNX opset of the graph."""
    opset_reason: str
    """Why that one."""
    minimum_onnxruntime: str
    """Oldest runtime that has every operator of the graph, on every provider that it is for."""
    providers: list[str]
    """Execution providers that it is for, best first: int8 is for CPUs, fp16 for GPUs."""
    canary_min_cosine: dict[str, float]
    """Lowest accepted cosine between expected and computed canary embeddings, by provider; `*` for any other."""

    def floor(self, provider: str) -> float:
        """The canary's lowest accepted cosine on a provider."""
        return self.canary_min_cosine.get(provider, self.canary_min_cosine["*"])


class BundleManifest(Sealed):
    """manifest.json."""

    format_version: int = BUNDLE_FORMAT
    """Format of the bundle folder."""
    space_id: str
    """Names the embedding space: source weights, architecture, pooling and preprocessing. Nothing else enters."""
    encoder: EncoderSpec
    """The network behind the graph."""
    preprocess: PreprocessSpec
    """How pictures must be prepared."""
    weights_sha256: str
    """Digest of the source weights."""
    variants: dict[str, Variant]
    """The graphs, by name: fp32 always, and those that passed their gate."""
    patches: tuple[int, int, int] | None = None
    """Rows, columns and length of the graph's second output `patches` (unit rows), where it has one."""
    provenance: dict[str, Any]
    """Method, data fingerprint, seed, versions and git revision of the run."""
    files: dict[str, FileRecord]
    """Every file that the bundle needs, by name below its folder."""
    canary: list[CanaryPicture]
    """Pictures that the runtime must reproduce before it serves."""


def make_space_id(encoder: EncoderSpec, weights_sha256: str, preprocess: PreprocessSpec) -> str:
    """The identity of an embedding space: two vectors may be compared when theirs are equal."""
    described = encoder.model_dump(mode="json")
    if encoder.projection is None:  # a later field: spaces without keep their names
        del described["projection"]
    parts = {"encoder": described, "weights": weights_sha256, "preprocess": preprocess.sha256()}
    return f"lw1-{sha256_json(parts)[:32]}"


class Bundle:
    """An opened bundle whose files match their checksums.

    Attributes: `folder`, `manifest`.
    """

    def __init__(self, folder: Path, manifest: BundleManifest) -> None:
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def open(cls, folder: Path) -> Bundle:
        """Read and verify a bundle. Raises `RefusalError`."""
        path = folder / "manifest.json"
        if not path.is_file():
            raise RefusalError(
                f"{folder} is not a bundle (no manifest.json): expected a folder written by `likewise export RUN --out "
                "BUNDLE`, or a name that `likewise bundle list` knows"
            )
        again = "the bundle changed after it was written; export it again"
        manifest = read_contract(path, BundleManifest, BUNDLE_FORMAT, again)
        for name, record in manifest.files.items():
            file = folder / name
            if not file.is_file():
                raise RefusalError(f"{file} is missing though the manifest names it: {again}")
            found = sha256_file(file)
            if found != record.sha256:
                raise RefusalError(
                    f"{file} has checksum {found[:12]}…, the manifest says {record.sha256[:12]}…: {again}"
                )
        expected = make_space_id(manifest.encoder, manifest.weights_sha256, manifest.preprocess)
        if expected != manifest.space_id:
            raise RefusalError(f"{path} names space {manifest.space_id}, its contents make {expected}: {again}")
        return cls(folder, manifest)

    @property
    def space_id(self) -> str:
        """See `BundleManifest.space_id`."""
        return self.manifest.space_id

    @property
    def dim(self) -> int:
        """Length of an embedding."""
        return self.manifest.encoder.embedding_dim

    def graph(self, variant: str = "fp32") -> Path:
        """The file of a variant. Raises `RefusalError` where there is none of that name."""
        found = self.manifest.variants.get(variant)
        if found is None:
            raise RefusalError(
                f"{self.folder} holds no variant {variant!r}, only {', '.join(self.manifest.variants)}: add it with "
                f"`likewise export … --out {self.folder} --variants {variant}`"
            )
        return self.folder / found.file


Model = TypeVar("Model", bound=Contract)


def read_contract(
    path: Path, model: type[Model], format_version: int, what_to_do: str, oldest: int | None = None
) -> Model:
    """Parse a stored contract of format `oldest` (or `format_version` alone) to `format_version`. Raises `RefusalError` on
    damage and on other formats."""
    try:
        fields = json.loads(path.read_bytes())
        found = fields["format_version"]
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise RefusalError(f"{path} cannot be read ({type(e).__name__}: {e}): {what_to_do}") from None
    if not isinstance(found, int) or not (oldest or format_version) <= found <= format_version:
        raise RefusalError(
            f"{path} has format {found}, this version of likewise reads format {format_version}: "
            "install the version that wrote it"
        )
    try:
        found_model = model.model_validate(fields)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RefusalError(f"{path} is damaged at {where} ({first['msg']}): {what_to_do}") from None
    # Over what is written there: fields that came later are not in it.
    if isinstance(found_model, Sealed) and found_model.seal != sha256_json({**fields, "seal": ""}):
        raise RefusalError(f"{path} does not match its own checksum: {what_to_do}")
    return found_model


def read_run(folder: Path) -> RunManifest:
    """run.json of a run folder. Raises `RefusalError`."""
    path = folder / "run.json"
    if not path.is_file():
        raise RefusalError(
            f"{folder} is not a run (no run.json): expected a folder written by `likewise train PICTURES --out RUN`"
        )
    return read_contract(path, RunManifest, RUN_FORMAT, "train again, or restore the file")


def read_verdict(folder: Path) -> Verdict | None:
    """The verdict of a run, None where it has none. Raises `RefusalError` when it is damaged."""
    return _read_if_there(Verdict, folder / "verdict.json")


def read_best(folder: Path) -> Best | None:
    """What best.safetensors of a run holds, None where it has none. Raises `RefusalError` when it is damaged."""
    return _read_if_there(Best, folder / "best.json")


def _read_if_there(contract: type[Model], path: Path) -> Model | None:
    if not path.is_file():
        return None
    try:
        return contract.model_validate_json(path.read_bytes())
    except ValidationError as e:
        raise RefusalError(f"{path} cannot be read: resume the run, which writes it again") from e


def sha256_json(value: object) -> str:
    """Hex digest of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_sha256(tensors: dict[str, npt.NDArray[Any]]) -> str:
    """Hex digest over names, types, shapes and values, in name order: independent of the file format."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = np.ascontiguousarray(tensors[name])
        digest.update(f"{name}\0{value.dtype.str}\0{value.shape}\0".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def printable(text: str) -> str:
    """Text for one line of a terminal or a list: control characters and undecodable bytes become U+FFFD."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def list_pictures(folder: Path, unreadable: list[tuple[str, str]]) -> list[PictureFile]:
    """`find_pictures`, at least one. Raises `RefusalError`."""
    if not folder.is_dir():
        raise RefusalError(f"{folder} is not a folder: give the folder that holds your pictures")
    found = find_pictures(folder, unreadable)
    if not found:
        raise RefusalError(
            f"{folder} holds no pictures: expected files such as .jpg or .png there or in its subfolders"
        )
    return found


def write_unreadable(path: Path, unreadable: list[tuple[str, str]]) -> None:
    """List skipped pictures: a line each, key and reason, separated by a tab."""
    write_file(path, "".join(f"{printable(key)}\t{printable(reason)}\n" for key, reason in unreadable))


def make_folder(folder: Path) -> None:
    """Make a folder and its parents durably."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync_folder(made.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable (fsync of the directory)."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_file(path: Path) -> None:
    """Make a file's contents durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def publish(temporary: Path, final: Path) -> None:
    """Rename a finished temporary file or folder into place, durably: afterwards it is whole or absent."""
    if temporary.is_dir():
        for path in temporary.rglob("*"):
            sync_folder(path) if path.is_dir() else sync_file(path)
        sync_folder(temporary)
    else:
        sync_file(temporary)
    temporary.replace(final)
    sync_folder(final.parent)


@contextmanager
def changing(bundle: Path, wait: bool = False) -> Iterator[None]:
    """Hold the right to change a bundle that lies there already; where another process holds it, `wait` or raise
    `RefusalError`."""
    with (bundle / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise RefusalError(
                f"another process is adding to {bundle}: wait until it is done, then run the same command again"
            ) from None
        yield


def write_file(path: Path, data: bytes | str) -> None:
    """Write a file so that it holds, at every moment, either its old or its new contents."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
