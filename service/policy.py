"""What the indexes of a collection must keep to."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from export.bundle import Contract


class IndexPolicy(Contract):
    """What the indexes of a collection must keep to."""

    index: str = "auto"
    """auto: chosen from the constraints below. exact: every row is compared. Or a FAISS factory string, such as
    IVF1024,SQ8 or HNSW32."""
    max_memory: int | None = Field(None, gt=0)
    """Most bytes of the indexes of all rows, where they are wholly in memory."""
    min_recall: float = Field(0.95, gt=0, le=1)
    """Recall@10 against exact search that a search has to reach."""
    max_latency_ms: float | None = Field(None, gt=0)
    """Most milliseconds of one query alone, in one segment."""
    vectors: Literal["float32", "float16"] = "float32"
    """How vectors are stored; float16 takes half the disk and moves scores by up to 0.001."""
