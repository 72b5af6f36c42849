"""The encoder: a timm ViT whose student side can hide patches behind a mask token, or a convolutional network that is
adapted by its pooled features alone."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.models import checkpoint_seq, group_parameters
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from export.bundle import RefusalError, read_run, tensors_sha256
from export.weights import fit_state, read_state


class Architecture(NamedTuple):
    """What a timm model is by default."""

    convolutional: bool
    """Not a ViT: no class token and no patches to hide."""
    patch: int
    """Side of a patch in pixels; of a convolutional network the stride of its last features."""
    size: int
    """Height and width of its input in pixels."""
    width: int
    """Length of what it gives for a picture."""


@functools.cache
def architecture(model: str) -> Architecture:
    """Of a timm model. Raises `RefusalError` for names timm lacks, and for what is neither a ViT with a class token nor a
    convolutional network."""
    _known(model)
    with torch.device("meta"):
        net: Any = timm.create_model(model, pretrained=False, num_classes=0)
        if isinstance(net, VisionTransformer):
            if net.cls_token is None:
                raise RefusalError(f"{model} has no class token: SOP needs one, such as vit_small_patch16_224")
            return Architecture(
                False, int(net.patch_embed.patch_size[0]), int(net.patch_embed.img_size[0]), net.embed_dim
            )
        config: Any = net.pretrained_cfg
        size = int(config["input_size"][-1])
        features = net.eval().forward_features(torch.zeros(1, 3, size, size))
        if features.ndim != 4 or getattr(net, "output_fmt", "NCHW") != "NCHW":
            raise RefusalError(
                f"{model} is neither a ViT with a class token, such as vit_small_patch16_224, nor a convolutional network: "
                "choose one of these"
            )
        width = net.forward_head(features, pre_logits=True).shape[1]
        return Architecture(True, size // features.shape[-1], size, int(width))


def build_backbone(model: str, kwargs: dict[str, Any], image_size: int, drop_path: float = 0.0) -> nn.Module:
    """A timm model without classifier: a ViT that takes crops of any multiple of its patch size, or a convolutional
    network whose batch normalisation keeps the statistics that it came with. Raises `RefusalError` as `architecture`."""
    common = {"pretrained": False, "num_classes": 0, "drop_path_rate": drop_path, **kwargs}
    if architecture(model).convolutional:
        net: nn.Module = timm.create_model(model, **common)
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()  # views of one batch, of two sizes, are no sample of the pictures; the teacher would differ
        return net.to(memory_format=torch.channels_last)
    vit: nn.Module = timm.create_model(model, img_size=image_size, dynamic_img_size=True, **common)
    return vit


def blocks(backbone: nn.Module) -> list[nn.Module]:
    """The parts it consists of, first to last: blocks of a ViT, stages of a convolutional network."""
    for name in ("blocks", "stages", "layers"):
        if isinstance(found := getattr(backbone, name, None), nn.Sequential | nn.ModuleList):
            return list(found)
    return [backbone]


def layers(backbone: nn.Module) -> dict[str, int]:
    """Name of each parameter → its distance from the input: 0 for what comes before the blocks, i + 1 for block i, one
    more than the last block's for what comes after."""
    if isinstance(backbone, VisionTransformer):
        depth = len(backbone.blocks)
        ids = {}
        for name, _ in backbone.named_parameters():
            first, _, rest = name.partition(".")
            ids[name] = int(rest.partition(".")[0]) + 1 if first == "blocks" else depth + 1 if first == "norm" else 0
        return ids
    net: Any = backbone
    found: dict[str, int] = group_parameters(net, net.group_matcher(coarse=True), reverse=True)
    return found


def width(backbone: nn.Module) -> int:
    """Length of what it gives for a picture."""
    return int(backbone.embed_dim if isinstance(backbone, VisionTransformer) else backbone.head_hidden_size)  # type: ignore[arg-type]


def reset_linear_layers(vit: nn.Module) -> None:
    """PyTorch's own initialisation instead of timm's truncated normal 0.02, which at small widths leaves the embeddings
    of different pictures so close together that SOP's anchors cannot tell them apart."""
    for module in vit.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()


def native_normalization(model: str) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and deviation that timm's pretrained weights of a model expect. Raises `RefusalError` where timm names none."""
    _known(model)
    known = timm.get_pretrained_cfg(model)
    if known is None or not known.mean:
        raise RefusalError(f"timm names no normalization for {model}: leave --normalization at imagenet")
    (r, g, b), (dr, dg, db) = known.mean, known.std
    return (r, g, b), (dr, dg, db)


def _known(model: str) -> None:
    if not timm.is_model(model):
        close = difflib.get_close_matches(model, timm.list_models("vit*"), n=3)
        raise RefusalError(
            f"timm has no model {model!r}" + (f"; closest: {', '.join(close)}" if close else "") + ". Or use vit_micro"
        )
    name, _, tag = model.partition(".")
    if tag and model not in (tagged := timm.list_models(f"{name}.*", pretrained=True)):
        known = f"choose one of {', '.join(tagged[:4])}, or " if tagged else ""
        raise RefusalError(f"timm has no weights {tag!r} of {name}: {known}leave the tag out")


