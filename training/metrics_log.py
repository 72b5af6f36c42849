"""metrics.jsonl: one JSON object per logged step, measurement and alarm."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from export.bundle import write_file


class MetricsLog:
    """Appends lines and shows them to observers; a resume drops those after its checkpoint."""

    def __init__(self, path: Path, resumed_at: int, observers: Sequence[Callable[..., None]] = ()) -> None:
        self._path = path
        self._observers = observers
        kept = []
        for line in path.read_text().splitlines() if path.is_file() else ():
            try:
                values = json.loads(line)
            except ValueError:
                continue  # the line that a kill cut short
            # The measurement at the checkpoint is made again.
            if values["step"] < resumed_at or (values["step"] == resumed_at and "loss" in values):
                kept.append(line)
        write_file(path, "".join(line + "\n" for line in kept))

    def write(self, **values: Any) -> None:
        """Append one line."""
        with self._path.open("a") as file:
            file.write(json.dumps(values) + "\n")
        for observe in self._observers:
            observe(**values)
