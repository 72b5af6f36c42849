"""What an export is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_settings import CliPositionalArg

from export.bundle import Pooling
from export.shipped import run_folder

VariantName = Literal["fp32", "fp16", "int8"]


class Export(BaseModel):
    """Turn an encoder into a bundle: ONNX graphs, their manifest, a canary, and parity measured on real pictures.

    The encoder is a run of `likewise train`, weights of a timm model or of another code base, or an ONNX file. With the
    bundle of the same encoder in `--out`, variants that it lacks are added.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    source: CliPositionalArg[Annotated[Path, BeforeValidator(run_folder)]]
    """A run folder, a file of weights (.safetensors, .pth; with --model), an .onnx file, or the name of an encoder that
    comes with likewise."""
    out: Path
    """The bundle folder to write."""
    images: Path | None = None
    """Pictures to prove parity on and to calibrate with; a run's own where absent."""
    canary: Path | None = None
    """Where the canary's pictures come from, if not from those: they travel with the bundle. They are kept as PNG then,
    which every decoder reads alike."""
    variants: list[VariantName] = ["fp32"]
    """Beside fp32, which is always written: fp16 (GPUs), int8 (CPUs); separated by commas. Each must pass its gate."""
    weights: Literal["auto", "adapted", "initial", "best"] = "auto"
    """Of a run. The last ones, or where it started from trained weights those that its verdict found better; `adapted` or
    `initial` whatever the verdict says; `best`: those with the highest kNN on the way (labelled pictures)."""

    pooling: Pooling | None = None
    """How features become one vector: the class token, the mean of the patches or of the feature map, their generalised
    mean, class token and mean side by side, or what the model does by itself. Where absent: cls, or else the model's."""
    patches: bool = False
    """Add a second output, the patches' unit rows."""
    opset: Literal["auto", "20", "23"] = "auto"
    """ONNX opset: 20 runs on older runtimes, 23 has attention as one operator. auto: 20."""

    dimensions: int | None = Field(None, ge=2)
    """Length of an embedding, where that is to be less than the network gives: a projection onto the principal axes of the
    pictures, inside the graph."""
    whitening: float = Field(0.25, ge=0, le=1)
    """With --dimensions: how far the axes are made to count alike, from 0 (plain PCA) to 1."""
    stored: Literal["float32", "float16"] = "float32"
    """How the fp32 graph's large weights are kept in the file: float16 halves it, and they are cast to float32 when it is
    loaded. Parity is proven with what was stored."""

    model: str | None = None
    """timm's name of the architecture, for a file of weights."""
    patch_size: int | None = Field(None, ge=2, le=64)
    """Side of a patch, for weights whose patches are not the model's usual ones."""
    image_size: int | None = Field(None, ge=16, le=2048)
    """Input height and width, in pixels; the model's own or the run's where absent. A larger one than an encoder was
    trained at often finds better neighbours, for more time. Not for ONNX files of a fixed size."""
    normalization: Literal["imagenet", "model", "none"] | None = None
    """Mean and deviation of the input: ImageNet's, those that timm names for the model, or none because an ONNX file
    takes 0…1 (or uint8). Asked for where it is in doubt."""
    fit: Literal["crop", "pad"] | None = None
    """Crop the centre (where absent), or pad to the longer side. Weights and ONNX files only."""
    output: str | None = None
    """Which output of an ONNX file is the embedding, where it has several."""

    def cli_cmd(self) -> int:
        """Run the command."""
        from export.command import export

        export(self)
        return 0
