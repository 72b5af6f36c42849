"""Speed and memory of SOP's image-level objective at published size, against the paper's equations taken literally.

    python -m benchmarks.sop_objective [--quick] [--device cuda] [--threads 2] [--rounds 5] [--seed 0]

N = 65,536 rows of memory, P = 4,096 prototypes of k = 8 supports, d = 256, 64 pictures × 12 crops.
Two parts, each contender measured in alternation with the others (medians):
  loss  vote and cross-entropy, forward and backward, given the prototypes: the dense contribution matrix Y [P(k+1), P]
        (built, as it changes every step), the plain closed form under autograd, and `image_loss`;
  draw  the k nearest of the rest of the memory for each anchor: one fp32 similarity matrix, masked, and topk; a running
        topk over blocks of 16,384 rows; and `nearest_rows`. Two memories: random rows, as at the first step, and rows
        in 1,000 clusters, as after some training.
Peak memory is that of a process of its own which runs one contender once (its resident peak beyond its inputs).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.record import cpu_name, finish, versions
from training.neighbours import nearest_rows
from training.prototypes import draw_prototypes
from training.sop import Prototypes, image_loss

STUDENT, TEACHER = 0.1, 0.04


class Size(NamedTuple):
    N: int
    P: int
    k: int
    d: int
    B: int
    V: int


FULL = Size(65536, 4096, 8, 256, 64, 12)
QUICK = Size(16384, 1024, 8, 128, 16, 12)


class Inputs(NamedTuple):
    bank: Tensor
    order: Tensor
    zs: Tensor
    zt: Tensor


def unit(generator: torch.Generator, count: int, dim: int) -> Tensor:
    return F.normalize(torch.randn(count, dim, generator=generator), dim=1)


def make_inputs(size: Size, seed: int, device: str, clusters: int = 1000) -> Inputs:
    """A memory in clusters (0: random rows) and the crops of pictures from the same clusters."""
    g = torch.Generator().manual_seed(seed)
    bank = unit(g, size.N, size.d)
    pictures = unit(g, size.B, size.d)
    if clusters:
        centres = unit(g, clusters, size.d)
        bank = F.normalize(centres[torch.randint(clusters, (size.N,), generator=g)] + 0.8 * bank, dim=1)
        pictures = F.normalize(centres[torch.randint(clusters, (size.B,), generator=g)] + 0.8 * pictures, dim=1)
    zs = F.normalize(pictures.repeat(size.V, 1) + 0.5 * unit(g, size.V * size.B, size.d), dim=1)
    zt = F.normalize(pictures.repeat(2, 1) + 0.5 * unit(g, 2 * size.B, size.d), dim=1)
    order = torch.randperm(size.N, generator=g)
    return Inputs(*(x.to(device) for x in (bank, order, zs, zt)))


def paired_loss(ps: Tensor, pt: Tensor, views: int) -> Tensor:
    """1.6, pair by pair."""
    students, teachers = ps.chunk(views), pt.chunk(2)
    pairs = [
        -(teachers[j] * students[i].clamp_min(1e-12).log()).sum(-1).mean()
        for i in range(views) for j in range(2) if i != j
    ]  # fmt: skip
    return torch.stack(pairs).mean()


def dense_matrix(w: Tensor) -> Tensor:
    """Y [P(k+1), P] (1.4)."""
    P, voters = w.shape
    Y = ((1.0 - w) / (P - 1)).reshape(-1, 1).repeat(1, P)
    Y[torch.arange(P * voters, device=w.device), torch.arange(P, device=w.device).repeat_interleave(voters)] = (
        w.flatten()
    )
    return Y


def dense_loss(zs: Tensor, zt: Tensor, views: int, prototypes: Prototypes) -> Tensor:
    D, Y = prototypes.D.flatten(0, 1), dense_matrix(prototypes.w)
    with torch.no_grad():
        pt = (zt @ D.T / TEACHER).softmax(-1) @ Y
    return paired_loss((zs @ D.T / STUDENT).softmax(-1) @ Y, pt, views)


def plain_vote(u: Tensor, D: Tensor, w: Tensor, temperature: float) -> Tensor:
    q = (u @ D.flatten(0, 1).T / temperature).softmax(-1).unflatten(-1, w.shape)
    own, leak = (q * w).sum(-1), (q * (1.0 - w)).sum(-1)
    return own + (leak.sum(-1, keepdim=True) - leak) / (len(w) - 1)


def plain_loss(zs: Tensor, zt: Tensor, views: int, prototypes: Prototypes) -> Tensor:
    D, w = prototypes.D.contiguous(), prototypes.w
    with torch.no_grad():
        pt = plain_vote(zt, D, w, TEACHER)
    return paired_loss(plain_vote(zs, D, w, STUDENT), pt, views)


def our_loss(zs: Tensor, zt: Tensor, views: int, prototypes: Prototypes) -> Tensor:
    return image_loss(zs, zt, views, prototypes, STUDENT, TEACHER)


def brute_force(bank: Tensor, order: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    chosen = order[: size.P]
    similarity = bank[chosen] @ bank.T
    similarity[:, chosen] = -2.0
    top = similarity.topk(size.k, dim=1)
    return top.values, top.indices


def running_top_k(bank: Tensor, order: Tensor, size: Size, block: int = 16384) -> tuple[Tensor, Tensor]:
    chosen = order[: size.P]
    A, barred = bank[chosen], torch.zeros(size.N, dtype=torch.bool, device=bank.device)
    barred[chosen] = True
    best = A.new_full((size.P, size.k), -2.0)
    which = torch.zeros(size.P, size.k, dtype=torch.long, device=bank.device)
    for low in range(0, size.N, block):
        similarity = (A @ bank[low : low + block].T).masked_fill_(barred[low : low + block], -2.0)
        top, index = similarity.topk(size.k, dim=1)
        best, keep = torch.cat([best, top], 1).topk(size.k, dim=1)
        which = torch.cat([which, index + low], 1).gather(1, keep)
    return best, which


def our_draw(bank: Tensor, order: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    return nearest_rows(bank[order[: size.P]], bank, order[size.P :].sort().values, size.k)


LOSSES: dict[str, Callable[[Tensor, Tensor, int, Prototypes], Tensor]] = {
    "dense": dense_loss, "plain": plain_loss, "ours": our_loss,
}  # fmt: skip
DRAWS: dict[str, Callable[[Tensor, Tensor, Size], tuple[Tensor, Tensor]]] = {
    "brute": brute_force, "running": running_top_k, "ours": our_draw,
}  # fmt: skip


def job(part: str, name: str, size: Size, inputs: Inputs, prototypes: Prototypes | None) -> Callable[[], object]:
    """One run of a contender."""
    if part == "draw":
        return lambda: DRAWS[name](inputs.bank, inputs.order, size)
    assert prototypes is not None
    zs = inputs.zs.clone().requires_grad_()

    def step() -> None:
        zs.grad = None
        LOSSES[name](zs, inputs.zt, size.V, prototypes).backward()

    return step


def prototypes_of(inputs: Inputs, size: Size, seed: int) -> Prototypes:
    return draw_prototypes(inputs.bank, size.P, size.k, torch.Generator().manual_seed(seed))


def resident(field: str) -> int:
    """Bytes of a field of this process's status."""
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


