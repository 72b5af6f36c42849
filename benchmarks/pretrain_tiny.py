"""SOP beside DINO and MaSSL: the same pictures, views, initial weights, seeds and number of steps, in the same loop.

    python -m benchmarks.pretrain_tiny --out FOLDER --train PICTURES --test PICTURES [--seeds 0 1]            (CPU)
    python -m benchmarks.pretrain_tiny --out FOLDER --train PICTURES --test PICTURES --gpu [--slice-minutes 9]
    python -m benchmarks.pretrain_tiny --out FOLDER --quick                       drawn shapes, under a minute

Every method gets the same stabiliser, KoLeo 0.1 (`--koleo-weight`): it adds to DINO and MaSSL what it adds to SOP
(benchmarks/stabilisers.py), so that a comparison with it on one side only would credit SOP with KoLeo's gain.
CPU: vit_micro (1 M parameters) at 32 px. `--gpu`: ViT-Ti/8 and ViT-S/8 at 64 px, equal minutes instead of equal steps.
PICTURES hold class folders; their names are used for measuring only. Teacher features of whole pictures: weighted kNN
(k = 20, temperature 0.07) and a linear probe, test against training pictures, by `likewise evaluate`, with the untrained
network, raw and grey pixels and the colour histogram beside them. A slice that ends, or an interrupted benchmark,
continues with the same command; finished runs are kept.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.record import cpu_name, finish
from export.bundle import read_run
from tests.shapes import write_shapes
from training.evaluate.command import evaluate
from training.evaluate.config import Evaluate

METHODS = ("sop", "dino", "massl")
CPU_SIZES = {"micro": ["--encoder", "vit_micro", "--image-size", "32", "--patch-size", "8"]}
GPU_SIZES = {
    "ti8": ["--encoder", "vit_tiny_patch16_224", "--image-size", "64", "--patch-size", "8"],
    "s8": ["--encoder", "vit_small_patch16_224", "--image-size", "64", "--patch-size", "8"],
}
BASELINES = ("untrained network", "raw pixels", "grey, normalised pixels")
CONTINUE = 75  # EX_TEMPFAIL: the same command continues


def run_slice(command: list[str], deadline: float) -> bool:
    """Train until done (True) or until the deadline (False, after saving)."""
    process = subprocess.Popen(command)
    try:
        code = process.wait(max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGUSR1)
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise SystemExit(130) from None
    if code not in (0, 130, -signal.SIGUSR1):  # the last: before Python could listen
        raise SystemExit(code)
    return code == 0


def figures_of(run: Path, train: Path, test: Path, out: Path, baselines: bool) -> dict[str, Any]:
    """kNN and linear accuracy of a run, and of its baselines where asked for."""
    evaluate(Evaluate(source=run, data=test, bank=train, out=out, tasks=["knn", "linear"], baselines=baselines))
    return json.loads((out / "results.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=Path, help="class folders; drawn shapes where absent")
    parser.add_argument("--test", type=Path, help="class folders")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--minutes", type=float, help="equal minutes instead of equal steps")
    parser.add_argument("--views", default="photographs")
    parser.add_argument("--koleo-weight", type=float, default=0.1)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--slice-minutes", type=float, default=1e6)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.slice_minutes
    train, test, steps, seeds = args.train, args.test, args.steps, args.seeds
    if train is None:
        train, test = args.out / "shapes" / "train", args.out / "shapes" / "test"
        for folder, count, seed in ((train, 320, 1), (test, 80, 2)):
            if not folder.is_dir():
                write_shapes(folder, count, seed)
    if args.quick:
        steps, seeds = 4, [0]
    minutes = args.minutes or (25.0 if args.gpu else None)
    length = ["--minutes", str(minutes)] if minutes else ["--steps", str(steps)]
    sizes = GPU_SIZES if args.gpu else CPU_SIZES
    results: dict[str, dict[int, dict[str, Any]]] = {}
    for size, network in sizes.items():
        for seed in seeds:
            for method in args.methods:
                name = f"{method}-{size}-{seed}"
                run = args.out / name
                done = run / "evaluation" / "results.json"
                if not done.is_file():
                    command = [sys.executable, "-m", "likewise", "train", str(train), "--out", str(run), "--resume"]
                    command += ["--method", method, "--seed", str(seed), "--views", args.views, *network, *length]
                    command += ["--koleo-weight", str(args.koleo_weight)]
                    command += ["--threads", str(args.threads)] if args.threads else []
                    if not run_slice(command, deadline):
                        print(f"slice ended in {name}; the same command continues")
                        raise SystemExit(CONTINUE)
                    first = seed == seeds[0] and method == args.methods[0]  # the baselines are the same for all
                    figures_of(run, train, test, run / "evaluation", first)
                manifest = read_run(run)
                results.setdefault(f"{method}-{size}", {})[seed] = {
                    "results": json.loads(done.read_text()), "steps": manifest.steps_done,
                    "minutes": _minutes(run), "alarms": _alarms(run),
                }  # fmt: skip
    report(results, seeds, args.quick, str(train.name))


def _minutes(run: Path) -> float:
    """Training time, from the logged speed."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "images_per_second" in line]
    batch = read_run(run).config["batch_size"]
    steps = [0, *(line["step"] for line in logged)]
    return sum((b - a) * batch / line["images_per_second"] for a, b, line in zip(steps, steps[1:], logged)) / 60


