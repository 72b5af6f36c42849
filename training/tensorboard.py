"""metrics.jsonl's numbers as TensorBoard scalars in run/tensorboard/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from export.bundle import RefusalError, make_folder


class TensorBoardWriter:
    """Writes the numbers of each metrics line; what a resume undoes is purged (`purge_step`).

    Raises `RefusalError` where the package tensorboard is not installed.
    """

    def __init__(self, run: Path, resumed_at: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as e:
            raise RefusalError(
                "TensorBoard output was asked for, but the package tensorboard is missing: pip install 'likewise[train]'"
            ) from e
        make_folder(run / "tensorboard")
        # Purging starts at the step after the checkpoint: its own measurement is written again.
        again = any((run / "tensorboard").iterdir())
        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=resumed_at + 1 if again else None)

    def write(self, **values: Any) -> None:
        """One line of metrics.jsonl: scalars under health/ or train/ at its `step`; alarms as text."""
        step = int(values["step"])
        group = "health" if values.get("health") else "train"
        for name, value in values.items():
            if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                self._writer.add_scalar(f"{group}/{name.replace(' ', '_')}", value, step)
        if "alarm" in values:
            self._writer.add_text("alarms", str(values["alarm"]), step)
        self._writer.flush()

    def close(self) -> None:
        """End the file."""
        self._writer.close()
