"""What encoders are worth, one beside the other and beside what needs no learning: the table of the model cards.

    python -m benchmarks.encoders --packs FOLDER --out FOLDER --encoder NAME=BUNDLE [--encoder …] [--untrained NAME=BUNDLE]
        [--bank 1] [--quick]

`--packs` holds the maintainers' development packs as .npz (blob of encoded pictures, offset, label, group, split):

    grocery160       81 products; A: test → train + val, B: catalogue picture → test, C: test → catalogue picture
    coil-1-50        protocol B: four angles → angles at least 45° away, in colour and in grey
    copydet-dev      12 edits of 75 pictures each, 450 in the gallery, 150 negatives; µAP of each query's best candidate
    tinyin64-val5k   kNN, k = 20, temperature 0.07, against the first `--bank` of three training parts

Every encoder is a bundle, or one that comes with likewise (`default`), prepared as it says and run as it is served;
`--untrained` measures a bundle's network with random weights (timm's initialisation, seed 0). Rows that need no learning see
the whole picture padded to a square of 160 px. `--tasks` leaves packs out.

R@1 and mAP in %; the standard error of a share of grocery's 2,485 queries is at most one point, of 81 catalogue pictures
five, of 900 copies one and a half. Features are kept in `--out` and used again.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from benchmarks.record import cpu_name, finish
from export.bundle import Bundle, Embeddings
from export.onnx_graph import OPSETS, EmbeddingGraph, build_encoder, write_graph
from export.preprocess import Pixels, PreprocessSpec, preprocess
from export.runtime import Runtime, open_graph
from export.shipped import bundle_folder
from training.evaluate.copies import CopyTask, detect
from training.evaluate.descriptors import BASELINES
from training.evaluate.retrieval import knn_top1, retrieve

SIDE = 160
TASKS = ("grocery", "coil", "copies", "knn")
PARTS = [f"tinyin64-train-{i}of3" for i in range(3)]


class Encoder(NamedTuple):
    """Pixels → unit rows, and how the pixels are prepared."""

    name: str
    digest: str
    spec: PreprocessSpec
    embed: Callable[[Pixels], Embeddings]


class Pack:
    """One development pack: encoded pictures with labels and splits."""

    def __init__(self, path: Path, limit: int | None) -> None:
        with np.load(path) as stored:
            self._blob, self._offset = stored["blob"], stored["offset"]
            self.name, self.label, self.group = path.stem, stored["label"], stored["group"]
            self.split = stored["split"].astype(str)
        if limit is not None:  # a trial: some pictures of every split
            rows = np.concatenate([np.flatnonzero(self.split == s)[:limit] for s in np.unique(self.split)])
            self._rows = np.sort(rows)
            self.label, self.group, self.split = (x[self._rows] for x in (self.label, self.group, self.split))
        else:
            self._rows = np.arange(len(self.label))

    def __len__(self) -> int:
        return len(self._rows)

    def bytes_of(self, i: int) -> bytes:
        row = self._rows[i]
        return bytes(self._blob[self._offset[row] : self._offset[row + 1]])

    def features(self, encoder: Encoder, cache: Path, grey: bool = False) -> Embeddings:
        """Unit rows [N, D] of all pictures, kept in `cache`."""
        key = hashlib.sha256(f"{encoder.digest} {self.name} {len(self)} {grey}".encode()).hexdigest()[:24]
        path = cache / f"{key}.npy"
        if path.is_file():
            return np.load(path)  # type: ignore[no-any-return]
        rows = []
        for low in range(0, len(self), 64):
            data = [self.bytes_of(i) for i in range(low, min(low + 64, len(self)))]
            rows.append(
                encoder.embed(np.stack([preprocess(in_grey(d) if grey else d, encoder.spec).pixels for d in data]))
            )
        found = np.concatenate(rows)
        cache.mkdir(parents=True, exist_ok=True)
        np.save(path, found)
        return found


def in_grey(data: bytes) -> bytes:
    """The picture without its colours, as PNG."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("L").save(buffer, "PNG")
    return buffer.getvalue()


def opened(given: str) -> Bundle:
    return Bundle.open(Path(bundle_folder(given)))


def of_bundle(name: str, given: str) -> Encoder:
    bundle = opened(given)
    runtime = Runtime(bundle, device="cpu")
    digest = bundle.manifest.files[bundle.manifest.variants[runtime.variant].file].sha256
    return Encoder(name, f"{digest} {bundle.manifest.preprocess.sha256()}", bundle.manifest.preprocess, runtime.embed)


def of_random_weights(name: str, given: str) -> Encoder:
    """The network of a bundle before it learned anything."""
    manifest = opened(given).manifest
    torch.manual_seed(0)
    network = EmbeddingGraph(build_encoder(manifest.encoder), manifest.encoder).eval()
    with tempfile.TemporaryDirectory() as place:
        write_graph(network, manifest.encoder.image_size, Path(place) / "model.onnx", OPSETS[0])
        graph = open_graph(Path(place) / "model.onnx")

    def embed(pixels: Pixels) -> Embeddings:
        rows: Embeddings = graph({"images": pixels}, "embedding")
        return rows

    described = manifest.encoder.model_copy(update={"projection": None}).model_dump_json()
    return Encoder(name, f"untrained {described} {manifest.preprocess.sha256()}", manifest.preprocess, embed)


