"""SOP on drawn shapes, on two CPU cores, in at most 15 minutes: does it learn, and does it stay clear of collapse?

    python -m benchmarks.pretrain_shapes --out FOLDER [--epochs 40] [--seed 0] [--quick]

4,000 training and 1,000 test pictures of 32 px, a ViT of 0.1 M parameters, views that are free of colour and
orientation. Teacher features, weighted kNN (k = 20, temperature 0.07), test pictures against training pictures. The
recipe was chosen on this very set: it is a development set. Interrupted, the same command continues.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.record import cpu_name, finish
from export.bundle import read_run
from export.preprocess import find_pictures, preprocess
from tests.shapes import SHAPES, write_shapes
from training.config import Train
from training.encoder import build_vit
from training.knn import knn_accuracy, pixel_features
from training.loop import train
from training.monitor import effective_rank, mean_cosine
from training.views import Views


def pictures(folder: Path, run: Path) -> tuple[Tensor, Tensor]:
    """uint8 [N, size, size, 3] prepared as at inference, labels [N]."""
    spec = read_run(run).preprocess
    found = find_pictures(folder)
    pixels = np.stack([preprocess(p.path.read_bytes(), spec).pixels for p in found])
    return torch.from_numpy(pixels), torch.tensor([SHAPES.index(p.folder) for p in found])


def features(run: Path, pixels: Tensor) -> Tensor:
    """The exported encoder's [CLS] features [N, C]."""
    spec = read_run(run).encoder
    vit = build_vit(spec.model, spec.kwargs, spec.image_size).eval()
    vit.load_state_dict(load_file(run / "encoder.safetensors"))
    views = Views("photographs", spec.mean, spec.std)
    with torch.no_grad():
        return torch.cat([vit.forward_features(views.normalise(part))[:, 0] for part in pixels.split(256)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other fields of Train, for trials")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    count, epochs = (400, 1) if args.quick else (4000, args.epochs)

    data = args.out / "shapes"
    for part, size, seed in (("train", count, 1), ("test", count // 4, 2)):
        if not (data / part).is_dir():
            write_shapes(data / f"{part}.tmp", size, seed)
            (data / f"{part}.tmp").rename(data / part)
    common = {
        "pictures": data / "train", "encoder": "vit_nano", "patch_size": 4, "image_size": 32,
        "views": "orientation-free", "seed": args.seed, "threads": args.threads, "resume": True,
        **dict(item.split("=", 1) for item in args.set),
    }  # fmt: skip
    start = time.monotonic()
    train(Train(out=args.out / "untrained", steps=0, **common))
    if train(Train(out=args.out / "run", epochs=epochs, **common)):
        raise SystemExit(130)
    minutes = (time.monotonic() - start) / 60

    run = args.out / "run"
    (bank, bank_labels), (queries, labels) = pictures(data / "train", run), pictures(data / "test", run)
    table: dict[str, float] = {}
    for name, grey in (("raw pixels", False), ("grey, normalised pixels", True)):
        table[name] = 100 * knn_accuracy(pixel_features(bank, grey), bank_labels, pixel_features(queries, grey), labels)
    ranks = {}
    for name in ("untrained", "run"):
        f = features(args.out / name, bank)
        ranks[name] = (mean_cosine(f), effective_rank(f))
        table[name] = 100 * knn_accuracy(f, bank_labels, features(args.out / name, queries), labels)
    health = [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"health"' in line][-1]
    recipe = read_run(run).config
    print(f"\n{cpu_name()}, {minutes:.1f} minutes, seed {args.seed}, {recipe['steps']} steps of {recipe['batch_size']}")
    for name, value in table.items():
        print(f"  {'SOP, ' + str(epochs) + ' epochs' if name == 'run' else name:<28}kNN {value:5.1f} %")
    print(f"  mean cosine {ranks['run'][0]:.3f} (untrained {ranks['untrained'][0]:.3f}), ", end="")
    print(
        f"effective rank {ranks['run'][1]:.1f} (untrained {ranks['untrained'][1]:.1f}), "
        f"ln P {math.log(recipe['anchors']):.2f}"
    )
    print(f"  {health}\n")
    alarms = sum('"alarm"' in line for line in (run / "metrics.jsonl").read_text().splitlines())
    best = max(value for name, value in table.items() if name != "run")
    goals = [
        ("knn_above_untrained_points", table["run"] - table["untrained"], 3.0),
        ("knn_above_best_baseline_points", table["run"] - best, 3.0),
        ("mean_cosine_below_0.95_margin", 0.95 - ranks["run"][0], 0.0),
        ("effective_rank", ranks["run"][1], 5.0),
        ("no_alarms", -alarms, 0.0),
        ("minutes_left_of_15", 15 - minutes, 0.0),
    ]
    figures = {"knn": table, "mean_cosine_and_rank": ranks, "minutes": minutes, "epochs": epochs, "recipe": recipe}
    finish("pretrain_shapes", figures, goals, args.seed, args.quick)


if __name__ == "__main__":
    main()
