"""Which configuration embeds fastest on this CPU without finding other neighbours? Paired rounds, beside plain fp32.

    python -m benchmarks.export_speed --bundle BUNDLE --pictures PICTURES [--other BUNDLE …] [--threads 2]
    python -m benchmarks.export_speed --quick

BUNDLE holds a trained encoder with its variants (`likewise export … --variants int8`); `--other` adds bundles of the same
weights, such as one of opset 23. Every variant runs on every provider that ONNX Runtime offers here (OpenVINO's plugin
where it is installed and takes the processor), in two sessions of half the threads and half of a batch each, and fp32 in the
`openvino` package where that is installed. A round runs each configuration once on a batch of 8; figures are medians
over the rounds, ratios to plain fp32 of the same round. Overlap@10 of neighbours with plain fp32, on 1,000 pictures; where
folder names are labels also the mean average precision of each.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import cpu_name, finish
from export.bundle import Bundle, Embeddings
from export.machine import cpu_quota
from export.parity import mean_average_precision, neighbor_overlap
from export.preprocess import Pixels
from export.providers import CPU
from export.quantise import write_int8
from export.runtime import Runtime, offered, open_graph
from export.sample import Sample, read_sample
from likewise import main as likewise
from tests.shapes import write_shapes

PLAIN = f"fp32, {CPU}"
BATCH = 8
# Ratio to plain fp32 that a configuration with fp32's neighbours should reach (overlap@10 ≥ 0.98), by processor.
GOALS = {"AMX": 4.5, "AVX-512": 1.9}
QUANTISED_GOAL = 1.8  # with overlap@10 ≥ 0.95, on plain ONNX Runtime


def configurations(bundles: list[Bundle], threads: int) -> dict[str, Callable[[Pixels], Embeddings]]:
    """Name → embedding function."""
    found: dict[str, Callable[[Pixels], Embeddings]] = {}
    for number, bundle in enumerate(bundles):
        for name, about in bundle.manifest.variants.items():
            for provider in offered("cpu"):
                label = f"{name}{f' opset {about.opset}' if number else ''}, {provider}"
                found[label] = Runtime(bundle, "cpu", threads, name, provider).embed
                if threads > 1 and provider == CPU:
                    found[f"{label}, two sessions"] = Runtime(bundle, "cpu", threads, name, provider, sessions=2).embed
    direct = openvino(bundles[0], threads)
    if direct is not None:
        found["fp32, openvino package"] = direct
    return found


def refused(bundle: Bundle, pixels: Pixels, folder: Path) -> dict[str, Callable[[Pixels], Embeddings]]:
    """What the bundle does not hold, for comparison: its graph with int8 scales from calibration pictures."""
    if "int8" not in bundle.manifest.variants or "static" in bundle.manifest.variants["int8"].opset_reason:
        return {}
    write_int8(bundle.graph(), folder / "static.onnx", "static", pixels)
    session = open_graph(folder / "static.onnx")
    return {
        "int8 static (not in the bundle)": lambda some: session({"images": np.ascontiguousarray(some)}, "embedding")
    }


def openvino(bundle: Bundle, threads: int) -> Callable[[Pixels], Embeddings] | None:
    """The fp32 graph in the openvino package, which chooses its own precision; None where it is not installed."""
    try:
        ov: Any = importlib.import_module("openvino")
    except ImportError:
        return None
    compiled = ov.Core().compile_model(str(bundle.graph()), "CPU", {"INFERENCE_NUM_THREADS": threads})

    def embed(pixels: Pixels) -> Embeddings:
        rows: Embeddings = compiled(pixels)["embedding"]
        return rows.copy()

    return embed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--other", type=Path, nargs="*", default=[])
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--threads", type=int, default=cpu_quota())
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rounds = args.rounds
        if args.quick:
            args.pictures, run, args.bundle = (Path(folder) / name for name in ("shapes", "run", "bundle"))
            write_shapes(args.pictures, 208)
            tiny = ["--encoder", "vit_nano", "--image-size", "32", "--patch-size", "8", "--steps", "2"]
            assert likewise(["train", str(args.pictures), "--out", str(run), *tiny]) == 0
            assert likewise(["export", str(run), "--out", str(args.bundle), "--variants", "int8"]) == 0
            rounds = 3
        measure(args, rounds)


def measure(args: argparse.Namespace, rounds: int) -> None:
    bundles = [Bundle.open(path) for path in (args.bundle, *args.other)]
    sample = read_sample(args.pictures, bundles[0].manifest.preprocess)
    pixels = sample.pixels
    runners = configurations(bundles, args.threads)
    with tempfile.TemporaryDirectory() as folder:
        runners |= refused(bundles[0], pixels, Path(folder))
        compare(args, bundles, sample, runners, rounds)


def compare(
    args: argparse.Namespace, bundles: list[Bundle], sample: Sample, runners: dict[str, Callable[[Pixels], Embeddings]],
    rounds: int,
) -> None:  # fmt: skip
    pixels, labels = sample.pixels, sample.labels
    rows = {
        name: np.concatenate([embed(pixels[low : low + BATCH]) for low in range(0, len(pixels), BATCH)])
        for name, embed in runners.items()
    }
    overlaps = {name: neighbor_overlap(rows[PLAIN], found, 10) for name, found in rows.items()}
    precision = {name: mean_average_precision(found, labels) for name, found in rows.items()} if labels else {}
    cosines = {name: float((found * rows[PLAIN]).sum(1).min()) for name, found in rows.items()}
    some = np.ascontiguousarray(pixels[:BATCH])
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, embed in runners.items():
            start = time.perf_counter()
            embed(some)
            times[name].append(time.perf_counter() - start)
    spec = bundles[0].manifest.encoder
    network = f"{spec.model} at {spec.image_size} px"
    print(f"\n{cpu_name()}, {args.threads} threads; {network}; {len(pixels)} pictures, {rounds} rounds")
    print(f"  {'':<48}{'images/s':>9}{'ratio':>7}{'overlap@10':>12}{'min cosine':>12}{'mAP %':>8}")
    table = {}
    for name, seconds in times.items():
        speed = BATCH / statistics.median(seconds)
        ratio = statistics.median(a / b for a, b in zip(times[PLAIN], seconds, strict=True))
        table[name] = {
            "images_per_second": speed,
            "ratio": ratio,
            "overlap_at_10": overlaps[name],
            "cosine": cosines[name],
            "map": precision.get(name),
        }
        of_labels = f"{100 * precision[name]:>8.2f}" if labels else ""
        print(f"  {name:<48}{speed:>9.1f}{ratio:>7.2f}{overlaps[name]:>12.3f}{cosines[name]:>12.6f}{of_labels}")
    kind = next((k for k in GOALS if k in cpu_name()), None)
    # What `auto` can choose of the bundle: a variant on a provider, in one session or two.
    choosable = [n for n in table if "ExecutionProvider" in n and "opset" not in n]
    faithful = max(table[n]["ratio"] for n in choosable if table[n]["overlap_at_10"] >= 0.98)
    plain = [
        table[n]["ratio"]
        for n in choosable
        if n.startswith("int8") and "CPUEx" in n and table[n]["overlap_at_10"] >= 0.95
    ]
    goals = [("best_with_fp32s_neighbours_over_fp32", faithful, GOALS[kind])] if kind else []
    goals.append(("quantised_over_fp32", max(plain, default=0.0), QUANTISED_GOAL))
    finish("export_speed", {"table": table, "model": spec.model, "threads": args.threads}, goals, 0, args.quick)


if __name__ == "__main__":
    main()