def _alarms(run: Path) -> list[str]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return sorted({line["kind"] for line in lines if "alarm" in line})


def report(results: dict[str, dict[int, dict[str, Any]]], seeds: list[int], quick: bool, data: str) -> None:
    """Print the table and the goals."""
    print(f"\n{cpu_name()}; {data}; seeds {seeds}; kNN % and linear % on the test pictures")
    table: dict[str, dict[str, list[float]]] = {}
    for name, by_seed in results.items():
        for result in by_seed.values():
            for encoder, row in accuracies(result["results"]).items():
                label = name if encoder == "encoder" else f"{encoder}, {name.split('-')[1]}"
                for task, value in row.items():
                    table.setdefault(label, {}).setdefault(task, []).append(value)
    for label, row in table.items():
        cells = "   ".join(f"{task} {statistics.mean(v):5.2f} (n={len(v)})" for task, v in row.items())
        print(f"  {label:<34}{cells}")
    for name, by_seed in results.items():
        for seed, r in by_seed.items():
            print(
                f"  {name} seed {seed}: {r['steps']:,} steps, {r['minutes']:.1f} minutes, alarms {r['alarms'] or 'none'}"
            )
    goals: list[tuple[str, float, float]] = []
    for name in (n for n in results if n.startswith("sop-")):
        size = name.split("-")[1]
        for task in ("knn", "linear"):
            mine = statistics.mean(table[name][task])
            for other in (*(f"{name}, {size}" for name in BASELINES), f"dino-{size}"):
                if other in table and task in table[other]:
                    margin = 0.0 if other.startswith("dino") else 1.0
                    beaten = other.removesuffix(f", {size}").replace(", ", "_").replace(" ", "_")
                    goals.append((f"{name}_{task}_above_{beaten}", mine - statistics.mean(table[other][task]), margin))
        goals += [(f"{name}_minutes_left_of_30", 30 - max(r["minutes"] for r in results[name].values()), 0.0)]
    runs = {
        name: {seed: {**run, "results": accuracies(run["results"])} for seed, run in by_seed.items()}
        for name, by_seed in results.items()
    }  # figures alone: an evaluation names folders of this machine
    finish("pretrain_tiny", {"table": table, "runs": runs, "data": data}, goals, seeds[0], quick)


def accuracies(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """ "encoder" or a baseline's name → task → accuracy in %, of an evaluation's results.json."""
    (encoder,) = results["encoders"]
    rows: dict[str, dict[str, float]] = {}
    for task in ("knn", "linear"):
        for name, values in results["tasks"][task]["results"].items():
            rows.setdefault("encoder" if name == encoder else name, {})[task] = 100 * values["top1"]
    return rows


if __name__ == "__main__":
    main()
