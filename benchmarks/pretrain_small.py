"""SOP on a small CPU, in at most 15 minutes: does it learn, and does it stay clear of collapse?

    python -m benchmarks.pretrain_small --out FOLDER --train PICTURES --test PICTURES [--steps 700] [--seed 0]
    python -m benchmarks.pretrain_small --out FOLDER [--quick]        drawn shapes, no pictures needed

The folders hold class folders; their names are used for measuring only. Teacher features of whole pictures, weighted
kNN (k = 20, temperature 0.07), test pictures against training pictures. Interrupted, the same command continues.
"""

from __future__ import annotations

import argparse
import json
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
from tests.shapes import write_shapes
from training.command import train
from training.config import Train
from training.encoder import build_backbone, class_features
from training.knn import knn_accuracy, pixel_features
from training.monitor import effective_rank, mean_cosine
from training.views import Views

SHAPES_RECIPE = {"encoder": "vit_nano", "patch_size": 4, "image_size": 32, "views": "orientation-free"}
PICTURES_RECIPE = {"encoder": "vit_micro", "patch_size": 8, "image_size": 32, "views": "products"}


def pictures(folder: Path, run: Path, classes: list[str]) -> tuple[Tensor, Tensor]:
    """uint8 [N, size, size, 3] prepared as at inference, labels [N]."""
    spec = read_run(run).preprocess
    found = find_pictures(folder)
    pixels = np.stack([preprocess(p.path.read_bytes(), spec).pixels for p in found])
    return torch.from_numpy(pixels), torch.tensor([classes.index(p.folder) for p in found])


def features(run: Path, pixels: Tensor) -> Tensor:
    """The exported encoder's [CLS] features [N, C]."""
    spec = read_run(run).encoder
    vit = build_backbone(spec.model, spec.kwargs, spec.image_size).eval()
    vit.load_state_dict(load_file(run / "encoder.safetensors"))
    views = Views("photographs", spec.mean, spec.std)
    return class_features(vit, pixels, views.normalise, torch.device("cpu"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=Path, help="class folders; drawn shapes where absent")
    parser.add_argument("--test", type=Path, help="class folders")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other fields of Train, for trials")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    train_folder, test_folder = args.train, args.test
    if train_folder is None:
        count = 400 if args.quick else 4000
        train_folder, test_folder = args.out / "shapes" / "train", args.out / "shapes" / "test"
        for folder, size, seed in ((train_folder, count, 1), (test_folder, count // 4, 2)):
            if not folder.is_dir():
                write_shapes(folder.with_suffix(".tmp"), size, seed)
                folder.with_suffix(".tmp").rename(folder)
    common = {
        "pictures": train_folder, "seed": args.seed, "threads": args.threads, "resume": True,
        **(PICTURES_RECIPE if args.train else SHAPES_RECIPE), **dict(item.split("=", 1) for item in args.set),
    }  # fmt: skip
    start = time.monotonic()
    train(Train(out=args.out / "untrained", steps=0, **common))
    if train(Train(out=args.out / "run", steps=6 if args.quick else args.steps, **common)):
        raise SystemExit(130)
    minutes = (time.monotonic() - start) / 60

    run = args.out / "run"
    classes = sorted({p.folder for folder in (train_folder, test_folder) for p in find_pictures(folder)})
    (bank, bank_labels), (queries, labels) = (pictures(f, run, classes) for f in (train_folder, test_folder))
    table: dict[str, float] = {}
    for name, grey in (("raw pixels", False), ("grey, normalised pixels", True)):
        table[name] = 100 * knn_accuracy(pixel_features(bank, grey), bank_labels, pixel_features(queries, grey), labels)
    ranks = {}
    for name in ("untrained", "run"):
        f = features(args.out / name, bank)
        ranks[name] = (mean_cosine(f), effective_rank(f))
        table[name] = 100 * knn_accuracy(f, bank_labels, features(args.out / name, queries), labels)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    health = [line for line in lines if "health" in line]
    alarms = [line["alarm"] for line in lines if "alarm" in line]
    recipe = read_run(run).config
    print(
        f"\n{cpu_name()}, {minutes:.1f} minutes, seed {args.seed}, {recipe['steps']} steps of {recipe['batch_size']}, ",
        end="",
    )
    print(f"{len(bank):,} training and {len(queries):,} test pictures, {len(classes)} classes")
    for name, value in table.items():
        print(f"  {'SOP' if name == 'run' else name:<28}kNN {value:5.1f} %")
    print(f"  mean cosine {ranks['run'][0]:.3f} (untrained {ranks['untrained'][0]:.3f}), ", end="")
    print(f"effective rank {ranks['run'][1]:.1f} (untrained {ranks['untrained'][1]:.1f})")
    for line in health:
        print(f"  step {line['step']:>5}   H(vote) {line['vote_entropy']:.2f}   ", end="")
        print(f"H(mean vote) {line['mean_vote_entropy']:.2f} of {math.log(recipe['anchors']):.2f}   ", end="")
        print(f"mean cosine {line['mean_cosine']:.3f} (head {line['head_mean_cosine']:.3f})   ", end="")
        print(f"effective rank {line['effective_rank']:.1f}   leave-one-out kNN {line.get('knn', math.nan):.1f} %")
    print(f"  alarms: {alarms or 'none'}\n")
    goals = [
        ("knn_above_untrained_points", table["run"] - table["untrained"], 3.0),
        ("knn_above_raw_pixels_points", table["run"] - table["raw pixels"], 3.0),
        ("knn_above_grey_pixels_points", table["run"] - table["grey, normalised pixels"], 3.0),
        ("mean_cosine_margin_to_0.95", 0.95 - ranks["run"][0], 0.0),
        ("mean_vote_entropy_share_of_ln_P", health[-1]["mean_vote_entropy"] / math.log(recipe["anchors"]), 0.7),
        ("effective_rank", ranks["run"][1], 5.0),
        ("no_alarms", -float(len(alarms)), 0.0),
        ("minutes_left_of_15", 15 - minutes, 0.0),
    ]
    figures = {
        "knn": table, "mean_cosine_and_rank": ranks, "health": health, "minutes": minutes, "recipe": recipe,
        "data": "drawn shapes" if args.train is None else args.train.name,
    }  # fmt: skip
    name = "pretrain_small" if args.seed == 0 else f"pretrain_small_seed{args.seed}"
    finish(name, figures, goals, args.seed, args.quick)


if __name__ == "__main__":
    main()
