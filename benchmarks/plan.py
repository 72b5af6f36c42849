"""`likewise train --plan` against what then happens: time, peak memory and disk of whole commands, within a factor of 2.

    python -m benchmarks.plan --out FOLDER [--pictures PICTURES] [--threads 1]      about 10 minutes on 2 cores
    python -m benchmarks.plan --out FOLDER --quick

Three runs: from scratch; the same started from the first one's weights, which ends with a verdict; and one whose
`--minutes` is asked for. Without `--pictures` 4,500 drawn shapes, more than a plan decodes (it takes a sample).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.record import cpu_name, finish
from tests.shapes import write_shapes

PLAN = re.compile(
    r"each: ([\d.]+) (minutes|hours)(?:, and ([\d.]+) (minutes|hours) to decode [\d,]+ pictures once)?; memory ([\d.]+) GiB"
    r" on .*?; disk ([\d.]+) GiB",
    re.DOTALL,
)


class Needs(NamedTuple):
    """What a run takes."""

    minutes: float
    memory: float  # GiB
    disk: float  # GiB


def planned(command: list[str]) -> Needs:
    """What `--plan` says, start-up not counted."""
    said = subprocess.run([*command, "--plan"], capture_output=True, text=True, check=True).stderr
    found = PLAN.search(said)
    if found is None:
        raise SystemExit(f"no plan in: {said[-400:]}")
    minutes = sum(
        float(value) * (60 if unit == "hours" else 1)
        for value, unit in ((found[1], found[2]), (found[3], found[4]))
        if value
    )
    return Needs(minutes, float(found[5]), float(found[6]))


def taken(command: list[str], run: Path) -> Needs:
    """The whole command, from its start to its end."""
    start = time.monotonic()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with status {status}")
    bytes_ = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    return Needs((time.monotonic() - start) / 60, usage.ru_maxrss / 2**20, bytes_ / 2**30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pictures", type=Path, help="a folder; drawn shapes where absent")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    pictures, steps = args.pictures, 30 if args.quick else args.steps
    if pictures is None:
        pictures = args.out / "shapes"
        if not pictures.is_dir():
            write_shapes(pictures, 300 if args.quick else 4500)
    common = [sys.executable, "-m", "likewise", "train", str(pictures), "--encoder", "vit_nano", "--image-size", "32"]
    common += ["--patch-size", "8", "--threads", str(args.threads), "--device", "cpu"]
    first = args.out / "scratch"
    runs = {
        "scratch": ["--steps", str(steps)],
        "init": ["--steps", str(steps), "--init", str(first)],
        "minutes": ["--minutes", "0.3" if args.quick else "2"],
    }
    print(f"{cpu_name()}; {pictures.name}; planned / taken")
    table, goals = {}, []
    for name, flags in runs.items():
        out = args.out / name
        shutil.rmtree(out, ignore_errors=True)
        command = [*common, "--out", str(out), *flags]
        before, after = planned(command), taken(command, out)
        table[name] = {"planned": before._asdict(), "taken": after._asdict()}
        print(
            f"  {name:<8} {before.minutes:5.2f} / {after.minutes:5.2f} minutes   {before.memory:5.2f} / {after.memory:5.2f} "
            f"GiB of memory   {before.disk:6.3f} / {after.disk:6.3f} GiB of disk"
        )
        for what, a, b in zip(Needs._fields, before, after, strict=True):
            goals.append((f"{name}_{what}_within_a_factor_of_2", min(a / b, b / a) if a and b else 0.0, 0.5))
    finish("plan", {"table": table}, goals, 0, args.quick)


if __name__ == "__main__":
    main()
