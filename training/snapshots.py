"""What the report shows of a run's embeddings: neighbours of fixed queries and patch similarities at several steps.

run/report/
    step-00000030.safetensors   rows, cosines [Q, 6]; maps [4, 2, h, w]
    pictures.safetensors        queries [Q]; seen [n], thumbnails uint8 [n, s, s, 3], labels [n] of what the steps show
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as save_safetensors
from torch import Tensor

from export.bundle import RefusalError, make_folder, write_file
from training.encoder import Teacher, encode
from training.statistics import nearest

FOLDER = "report"
QUERIES, SHOWN, MAPS, THUMBNAIL = 12, 6, 4, 64


class NeighbourSheet(NamedTuple):
    """One step's neighbours and maps; rows are indices into the sample."""

    step: int
    rows: Tensor
    """[Q, 6] int64, the nearest other pictures, best first."""
    cosines: Tensor
    """[Q, 6]."""
    maps: Tensor
    """[MAPS, 2, h, w] in −1…1: cosine of each patch token with [CLS], and with the central patch, of every third query."""


class SeenPictures(NamedTuple):
    """Thumbnails of the pictures in the sheets."""

    queries: list[int]
    thumbnails: dict[int, Tensor]
    """Index in the sample → uint8 [s, s, 3]."""
    labels: dict[int, int]
    """Index in the sample → label; empty without labels."""


class Snapshots:
    """Writes sheets of a fixed sample: pictures uint8 [M, S, S, 3], labels [M] or None."""

    def __init__(self, run: Path, pictures: Tensor, labels: Tensor | None, resumed_at: int = 0) -> None:
        self._folder = run / FOLDER
        self._pictures, self._labels = pictures, labels
        self.queries = torch.linspace(0, len(pictures) - 1, min(QUERIES, len(pictures))).long()
        self.mapped = self.queries[:: QUERIES // MAPS]
        """Whose patch similarities the report shows."""
        make_folder(self._folder)
        for path in self._folder.glob("step-*.safetensors"):
            if _step(path) > resumed_at:  # of steps that a kill undid
                path.unlink()

    def write(self, step: int, features: Tensor, maps: Tensor) -> None:
        """Store the neighbours of the queries by `features` [M, C], and `maps` [MAPS, 2, h, w]."""
        u = F.normalize(features.float(), dim=1)
        if not bool(torch.isfinite(u).all()):
            return  # the alarms say so
        near = nearest(u, SHOWN)
        sheet = {
            "rows": near.rows[self.queries].to(torch.int32).contiguous(),
            "cosines": near.cosine[self.queries].contiguous(),
            "maps": maps.float().contiguous(),
        }
        shown = [sheet["rows"].flatten().long(), self.queries]
        shown += [load_file(path)["rows"].flatten().long() for path in self._folder.glob("step-*.safetensors")]
        seen = torch.cat(shown).unique()
        small = self._pictures[seen].permute(0, 3, 1, 2).float()
        side = min(THUMBNAIL, small.shape[-1])
        small = F.interpolate(small, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
        stored = {
            "queries": self.queries,
            "seen": seen,
            "thumbnails": small.round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous(),
        }
        if self._labels is not None:
            stored["labels"] = self._labels[seen].contiguous()
        # The pictures first: a reader of a live or killed run finds those of every sheet.
        write_file(self._folder / "pictures.safetensors", save_safetensors(stored))
        write_file(self._folder / f"step-{step:08d}.safetensors", save_safetensors(sheet))


def patch_similarity(teacher: Teacher, images: Tensor) -> Tensor:
    """Cosines of the patch tokens with [CLS] and with the central patch token: normalised images [n, 3, H, W] →
    [n, 2, h, w] float32 on the CPU. Not attention weights, which fused attention does not expose."""
    with torch.no_grad():
        cls, patches = encode(teacher.backbone, images)
    if cls.shape[1] != patches.shape[2]:  # some convolutional networks widen what they have pooled
        cls = patches.mean(1)
    cls, patches = F.normalize(cls.float(), dim=1), F.normalize(patches.float(), dim=2)
    rows = round((patches.shape[1] * images.shape[-2] / images.shape[-1]) ** 0.5)
    columns = patches.shape[1] // rows
    centre = patches[:, rows // 2 * columns + columns // 2]
    both = torch.stack([patches @ cls[:, :, None], patches @ centre[:, :, None]], 1)
    return both.view(len(images), 2, rows, columns).cpu()


def read_snapshots(run: Path) -> tuple[list[NeighbourSheet], SeenPictures]:
    """The stored sheets in order of steps, and their pictures; both empty where there are none.

    Raises `RefusalError` for a damaged file.
    """
    folder = run / FOLDER
    found = []
    path = folder / "pictures.safetensors"
    if not path.is_file():
        return [], SeenPictures([], {}, {})
    try:
        stored = load_file(path)
        for path in sorted(folder.glob("step-*.safetensors")):
            sheet = load_file(path)
            found.append(NeighbourSheet(_step(path), sheet["rows"].long(), sheet["cosines"], sheet["maps"]))
    except (SafetensorError, KeyError) as e:
        raise RefusalError(
            f"{path} cannot be read ({e}): it is damaged; remove {folder} to write the report without"
        ) from e
    seen = stored["seen"].tolist()
    labels = dict(zip(seen, stored["labels"].tolist(), strict=True)) if "labels" in stored else {}
    return found, SeenPictures(stored["queries"].tolist(), dict(zip(seen, stored["thumbnails"], strict=True)), labels)


def _step(path: Path) -> int:
    return int(path.stem.partition("-")[2])
