"""How near does `likewise index build` come to its parts: decoding alone, and ONNX Runtime alone?

    python -m benchmarks.build --out FOLDER --bundle BUNDLE [--pictures 2000]
    python -m benchmarks.build --out FOLDER --bundle BUNDLE --quick

Pictures: JPEGs of 640×480 with structure at every scale. Decoding alone runs in as many threads as the build uses, ONNX
Runtime alone on all its threads, both on the same pictures, in turns with whole builds. The build shares the cores between
both, so that its ceiling is the time of one after the other, each on all cores; where a GPU embeds, the slower of the two.
"""

from __future__ import annotations

import argparse
import io
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.record import cpu_name, finish
from benchmarks.serve_search import photographs
from export.bundle import Bundle, list_pictures
from export.preprocess import PreprocessSpec, UnreadablePictureError, preprocess
from service.build import build
from service.config import Embedding, IndexBuild
from service.encoder import BUILD_BATCH, Decoded, Encoder


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def plain(data: bytes, size: int) -> None:
    """What one would write: decode whole, resize with an antialiased filter."""
    Image.open(io.BytesIO(data)).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)


def decoding(rounds: int) -> dict[str, float]:
    """Our preprocessing over plain Pillow, on one core."""
    pictures = photographs(16)
    found = {}
    for size in (224, 64):
        spec = (
            PreprocessSpec(size=size, fit="squeeze")
            if "squash" in str(PreprocessSpec.model_fields["fit"])
            else PreprocessSpec(size=size)
        )
        ratios = []
        for _ in range(rounds):
            slow = seconds(lambda size=size: [plain(data, size) for data in pictures])
            ours = seconds(lambda spec=spec: [preprocess(data, spec) for data in pictures])
            ratios.append(slow / ours)
        found[f"decoding at {size} px over plain Pillow"] = statistics.median(ratios)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="scratch folder")
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    count, rounds = (256, 2) if args.quick else (args.pictures, args.rounds)
    images = args.out / "images"
    shutil.rmtree(args.out, ignore_errors=True)
    images.mkdir(parents=True)
    drawn = photographs(64)
    for i in range(count):
        (images / f"{i:06d}.jpg").write_bytes(drawn[i % 64])
    pictures = list_pictures(images, [])
    encoder = Encoder(Bundle.open(args.bundle), Embedding.model_validate({"bundle": args.bundle}))
    gpu = "CPU" not in encoder.runtime.provider

    def decoded() -> list[Decoded]:
        read = [encoder.decoders.submit(encoder.read, picture) for picture in pictures]
        return [r for r in (future.result() for future in read) if not isinstance(r, UnreadablePictureError)]

    pixels = [d.pixels for d in decoded()]
    batches = [np.stack(pixels[low : low + BUILD_BATCH]) for low in range(0, count, BUILD_BATCH)]
    times: dict[str, list[float]] = {"decoding": [], "ONNX Runtime": [], "build": []}
    for round_ in range(rounds):
        times["decoding"].append(seconds(decoded))
        times["ONNX Runtime"].append(seconds(lambda: [encoder.embed(batch) for batch in batches]))
        asked = IndexBuild(bundle=args.bundle, images=images, out=args.out / f"built{round_}")
        times["build"].append(seconds(lambda asked=asked: build(asked)))
    encoder.close()
    ceilings = [max(d, e) if gpu else d + e for d, e in zip(times["decoding"], times["ONNX Runtime"], strict=True)]
    share = statistics.median(c / b for c, b in zip(ceilings, times["build"], strict=True))
    figures = {f"{name}, pictures/s": count / statistics.median(taken) for name, taken in times.items()}
    figures |= {
        "ceiling, pictures/s": count / statistics.median(ceilings),
        "build over ceiling": share,
        **decoding(rounds),
    }
    print(f"{cpu_name()}; {count:,} pictures, {encoder.runtime.variant} on {encoder.runtime.provider}")
    for name, value in figures.items():
        print(f"  {name:<44}{value:>12,.2f}")
    goals = [
        ("build over its ceiling", share, 0.90),
        ("decoding at 224 px over plain Pillow", figures["decoding at 224 px over plain Pillow"], 2.5),
        ("decoding at 64 px over plain Pillow", figures["decoding at 64 px over plain Pillow"], 4.0),
    ]
    finish("build", figures, goals, 0, args.quick)


if __name__ == "__main__":
    main()
