"""Pictures for the neighbour plots: random queries, and what an encoder finds nearest."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from export.preprocess import Pixels, preprocess
from training.evaluate.inputs import Inputs
from training.evaluate.ranking import top_k

SHEET = (8, 6)  # queries, neighbours


class Sheet(NamedTuple):
    """Pictures for a plot: queries with their nearest neighbours."""

    title: str
    queries: list[Pixels]
    neighbors: list[list[Pixels]]
    right: list[list[bool]] | None
    """Whether each neighbour has the query's label; None without labels."""


def neighbor_sheets(inputs: Inputs) -> list[Sheet]:
    """Random queries with their nearest pictures, per encoder; right and wrong where there are labels."""
    count, width = SHEET
    it = inputs.ranked
    if it is not None:
        queries, gallery, own = it.queries, it.gallery, it.own
        q_rows, g_rows = it.query_rows, it.gallery_rows
    else:
        queries, q_rows = inputs.plain()
        gallery, g_rows, own = queries, q_rows, np.arange(len(queries.pictures))
    chosen = np.sort(np.random.default_rng(inputs.asked.seed).permutation(len(queries.pictures))[:count])
    sheets = []
    for encoder in inputs.encoders:
        name, spec = encoder.extractor.name, encoder.extractor.spec
        found = top_k(q_rows[name][chosen], g_rows[name], width, None if own is None else own[chosen]).rows
        right = None
        if it is not None:
            right = (it.gallery_labels[found] == it.query_labels[chosen, None]).tolist()
        sheets.append(
            Sheet(
                name,
                [preprocess(queries.pictures[i].read(), spec).pixels for i in chosen],
                [[preprocess(gallery.pictures[j].read(), spec).pixels for j in row] for row in found],
                right,
            )
        )
    return sheets
