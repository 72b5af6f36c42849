"""SIGKILL at random moments: what a training run loses, and whether it continues bit-identically.

    python -m benchmarks.kill_training --out FOLDER [--kills 20] [--steps 120] [--seed 0]

One run is never stopped; another, of the same seed, is killed `--kills` times at random moments after its next
checkpoint (in a step, while a checkpoint is written) and started again each time. Goals: the two end with equal bits
(student, teacher, heads, memories, optimiser), no kill loses more than the steps since the last checkpoint, and every
checkpoint found after a kill is whole.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import cpu_name, finish
from tests.shapes import write_shapes
from training.checkpoint import NAME, load_checkpoint

TINY = ["--encoder", "vit_nano", "--image-size", "32", "--patch-size", "8", "--threads", "1", "--device", "cpu"]


def command(pictures: Path, out: Path, steps: int) -> list[str]:
    """The run: a checkpoint is due after every step, SOP-MIM on."""
    flags = ["--steps", str(steps), "--mim-weight", "1", "--checkpoint-minutes", "1e-7", "--resume", *TINY]
    return [sys.executable, "-m", "likewise", "train", str(pictures), "--out", str(out), *flags]


def same(a: Any, b: Any) -> bool:
    """Equal bits, in every tensor."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    kills, steps = (2, 12) if args.quick else (args.kills, args.steps)
    pictures = args.out / "shapes"
    if not pictures.is_dir():
        write_shapes(pictures, 64)
    whole, cut = args.out / "whole", args.out / "cut"
    start = time.monotonic()
    subprocess.run(command(pictures, whole, steps), check=True, stderr=subprocess.DEVNULL)
    seconds = time.monotonic() - start
    rng = random.Random(args.seed)
    lost, reached, damaged = [], 0, 0
    for number in range(kills):
        process = subprocess.Popen(command(pictures, cut, steps), stderr=subprocess.DEVNULL)
        process_start = time.monotonic()
        # Every run gets at least one step further, so that the kills spread over the whole of it.
        while process.poll() is None and time.monotonic() - process_start < 10 * seconds:
            if (cut / NAME).is_file() and _step(cut) > reached and rng.random() < 0.2:
                break
            time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
        loaded = load_checkpoint(cut)  # refuses a damaged one
        damaged += loaded is None
        after = 0 if loaded is None else loaded.step
        lost.append(_logged(cut) - after)
        reached = after
        print(f"kill {number + 1:>2} of {kills}: checkpoint of step {after} of {steps} is whole", flush=True)
    subprocess.run(command(pictures, cut, steps), check=True, stderr=subprocess.DEVNULL)
    equal = same(*(torch.load(run / NAME, weights_only=True)["state"] for run in (whole, cut)))
    print(f"\n{cpu_name()}: {kills} kills in {steps} steps, {(time.monotonic() - start) / 60:.1f} minutes")
    goals = [
        ("bit_identical_to_the_unbroken_run", float(equal), 1.0),
        ("kills", float(kills), 2.0 if args.quick else 20.0),
        ("minus_damaged_checkpoints", -float(damaged), 0.0),
        ("minus_steps_lost", -float(max(lost)), -1.0),  # a checkpoint is due after every step
    ]
    if not finish("kill_training", {"steps_lost": lost, "steps": steps}, goals, args.seed, args.quick):
        raise SystemExit(1)


def _logged(run: Path) -> int:
    """The last step that was done, as metrics.jsonl tells it."""
    path = run / "metrics.jsonl"
    lines = [line for line in path.read_text().splitlines() if line.endswith("}")] if path.is_file() else []
    return max((json.loads(line)["step"] for line in lines), default=0)


def _step(run: Path) -> int:
    loaded = load_checkpoint(run)
    return 0 if loaded is None else loaded.step


if __name__ == "__main__":
    main()
