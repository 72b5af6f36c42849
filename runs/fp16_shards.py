"""The encoder of a run as float16 in shards, to travel where files are small: python runs/fp16_shards.py RUN OUT [--mib 15]

OUT/encoder-00001-of-00002.safetensors and so on, a tensor in one shard each. `likewise train --init OUT` reads them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from export.bundle import read_run
from export.weights import halved, read_run_weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--mib", type=float, default=15.0, help="most MiB of a shard")
    args = parser.parse_args()
    state = read_run_weights(args.run / "encoder.safetensors", read_run(args.run))
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, half in halved(state).items():
        if shards[-1] and size + half.nbytes > args.mib * 2**20 - 65536:  # less what the header takes
            shards.append({})
            size = 0
        shards[-1][name] = half
        size += half.nbytes
    args.out.mkdir(parents=True)
    for i, shard in enumerate(shards, 1):
        save_file(shard, args.out / f"encoder-{i:05d}-of-{len(shards):05d}.safetensors")
    print(f"{args.out}: {len(state)} tensors in {len(shards)} shards")


if __name__ == "__main__":
    main()
