"""Which stabiliser costs SOP least at small scale, does SOP then match DINO, and do more support embeddings help?

    python -m benchmarks.stabilisers --out FOLDER --train PICTURES --held-out PICTURES [--seeds 0 1 2] [--only NAME …]

Every setting gets the same pictures, views, initial weights, learning rate and number of steps; only what its name says
differs. Teacher [CLS] features, weighted kNN (k = 20, temperature 0.07), held-out pictures against training pictures;
folder names are labels for measuring only. Interrupted, the same command continues; finished runs are kept as lines of
FOLDER/runs.jsonl; `--report` prints them. `--quick` checks the mechanics on drawn shapes in under a minute.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.pretrain_small import features, pictures
from benchmarks.record import cpu_name, finish
from export.bundle import read_run
from export.preprocess import find_pictures
from tests.shapes import write_shapes
from training.command import train
from training.config import Train
from training.knn import knn_accuracy, pixel_features
from training.monitor import effective_rank, mean_cosine

NANO = {"encoder": "vit_nano", "patch_size": 8, "image_size": 32}
MICRO = {"encoder": "vit_micro", "patch_size": 8, "image_size": 32}
SOP = {"koleo_weight": 0.0}  # the method alone: k = 4, ε = 0, no stabiliser
KOLEO = {"koleo_weight": 0.1}

# name → fields of Train that differ
SETTINGS: dict[str, dict[str, Any]] = {
    "DINO": {**NANO, "method": "dino"},
    "DINO + KoLeo 0.1": {**NANO, "method": "dino", **KOLEO},
    "SOP, no stabiliser": {**NANO, **SOP},
    "SOP + KoLeo 0.1": {**NANO, **KOLEO},
    "MaSSL": {**NANO, "method": "massl"},
    "MaSSL + KoLeo 0.1": {**NANO, "method": "massl", **KOLEO},
    "SOP + KoLeo 0.1 → 0": {**NANO, **KOLEO, "koleo_final_weight": 0.0},
    "SOP + Sinkhorn": {**NANO, **SOP, "teacher_votes": "sinkhorn"},
    "SOP + variance 1": {**NANO, **SOP, "variance_weight": 1.0},
    "SOP + SIGReg 1": {**NANO, **SOP, "sigreg_weight": 1.0},
    **{f"SOP + KoLeo 0.1, k = {k}, nano": {**NANO, **KOLEO, "support": k} for k in (0, 1, 8)},
    "SOP + mean entropy 1": {**NANO, **SOP, "mean_entropy_weight": 1.0},
    "SOP + centring": {**NANO, **SOP, "teacher_votes": "centred"},
    "SOP + KoLeo 0.03": {**NANO, "koleo_weight": 0.03},
    "SOP + KoLeo 0.3": {**NANO, "koleo_weight": 0.3},
    "DINO + KoLeo 0.3": {**NANO, "method": "dino", "koleo_weight": 0.3},
    "SOP, anchors from written rows": {**NANO, **SOP, "anchors_from": "written"},
    "SOP, batch 256, as many pictures": {**NANO, **SOP, "batch_size": 256},
    **{f"SOP + KoLeo 0.1, k = {k}, micro": {**MICRO, **KOLEO, "support": k} for k in (4, 0, 8, 1)},
    "DINO, micro": {**MICRO, "method": "dino"},
    "DINO + KoLeo 0.1, micro": {**MICRO, "method": "dino", **KOLEO},
}


def measure(name: str, seed: int, common: dict[str, Any], out: Path, held_out: Path) -> dict[str, Any] | None:
    """Train and evaluate one setting; None when interrupted."""
    train_folder = common["pictures"]
    fields = {**common, **SETTINGS.get(name, {**NANO, "steps": 0})}
    fields["steps"] = fields["steps"] * common["batch_size"] // fields["batch_size"]  # as many pictures in each setting
    asked = Train(out=out, seed=seed, resume=True, **fields)
    start = time.process_time()
    if train(asked):
        return None
    minutes = (time.process_time() - start) / 60
    classes = sorted({p.folder for folder in (train_folder, held_out) for p in find_pictures(folder)})
    (bank, bank_labels), (queries, labels) = (pictures(f, out, classes) for f in (train_folder, held_out))
    if name == "raw pixels":
        rows = [pixel_features(x, grey=False) for x in (bank, queries)]
    elif name == "grey, normalised pixels":
        rows = [pixel_features(x, grey=True) for x in (bank, queries)]
    else:
        rows = [features(out, x) for x in (bank, queries)]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    health = [line for line in lines if "health" in line]
    result = {
        "name": name, "seed": seed, "cpu_minutes": minutes, "steps": read_run(out).steps_done,
        "revision": read_run(out).git_revision,
        "knn": 100 * knn_accuracy(rows[0], bank_labels, rows[1], labels), "queries": len(queries),
        "mean_cosine": mean_cosine(rows[0]), "effective_rank": effective_rank(rows[0][:2000]),
        "head_mean_cosine": health[-1]["head_mean_cosine"], "vote_entropy": health[-1]["vote_entropy"],
        "mean_vote_entropy": health[-1]["mean_vote_entropy"],
    }  # fmt: skip
    shutil.rmtree(out)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=Path, help="class folders; drawn shapes where absent")
    parser.add_argument("--held-out", type=Path, help="class folders")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="run nothing, print what FOLDER/runs.jsonl holds")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    train_folder, held_out, steps, seeds = args.train, args.held_out, args.steps, args.seeds
    if train_folder is None and not args.report:
        train_folder, held_out = args.out / "shapes" / "train", args.out / "shapes" / "test"
        for folder, seed in ((train_folder, 1), (held_out, 2)):
            if not folder.is_dir():
                write_shapes(folder, 160, seed)
    if args.quick:
        steps, seeds = 3, [0]
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "runs.jsonl"
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    common = {"pictures": train_folder, "steps": steps, "threads": args.threads, "batch_size": 64}
    for seed in [] if args.report else seeds:
        baselines = ["untrained", *(("raw pixels", "grey, normalised pixels") if seed == seeds[0] else ())]
        for name in [*baselines, *args.only]:
            if any(line["name"] == name and line["seed"] == seed for line in done):
                continue
            result = measure(name, seed, common, args.out / "run", held_out)
            if result is None:
                raise SystemExit(130)
            done.append(result)
            with log.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(
                f"{name}, seed {seed}: kNN {result['knn']:.2f} %, {result['cpu_minutes']:.1f} CPU-minutes", flush=True
            )

    table: dict[str, dict[str, Any]] = {}
    print(f"\n{cpu_name()}, {steps} steps of 64; kNN % of {done[0]['queries']:,} held-out pictures")
    for name in dict.fromkeys(line["name"] for line in done):
        lines = [line for line in done if line["name"] == name]
        knn = [line["knn"] for line in lines]
        spread = statistics.stdev(knn) if len(knn) > 1 else math.nan
        table[name] = {"knn": knn, "mean": statistics.mean(knn), "deviation": spread}
        cosine = statistics.mean(line["head_mean_cosine"] for line in lines)
        rank = statistics.mean(line["effective_rank"] for line in lines)
        print(f"  {name:<32}{statistics.mean(knn):6.2f} ± {spread:4.2f} (n={len(knn)})   ", end="")
        print(f"head cosine {cosine:.3f}   effective rank {rank:5.1f}")
    stabilised = [v["mean"] for n, v in table.items() if n.startswith("SOP +") and not n.endswith(("nano", "micro"))]
    goals = []
    if stabilised and "DINO" in table:
        baselines = [v["mean"] for n, v in table.items() if n.startswith("DINO") and not n.endswith("micro")]
        goals = [("best_SOP_minus_best_DINO_points", max(stabilised) - max(baselines), 0.0)]
    cpu_hours = sum(line["cpu_minutes"] for line in done) / 60
    figures = {"table": table, "runs": done, "cpu_hours": cpu_hours}
    finish("stabilisers", figures, goals, seeds[0], args.quick)


if __name__ == "__main__":
    main()