def grocery(rows: Embeddings, pack: Pack, _: Encoder) -> dict[str, float]:
    def part(*splits: str) -> tuple[Embeddings, Any]:
        chosen = np.isin(pack.split, splits)
        return rows[chosen], pack.label[chosen].astype(np.int64)

    shop, test, iconic = part("train", "val"), part("test"), part("iconic")
    figures = {}
    for name, queries, gallery in (("A", test, shop), ("B", iconic, test), ("C", test, iconic)):
        found = retrieve(*queries, *gallery)
        figures |= {f"{name} R@1": found.recall_at[1], f"{name} mAP": found.mean_average_precision}
    return figures


def coil(rows: Embeddings, pack: Pack, _: Encoder) -> dict[str, float]:
    """Each of the four query angles by itself, as its gallery is its own."""
    angle = np.array([int(split.removeprefix("angle")) for split in pack.split])
    label = pack.label.astype(np.int64)
    precisions, firsts = [], []
    for asked in (0, 90, 180, 270):
        apart = np.abs((angle - asked + 180) % 360 - 180)
        queries, gallery = angle == asked, apart >= 45
        found = retrieve(rows[queries], label[queries], rows[gallery], label[gallery])
        precisions += found.precisions.tolist()
        firsts += (found.ranks == 0).tolist()
    return {"R@1": float(np.mean(firsts)), "mAP": float(np.mean(precisions))}


def copies(rows: Embeddings, pack: Pack, _: Encoder) -> dict[str, float]:
    gallery, queries = (np.flatnonzero(pack.split == "gallery"), np.flatnonzero(pack.split != "gallery"))
    place = {int(pack.group[g]): i for i, g in enumerate(gallery)}
    originals = [
        [place[int(pack.group[q])]] if pack.split[q].startswith("q:") and int(pack.group[q]) in place else []
        for q in queries
    ]
    task = CopyTask(queries.tolist(), gallery.tolist(), originals, [pack.split[q].partition(":")[2] for q in queries])
    found = detect(rows[queries], rows[gallery], task)
    named = {f"found {name}": share for name, share in found.by_transform.items()}
    return {"µAP": found.micro_ap_best, "R@P90": found.recall_at_precision_90, "R@1": found.recall_at_1, **named}


Score = Callable[[Embeddings, Pack, Encoder], dict[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for features")
    parser.add_argument("--encoder", action="append", default=[], metavar="NAME=BUNDLE")
    parser.add_argument("--untrained", action="append", default=[], metavar="NAME=BUNDLE")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--bank", type=int, default=1, choices=(1, 2, 3), help="training parts that kNN votes with")
    parser.add_argument("--no-baselines", action="store_true")
    parser.add_argument("--name", default="encoders", help="of the file in benchmarks/results")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    tasks, limit = args.tasks.split(","), 20 if args.quick else None
    padded = PreprocessSpec(size=SIDE, fit="pad")
    encoders = [] if args.no_baselines else [Encoder(n, f"{n} {SIDE}", padded, e) for n, e in BASELINES.items()]
    floors = [encoder.name for encoder in encoders]
    for make, pairs in ((of_random_weights, args.untrained), (of_bundle, args.encoder)):
        for pair in pairs:
            name, _, given = pair.partition("=")
            encoders.append(make(name, given))
    named = [pair.partition("=")[0] for pair in args.encoder]

    def pack(name: str) -> Pack:
        return Pack(args.packs / f"{name}.npz", limit)

    figures: dict[str, dict[str, float]] = {encoder.name: {} for encoder in encoders}

    def measure(task: str, name: str, score: Score, *, grey: bool = False) -> None:
        pictures = pack(name)
        for encoder in encoders:
            start = time.perf_counter()
            found = score(pictures.features(encoder, args.out, grey), pictures, encoder)
            figures[encoder.name] |= {f"{task} {key}": value for key, value in found.items()}
            print(f"  {task}, {encoder.name}: {time.perf_counter() - start:.0f} s", flush=True)

    if "grocery" in tasks:
        measure("grocery", "grocery160", grocery)
    if "coil" in tasks:
        measure("COIL", "coil-1-50", coil)
        measure("COIL grey", "coil-1-50", coil, grey=True)
    if "copies" in tasks:
        measure("copies", "copydet-dev", copies)
    if "knn" in tasks:
        bank = [pack(name) for name in PARTS[: args.bank]]

        def knn(rows: Embeddings, pictures: Pack, encoder: Encoder) -> dict[str, float]:
            known = np.concatenate([part.features(encoder, args.out) for part in bank])
            labels = np.concatenate([part.label for part in bank]).astype(np.int64)
            return {"kNN": knn_top1(rows, pictures.label.astype(np.int64), known, labels)}

        measure("val5k", "tinyin64-val5k", knn)

    shown = [
        "grocery A R@1", "grocery A mAP", "grocery B R@1", "grocery B mAP", "grocery C R@1", "COIL mAP",
        "COIL grey mAP", "copies µAP", "copies R@P90", "copies R@1", "copies found pasted", "val5k kNN",
    ]  # fmt: skip
    shown = [name for name in shown if any(name in found for found in figures.values())]
    print(f"\n{cpu_name()}; %, of kNN against {args.bank} of 3 training parts")
    print(f"{'':<28}" + "".join(f"{name.replace('grocery ', '').replace('copies ', 'c '):>12}" for name in shown))
    for name, found in figures.items():
        print(f"{name:<28}" + "".join(f"{100 * found[key]:>12.1f}" for key in shown))
    print()
    goals = []
    for name in named:
        for key in ("grocery A mAP", "grocery B mAP", "copies µAP"):
            if floors and key in figures[name]:
                goals.append((f"{name}: {key}", figures[name][key], max(figures[floor][key] for floor in floors)))
    finish(args.name, {"bank_parts": args.bank, "encoders": figures}, goals, 0, args.quick)


if __name__ == "__main__":
    main()