def peak_here(part: str, name: str, size: Size, seed: int, device: str) -> int:
    """Bytes that one run of a contender needs beyond its inputs, in this (fresh) process."""
    small = Size(2048, 64, size.k, 32, 4, size.V)
    warm = make_inputs(small, seed, device)
    job(part, name, small, warm, prototypes_of(warm, small, seed))()  # libraries load their code
    inputs = make_inputs(size, seed, device)
    prototypes = prototypes_of(inputs, size, seed) if part == "loss" else None
    run = job(part, name, size, inputs, prototypes)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # nothing that the set-up freed is there to be used again
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def peak(part: str, name: str, args: argparse.Namespace) -> int:
    """The same in a process of its own."""
    command = [
        sys.executable, "-m", "benchmarks.sop_objective", "--peak", part, name, "--seed", str(args.seed),
        "--threads", str(args.threads), "--device", args.device, *(["--quick"] if args.quick else []),
    ]  # fmt: skip
    # A fixed threshold: freed blocks go back to the system at once, in every contender alike.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout)


def alternate(
    jobs: dict[str, Callable[[], object]], rounds: int, device: str
) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of each job, by the clock and of processor time; one unmeasured round, then A B C A B C …"""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    work: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(rounds + 1):
        for name, run in jobs.items():
            start, worked = time.perf_counter(), time.process_time()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
                work[name].append(time.process_time() - worked)
    clock, processor = ({n: statistics.median(times) for n, times in x.items()} for x in (seconds, work))
    return clock, processor


def loss_error(inputs: Inputs, size: Size, prototypes: Prototypes) -> float:
    """Largest relative error of value and gradient against the dense matrix in float64."""
    doubles = Prototypes(prototypes.D.double(), prototypes.w.double())
    found = []
    for name in ("dense", "ours"):
        zs = inputs.zs.double().requires_grad_()
        loss = LOSSES[name](zs, inputs.zt.double(), size.V, doubles)
        loss.backward()
        assert zs.grad is not None
        found.append((loss.item(), zs.grad))
    (a, ga), (b, gb) = found
    return max(abs(a - b) / abs(a), float((ga - gb).abs().max() / ga.abs().max()))


def agreement(inputs: Inputs, size: Size) -> tuple[float, float]:
    """Share of anchors with the same neighbours in the same order, and the same but for ties within 2e-6 of cosine."""
    (a, i), (b, j) = brute_force(inputs.bank, inputs.order, size), our_draw(inputs.bank, inputs.order, size)
    same = (i == j).all(1)
    return float(same.float().mean()), float((same | ((a - b).abs() < 2e-6).all(1)).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="smaller, under a minute, nothing written")
    parser.add_argument("--peak", nargs=2, metavar=("PART", "NAME"), help="(for the benchmark's own child processes)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    size = QUICK if args.quick else FULL
    if args.peak:
        print(peak_here(*args.peak, size, args.seed, args.device))
        return
    load = os.getloadavg()[0]
    inputs = make_inputs(size, args.seed, args.device)
    fresh = make_inputs(size, args.seed, args.device, clusters=0)
    prototypes = prototypes_of(inputs, size, args.seed)
    jobs = {
        "loss": {n: job("loss", n, size, inputs, prototypes) for n in LOSSES},
        "draw": {n: job("draw", n, size, inputs, None) for n in DRAWS},
        "draw, random memory": {n: job("draw", n, size, fresh, None) for n in DRAWS},
    }
    measured = {part: alternate(contenders, args.rounds, args.device) for part, contenders in jobs.items()}
    seconds, work = ({part: pair[i] for part, pair in measured.items()} for i in (0, 1))
    bytes_ = {part: {name: peak(part, name, args) for name in seconds[part]} for part in ("loss", "draw")}
    bytes_["draw, random memory"] = bytes_["draw"]
    matrix = 4 * size.N * size.P
    error = loss_error(inputs, size, prototypes)
    shares = {"clusters": agreement(inputs, size), "random": agreement(fresh, size)}
    device = torch.cuda.get_device_name() if args.device == "cuda" else cpu_name()
    loads = f"load {load:.1f} before and {os.getloadavg()[0]:.1f} after"
    print(f"{device}, {args.threads} threads, {loads}, torch {versions()['torch']}, seed {args.seed}, {size}")
    print(f"{'':22}{'contender':10}{'seconds':>10}{'CPU s':>10}{'peak MiB':>10}{'speed':>8}")
    for part, times in seconds.items():
        base = next(iter(times.values()))
        for name, value in times.items():
            mebibytes = bytes_[part][name] / 2**20
            print(f"{part:22}{name:10}{value:10.3f}{work[part][name]:10.3f}{mebibytes:10.0f}{base / value:7.1f}×")
    print(f"loss and gradient, float64, against the dense matrix: relative error {error:.1e}")
    print(f"same neighbours as brute force (in order; but for ties): {shares}")
    draw_speed = min(seconds[p]["brute"] / seconds[p]["ours"] for p in ("draw", "draw, random memory"))
    figures = {
        "size": size._asdict(), "device": device, "threads": args.threads, "load": loads,
        "rounds": args.rounds, "seconds": seconds, "processor_seconds": work, "peak_bytes": bytes_,
        "similarity_matrix_bytes": matrix,
        "loss_relative_error_float64": error, "same_neighbours": shares,
        "command": f"python -m benchmarks.sop_objective --device {args.device} --threads {args.threads}",
    }  # fmt: skip
    goals = [
        ("loss_speed_over_dense", seconds["loss"]["dense"] / seconds["loss"]["ours"], 8.0),
        ("loss_memory_dense_over_ours", bytes_["loss"]["dense"] / max(bytes_["loss"]["ours"], 1), 4.0),
        ("loss_agreement_1e-6_over_error", 1e-6 / max(error, 1e-16), 1.0),
        ("draw_speed_over_brute_force", draw_speed, 2.0),
        ("draw_memory_matrix_over_ours", matrix / max(bytes_["draw"]["ours"], 1), 3.0),
        ("draw_same_neighbours", min(share[1] for share in shares.values()), 1.0),
    ]
    name = "sop_objective" if args.device == "cpu" else "sop_objective_gpu"
    finish(name, json.loads(json.dumps(figures)), goals, args.seed, args.quick)


if __name__ == "__main__":
    main()
