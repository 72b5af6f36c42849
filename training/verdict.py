"""Do no harm: is the adapted encoder better than the trained weights that the run started from?

Two scores, both paired by picture: kNN leave-one-out with folder names as labels, where there are any, and self-retrieval
of edited pictures (`training/evaluate/label_free.py`), whose edits training does not make. Labels know what similar
means, so that they decide where they show a difference; otherwise the label-free score does; without any difference the
initial encoder stays, because indexes and thresholds that are built on it stay right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from export.bundle import Embeddings, Verdict
from export.preprocess import Pixels, PreprocessSpec, UnreadablePictureError
from training.cache import Picture
from training.encoder import VisionTransformer
from training.evaluate.edits import EDITS
from training.evaluate.label_free import compare, label_free_all
from training.presets import ViewPreset

PICTURES = 1000
QUERIES = 200
SIGNIFICANT = 1.96  # standard errors


def judge(
    initial: VisionTransformer, adapted: VisionTransformer, pictures: Sequence[Picture], spec: PreprocessSpec,
    normalise: Callable[[Tensor], Tensor], device: torch.device, labelled: tuple[float, float] | None, seed: int,
    views: ViewPreset,
) -> Verdict:  # fmt: skip
    """Compare two encoders on up to 1,000 of `pictures`. `labelled`: how far the adapted encoder's kNN is ahead of the
    initial one's, in points, with its standard error; None without labels. `views`: the preset that training used."""
    data = []
    for picture in pictures[:: -(-len(pictures) // PICTURES)]:  # spread over all folders
        try:
            data.append(picture.read())
        except UnreadablePictureError:
            continue
    embeds = {
        "initial": _embedder(initial, normalise, device),
        "adapted": _embedder(adapted, normalise, device),
    }
    # An edit that training made, too, would measure what was trained for.
    edits = {name: edit for name, edit in EDITS.items() if views != "greyscale" or name != "gamma"}
    scores = label_free_all(embeds, data, spec, seed, QUERIES, edits)
    difference = compare(scores["initial"], scores["adapted"])
    found = {
        "label_free_initial": scores["initial"].recall_at_1.mean,
        "label_free_adapted": scores["adapted"].recall_at_1.mean,
        "reciprocal_rank_difference": difference.mean_reciprocal_rank.mean,
        "reciprocal_rank_low": difference.mean_reciprocal_rank.low,
        "reciprocal_rank_high": difference.mean_reciprocal_rank.high,
    }
    said = (
        f"edited pictures find their original first {100 * found['label_free_adapted']:.1f} % of the time, before "
        f"{100 * found['label_free_initial']:.1f} % ({difference.verdict})"
    )
    if labelled is not None:
        found["knn_difference"], found["knn_standard_error"] = labelled
        said = f"kNN with folder names as labels {labelled[0]:+.1f} ± {labelled[1]:.1f} points; {said}"
    return Verdict(export=decide(difference.verdict, labelled), sentence=said, scores=found)


def decide(label_free: str, labelled: tuple[float, float] | None) -> str:
    """ "adapted" or "initial", from better, worse or no difference without labels, and points ± error with labels."""
    if labelled is not None and abs(labelled[0]) > SIGNIFICANT * labelled[1]:
        return "adapted" if labelled[0] > 0 else "initial"
    return "adapted" if label_free == "better" else "initial"


def _embedder(
    vit: VisionTransformer, normalise: Callable[[Tensor], Tensor], device: torch.device
) -> Callable[[Pixels], Embeddings]:
    @torch.no_grad()
    def embed(pixels: Pixels) -> Embeddings:
        rows = [
            vit.forward_features(normalise(part.to(device)))[:, 0].float().cpu()
            for part in torch.from_numpy(pixels).split(64)
        ]
        unit: Embeddings = F.normalize(torch.cat(rows), dim=1).numpy()
        return unit

    return embed
