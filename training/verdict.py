"""Do no harm: is the adapted encoder better than the trained weights that the run started from?

Two scores, both paired by picture: retrieval, leave-one-out, with folder names as labels, where there are any, and
self-retrieval of edited pictures (`training/evaluate/label_free.py`), whose edits training does not make. Labels know what
similar means, so that they decide where they show a difference; otherwise the label-free score does; without any
difference the initial encoder stays, because indexes and thresholds that are built on it stay right. Retrieval is judged
by mean average precision: kNN, which asks for the nearest pictures only, hardly notices harm where pictures come in
bursts (measured, docs/lab-log.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.bundle import Embeddings, Verdict
from export.edits import EDITS
from export.preprocess import Pixels, PreprocessSpec, UnreadablePictureError
from export.sources.picture import Picture
from training.encoder import class_features
from training.evaluate.label_free import compare, label_free_all
from training.evaluate.metrics import Interval, bootstrap
from training.evaluate.retrieval import Labels, retrieve
from training.presets import ViewPreset

PICTURES = 1000
QUERIES = 200


def judge(
    initial: nn.Module, adapted: nn.Module, pictures: Sequence[Picture], spec: PreprocessSpec,
    normalise: Callable[[Tensor], Tensor], device: torch.device, sample: Pixels, labels: Labels | None, seed: int,
    views: ViewPreset,
) -> Verdict:  # fmt: skip
    """Compare two encoders without labels on up to 1,000 of `pictures`, and on `sample` [M, S, S, 3] with `labels` [M]
    where there are any. `views`: the preset that training used."""
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
    labelled = _labelled(embeds, sample, labels, seed)
    if labelled is not None:
        precisions, interval = labelled
        found |= {f"mean_average_precision_{name}": value for name, value in precisions.items()}
        found |= {"mean_average_precision_low": interval.low, "mean_average_precision_high": interval.high}
        said = (
            f"mean average precision with folder names as labels {100 * precisions['adapted']:.1f} %, before "
            f"{100 * precisions['initial']:.1f} % ({_named(interval)}); {said}"
        )
    if labelled is None:
        said += "; without labels nothing tells whether the neighbours of other pictures mean more"
    known = "no difference" if labelled is None else _named(labelled[1])
    return Verdict(export=decide(difference.verdict, known), sentence=said, scores=found)


def decide(label_free: str, labelled: str) -> Literal["initial", "adapted"]:
    """Which encoder, from better, worse or no difference without and with labels."""
    decisive = label_free if labelled == "no difference" else labelled
    return "adapted" if decisive == "better" else "initial"


def _labelled(
    embeds: dict[str, Callable[[Pixels], Embeddings]], sample: Pixels, labels: Labels | None, seed: int
) -> tuple[dict[str, float], Interval] | None:
    """Mean average precision of both encoders, and the difference's interval; None where no label has two pictures."""
    if labels is None or len(np.unique(labels)) == len(labels):
        return None
    found = {}
    for name, embed in embeds.items():
        rows = embed(sample)
        found[name] = retrieve(rows, labels, rows, labels, np.arange(len(labels)))
    difference = found["adapted"].precisions - found["initial"].precisions
    means = {name: it.mean_average_precision for name, it in found.items()}
    return means, bootstrap(difference, seed)


def _named(difference: Interval) -> str:
    if difference.low > 0:
        return "better"
    return "worse" if difference.high < 0 else "no difference"


def _embedder(
    backbone: nn.Module, normalise: Callable[[Tensor], Tensor], device: torch.device
) -> Callable[[Pixels], Embeddings]:
    def embed(pixels: Pixels) -> Embeddings:
        features = class_features(backbone, torch.from_numpy(pixels), normalise, device, 64)
        unit: Embeddings = F.normalize(features, dim=1).numpy()
        return unit

    return embed
