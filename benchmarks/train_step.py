"""What a training step costs beside its networks: the whole step against a bare student forward and backward plus a
teacher forward on the same tokens, and where the rest goes.

    python -m benchmarks.train_step [--device cpu|cuda] [--quick]

CPU: vit_small at 96 px and vit_micro at 48 px, 2 + 2 crops. CUDA: ViT-S/16, 2 × 224 + 8 × 96 and 2 × 224 alone, 256
pictures, bfloat16. Measured in turn (A B A B …), medians. `images_per_second` counts source pictures. On CUDA also the
peak memory of the SOP step beside the same backbone's DINO step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import cpu_name, finish
from export.machine import cpu_quota
from training.config import Hardware, Train
from training.learner import Learner, Speed
from training.loader import Batch
from training.resolve import resolve
from training.views import Views

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CPU_CASES: dict[str, dict[str, Any]] = {
    "vit_micro, 48 px, 64 pictures": {"encoder": "vit_micro", "batch_size": 64},
    "ViT-S/16, 96 px, 16 pictures": {"encoder": "vit_small_patch16_224", "image_size": 96, "batch_size": 16},
}
CUDA_CASES: dict[str, dict[str, Any]] = {
    "ViT-S/16, 2 × 224 + 8 × 96": {"encoder": "vit_small_patch16_224", "batch_size": 256, "local_crops": 8},
    "ViT-S/16, 2 × 224": {"encoder": "vit_small_patch16_224", "batch_size": 256, "local_crops": 0},
}


def build(case: dict[str, Any], method: str, device: torch.device, preset: str) -> tuple[Learner, Batch]:
    """A learner at published memory sizes (paper) or the small preset's, and a batch of noise."""
    hardware = Hardware(device.type, str(device), cpu_quota(), device.type == "cuda")  # type: ignore[arg-type]
    asked = Train(pictures="p", out=Path("o"), preset=preset, method=method, steps=1000, views="photographs", **case)
    recipe, _ = resolve(asked, 1_000_000 if preset == "paper" else 20_000, hardware)
    views = Views("photographs", MEAN, STD)
    learner = Learner(recipe, device, Speed(bf16=device.type == "cuda"), views)
    b, size = recipe.batch_size, recipe.cache_size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (b, size, size, 3), dtype=torch.uint8, generator=generator)
    return learner, Batch(pixels.to(device), torch.ones(b), torch.arange(b, device=device), torch.arange(b))


def seconds(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(name: str, case: dict[str, Any], device: torch.device, preset: str, rounds: int) -> dict[str, float]:
    """Median seconds of the whole step and of its parts."""
    learner, batch = build(case, "sop", device, preset)
    learner.step(batch, 0)
    now = learner.moment(1)
    crops = learner._parts(batch, 1)[0]

    def bare() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=learner.speed.bf16):
            learner.teacher(crops.globals_, crops.mask, crops.drawn)
            cls, masked = learner.student(crops.globals_, crops.mask, crops.locals_)
        (cls.sum() + masked.sum()).backward()
        learner.student.zero_grad(set_to_none=True)

    outputs = learner._outputs(crops, batch.groups, now, 0)
    student = outputs.student.detach().requires_grad_()
    masked = outputs.student_masked.detach().requires_grad_()
    leaves = outputs._replace(student=student, student_masked=masked)

    def objective() -> None:
        learner.method.terms(leaves, now, torch.Generator().manual_seed(1))["loss"].backward()

    def step() -> None:
        learner.step(batch, 1)

    def views() -> None:
        learner._parts(batch, 1)

    works: dict[str, Callable[[], None]] = {"step": step, "bare": bare, "views": views, "objective": objective}
    times: dict[str, list[float]] = {key: [] for key in works}
    for key in works:
        seconds(works[key], device)
    for _ in range(rounds):
        for key, work in works.items():
            times[key].append(seconds(work, device))
    result = {key: statistics.median(values) for key, values in times.items()}
    result["images_per_second"] = len(batch.pixels) / result["step"]
    share = 100 * result["objective"] / result["step"]
    print(f"  {name:<32}step {result['step']:.3f} s ({result['images_per_second']:.0f} images/s)   ", end="")
    print(
        f"bare {result['bare']:.3f}   views {result['views']:.3f}   objective {result['objective']:.3f} ({share:.1f} %)"
    )
    return result


def memory(case: dict[str, Any], device: torch.device, preset: str) -> dict[str, float]:
    """Peak GiB of the SOP step and of the DINO step."""
    found = {}
    for method in ("sop", "dino"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        learner, batch = build(case, method, device, preset)
        for step in range(3):
            learner.step(batch, step)
        found[f"{method}_peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        del learner, batch
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=cpu_quota())
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    cases, preset = (CUDA_CASES, "paper") if args.device == "cuda" else (CPU_CASES, "small")
    if args.quick:
        cases = dict(list(cases.items())[:1])
    print(f"{cpu_name()}, {args.threads} threads, {torch.cuda.get_device_name() if args.device == 'cuda' else 'CPU'}")
    figures = {n: measure(n, c, device, preset, 3 if args.quick else args.rounds) for n, c in cases.items()}
    if args.device == "cuda":  # apart, when nothing of the timing is alive any more
        for name, case in cases.items():
            figures[name] |= memory(case, device, preset)
    goals: list[tuple[str, float, float]] = []
    for name, f in figures.items():
        goals.append((f"bare_over_step [{name}]", f["bare"] / f["step"], 0.85))
        if args.device == "cuda":
            goals.append((f"0.05_minus_objective_share [{name}]", 0.05 - f["objective"] / f["step"], 0.0))
            goals.append((f"dino_over_sop_peak_memory [{name}]", f["dino_peak_gib"] / f["sop_peak_gib"], 1 / 1.1))
    if args.device == "cuda" and "ViT-S/16, 2 × 224" in figures:
        goals.append(("images_per_second, 2 × 224", figures["ViT-S/16, 2 × 224"]["images_per_second"], 871.0))
    finish(f"train_step_{args.device}", {"cases": figures, "threads": args.threads}, goals, 0, args.quick)


if __name__ == "__main__":
    main()