class Student(nn.Module):
    """Backbone, mask token and head of the student."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        # Student only; overwrites the patch embedding before the position is added (spec/sop.md 1.2).
        self.mask_token = nn.Parameter(torch.zeros(1, width(backbone)))

    def forward(
        self, images: Tensor, mask: Tensor | None = None, small: Tensor | None = None, index: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Global crops [2B, 3, H, W], mask [2B, L] bool, local crops [V_l·B, 3, h, w] → head of all crops' [CLS]
        [V·B, d], head of the masked tokens [M, d], row-major. One call for all crops: DistributedDataParallel and the
        head see one batch. `index` [M] holds the masked positions in the flattened mask where the caller knows them: a GPU
        would have to wait for their number."""
        cls, patches = encode(self.backbone, images, mask, self.mask_token)
        parts = [cls]
        if small is not None:
            parts.append(encode(self.backbone, small)[0])
        if mask is not None:
            parts.append(_at(patches, mask, index))
        rows = self.head(torch.cat(parts))
        count = len(images) + (0 if small is None else len(small))
        return rows[:count].clone(), rows[count:].clone()  # no views: what shards the module works on its outputs


class Teacher(nn.Module):
    """The student's moving average: backbone and head, no gradient."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(
        self, images: Tensor, mask: Tensor | None = None, drawn: Tensor | None = None, index: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Clean images [2B, 3, H, W] → head of [CLS] [2B, d], of the tokens that `mask` [2B, L] selects [M, d], and of
        patch `drawn` [B] of each second view [B, d]. The head sees nothing else."""
        cls, patches = encode(self.backbone, images)
        if mask is None or drawn is None:
            rows = self.head(cls)
            return rows, rows[:0], rows[:0]
        second = patches[len(images) // 2 :]
        own = second[torch.arange(len(second), device=second.device), drawn]
        masked = _at(patches, mask, index)
        rows = self.head(torch.cat([cls, masked, own]))
        return rows[: len(cls)], rows[len(cls) : len(cls) + len(masked)], rows[len(cls) + len(masked) :]

    @torch.no_grad()
    def follow(self, student: Student, momentum: float, names: Sequence[str] | None = None) -> None:
        """θ_t ← m·θ_t + (1 − m)·θ_s, over what both have (not the mask token), or those of it in `names`."""
        mine, theirs = dict(self.named_parameters()), dict(student.named_parameters())
        both = [name for name in (theirs if names is None else names) if name in mine]
        torch._foreach_lerp_([mine[name] for name in both], [theirs[name] for name in both], 1.0 - momentum)


def _at(patches: Tensor, mask: Tensor, index: Tensor | None) -> Tensor:
    """Masked tokens [M, C], row-major."""
    return patches[mask] if index is None else patches.flatten(0, 1)[index]


def encode(
    backbone: nn.Module, images: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Normalised [N, 3, H, W] → what stands for each picture [N, C] and its patches [N, L, C], both after the final norm
    (registers are dropped); masked patches go in as `mask_token`. Of a convolutional network: its pooled features, and its
    last features before they are pooled."""
    if isinstance(backbone, VisionTransformer):
        all_tokens = _tokens(backbone, images, mask, mask_token)
        return all_tokens[:, 0], all_tokens[:, backbone.num_prefix_tokens :]
    assert mask is None
    images = images.contiguous(memory_format=torch.channels_last)  # as the weights are: 1.4 times as fast on CPUs
    features: Tensor = backbone.forward_features(images)  # type: ignore[operator]
    return backbone.forward_head(features, pre_logits=True), features.flatten(2).transpose(1, 2)  # type: ignore[operator]


def _tokens(vit: VisionTransformer, images: Tensor, mask: Tensor | None, mask_token: Tensor | None) -> Tensor:
    """All tokens after the final norm [N, prefix + L, C]."""
    if mask is None:
        return vit.forward_features(images)
    assert mask_token is not None
    x = vit.patch_embed(images)  # N h w C, as dynamic_img_size makes it
    x = torch.where(mask.view(*x.shape[:3], 1), mask_token.to(x.dtype), x)
    x = vit.norm_pre(vit.patch_drop(vit._pos_embed(x)))
    if vit.grad_checkpointing and torch.is_grad_enabled():
        return vit.norm(checkpoint_seq(vit.blocks, x))
    return vit.norm(vit.blocks(x))


@torch.no_grad()
def class_features(
    backbone: nn.Module,
    pixels: Tensor,
    normalise: Callable[[Tensor], Tensor],
    device: torch.device,
    chunk: int = 256,
) -> Tensor:
    """[CLS] after the final norm (or the pooled features) [M, C], float32 on the CPU, of prepared pictures uint8
    [M, H, W, 3], `chunk` at a time."""
    parts = pixels.split(chunk)
    return torch.cat([encode(backbone, normalise(part.to(device)))[0].float().cpu() for part in parts])


def load_initial(path: Path, backbone: nn.Module) -> None:
    """Load a timm state dict or a run's encoder into `backbone`; position embeddings are resized.

    Raises `RefusalError` that names the keys which do not fit.
    """
    if (path / "run.json").is_file():
        read_run(path)
        path = path / "encoder.safetensors"
    advice = "choose the matching --encoder, --patch-size and --image-size"
    try:
        backbone.load_state_dict(fit_state(read_state(path), backbone, str(path), advice))
    except RefusalError as e:
        raise RefusalError(f"--init {e}") from e


def backbone_tensors(backbone: nn.Module) -> dict[str, Tensor]:
    """What a run's weight files hold: float32 on the CPU."""
    return {name: value.detach().float().cpu().contiguous() for name, value in backbone.state_dict().items()}


def tensors_digest(tensors: dict[str, Tensor]) -> str:
    """`tensors_sha256` of torch tensors."""
    return tensors_sha256({name: value.numpy() for name, value in tensors.items()})
