"""The encoder: a timm ViT whose student side can hide patches behind a mask token."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from export.bundle import RefusalError, read_run, tensors_sha256
from export.weights import fit_state, read_state


def build_vit(model: str, kwargs: dict[str, Any], image_size: int, drop_path: float = 0.0) -> VisionTransformer:
    """A timm ViT without classifier, that takes crops of any multiple of its patch size.

    Raises `RefusalError` for names timm lacks and for models that are no ViT.
    """
    _known(model)
    vit = timm.create_model(
        model, pretrained=False, num_classes=0, img_size=image_size, dynamic_img_size=True,
        drop_path_rate=drop_path, **kwargs,
    )  # fmt: skip
    if not isinstance(vit, VisionTransformer) or vit.cls_token is None:
        raise RefusalError(f"{model} is not a ViT with a class token: SOP needs one, such as vit_small_patch16_224")
    return vit


def reset_linear_layers(vit: VisionTransformer) -> None:
    """PyTorch's own initialisation instead of timm's truncated normal 0.02, which at small widths leaves the embeddings
    of different pictures so close together that SOP's anchors cannot tell them apart."""
    for module in vit.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()


def native_sizes(model: str) -> tuple[int, int, int]:
    """Patch size, input size and width that a timm ViT has by default."""
    _known(model)
    with torch.device("meta"):
        vit = timm.create_model(model, pretrained=False, num_classes=0)
    if not isinstance(vit, VisionTransformer):
        raise RefusalError(f"{model} is not a ViT: SOP needs one, such as vit_small_patch16_224")
    return int(vit.patch_embed.patch_size[0]), int(vit.patch_embed.img_size[0]), int(vit.embed_dim)


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

    def __init__(self, vit: VisionTransformer, head: nn.Module) -> None:
        super().__init__()
        self.vit = vit
        self.head = head
        # Student only; overwrites the patch embedding before the position is added (spec/sop.md 1.2).
        self.mask_token = nn.Parameter(torch.zeros(1, vit.embed_dim))

    def forward(
        self, images: Tensor, mask: Tensor | None = None, small: Tensor | None = None, index: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Global crops [2B, 3, H, W], mask [2B, L] bool, local crops [V_l·B, 3, h, w] → head of all crops' [CLS]
        [V·B, d], head of the masked tokens [M, d], row-major. One call for all crops: DistributedDataParallel and the
        head see one batch. `index` [M] holds the masked positions in the flattened mask where the caller knows them: a GPU
        would have to wait for their number."""
        cls, patches = split_tokens(self.vit, tokens(self.vit, images, mask, self.mask_token))
        parts = [cls]
        if small is not None:
            parts.append(split_tokens(self.vit, tokens(self.vit, small))[0])
        if mask is not None:
            parts.append(_at(patches, mask, index))
        rows = self.head(torch.cat(parts))
        count = len(images) + (0 if small is None else len(small))
        return rows[:count].clone(), rows[count:].clone()  # no views: what shards the module works on its outputs


class Teacher(nn.Module):
    """The student's moving average: backbone and head, no gradient."""

    def __init__(self, vit: VisionTransformer, head: nn.Module) -> None:
        super().__init__()
        self.vit = vit
        self.head = head
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(
        self, images: Tensor, mask: Tensor | None = None, drawn: Tensor | None = None, index: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Clean images [2B, 3, H, W] → head of [CLS] [2B, d], of the tokens that `mask` [2B, L] selects [M, d], and of
        patch `drawn` [B] of each second view [B, d]. The head sees nothing else."""
        cls, patches = split_tokens(self.vit, tokens(self.vit, images))
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


def tokens(
    vit: VisionTransformer, images: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None
) -> Tensor:
    """All tokens after the final norm [N, prefix + L, C]; masked patches are replaced by `mask_token`."""
    if mask is None:
        return vit.forward_features(images)
    assert mask_token is not None
    x = vit.patch_embed(images)  # N h w C, as dynamic_img_size makes it
    x = torch.where(mask.view(*x.shape[:3], 1), mask_token.to(x.dtype), x)
    x = vit.norm_pre(vit.patch_drop(vit._pos_embed(x)))
    if vit.grad_checkpointing and torch.is_grad_enabled():
        return vit.norm(checkpoint_seq(vit.blocks, x))
    return vit.norm(vit.blocks(x))


def split_tokens(vit: VisionTransformer, all_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """[N, prefix + L, C] → [CLS] [N, C] and patches [N, L, C] (registers are dropped)."""
    return all_tokens[:, 0], all_tokens[:, vit.num_prefix_tokens :]


@torch.no_grad()
def class_features(
    vit: VisionTransformer,
    pixels: Tensor,
    normalise: Callable[[Tensor], Tensor],
    device: torch.device,
    chunk: int = 256,
) -> Tensor:
    """[CLS] after the final norm [M, C], float32 on the CPU, of prepared pictures uint8 [M, H, W, 3], `chunk` at a time."""
    parts = pixels.split(chunk)
    return torch.cat([vit.forward_features(normalise(part.to(device)))[:, 0].float().cpu() for part in parts])


def load_initial(path: Path, vit: VisionTransformer) -> None:
    """Load a timm state dict or a run's encoder into `vit`; position embeddings are resized.

    Raises `RefusalError` that names the keys which do not fit.
    """
    if path.is_dir():
        read_run(path)
        path = path / "encoder.safetensors"
    advice = "choose the matching --encoder, --patch-size and --image-size"
    try:
        vit.load_state_dict(fit_state(read_state(path), vit, str(path), advice))
    except RefusalError as e:
        raise RefusalError(f"--init {e}") from e


def backbone_tensors(vit: nn.Module) -> dict[str, Tensor]:
    """What a run's weight files hold: float32 on the CPU."""
    return {name: value.detach().float().cpu().contiguous() for name, value in vit.state_dict().items()}


def tensors_digest(tensors: dict[str, Tensor]) -> str:
    """`tensors_sha256` of torch tensors."""
    return tensors_sha256({name: value.numpy() for name, value in tensors.items()})
