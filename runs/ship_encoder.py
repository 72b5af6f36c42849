"""Make a run one of the encoders that come with the package (export/shipped.py).

    python runs/ship_encoder.py RUN NAME --images PICTURES --data "what it learned from" [--image-size 160]
        [--dimensions 256 --whitening 0.25]

Writes export/encoders/NAME: the weights in half precision as a run, and the bundle exported from exactly those. Parity is
proven, and the projection fitted, on `--images`; the canary is made of photographs, in the public domain or CC0, that come
with scikit-image (NASA's astronaut, SpaceX's rocket, Lav Varshney's camera, Rachel Michetti's coffee). The card, CARD.md,
is written by hand.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import skimage
from safetensors.torch import save_file

from export.bundle import publish, read_run, read_verdict, write_file
from export.onnx_graph import build_encoder
from export.shipped import CARD, ENCODERS
from export.weights import fit_state, halved, read_run_weights
from likewise import main as likewise
from training.encoder import tensors_digest

CANARY = ("astronaut.png", "camera.png", "coffee.png", "rocket.jpg")
KEPT = ("manifest.json", "model.onnx", "parity.json", "canary")


def write_run(run: Path, to: Path, data: str, size: int | None) -> None:
    """The run's encoder in half precision, for pictures of `size`, as a run that names no folder of this machine."""
    about = read_run(run)
    verdict = read_verdict(run)
    if verdict is not None and verdict.export == "initial":
        print(f"{run} has a verdict against its adapted weights, which are taken all the same: {verdict.sentence}")
    size = size or about.encoder.image_size
    spec = about.encoder.model_copy(update={"image_size": size})
    file = run / "encoder.safetensors"
    fitted = fit_state(read_run_weights(file, about), build_encoder(spec), str(file), "leave --image-size out")
    state = halved(fitted)
    to.mkdir(parents=True)
    save_file(state, to / "encoder.safetensors")
    changed = about.model_copy(
        update={
            "encoder": spec,
            "preprocess": about.preprocess.model_copy(update={"size": size}),
            "data": about.data.model_copy(update={"folder": data}),
            "weights_sha256": tensors_digest(state),
            "initial_sha256": None,  # what it started from is not shipped
        }
    )
    write_file(to / "run.json", changed.model_dump_json(indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--data", required=True, help="said in place of the folder's path")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--dimensions", type=int)
    parser.add_argument("--whitening", type=float, default=0.25)
    args = parser.parse_args()
    out = ENCODERS / args.name
    card = (out / CARD).read_bytes() if (out / CARD).is_file() else None
    with tempfile.TemporaryDirectory() as folder:
        place, canary = Path(folder), Path(folder) / "canary"
        write_run(args.run, place / "run", args.data, args.image_size)
        canary.mkdir()
        for name in CANARY:
            shutil.copy(Path(skimage.__file__).parent / "data" / name, canary)
        flags = ["--images", str(args.images), "--canary", str(canary), "--stored", "float16"]
        if args.dimensions:
            flags += ["--dimensions", str(args.dimensions), "--whitening", str(args.whitening)]
        if code := likewise(["export", str(place / "run"), "--out", str(place / "bundle"), *flags]):
            return code
        made = ENCODERS / f".{args.name}.tmp"
        shutil.rmtree(made, ignore_errors=True)
        shutil.copytree(place / "run", made / "run")
        for name in KEPT:
            source = place / "bundle" / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, made / name)
        if card is not None:
            (made / CARD).write_bytes(card)
        shutil.rmtree(out, ignore_errors=True)
        publish(made, out)
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    print(f"{out.name}: {size / 2**20:.1f} MiB; {CARD} {'kept' if card else 'is yet to be written'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
