"""The encoders that come with the package: used where no bundle is named, and what `train --init default` starts from.

    export/encoders/NAME/
        CARD.md              the model card: data, licences, method, results, limits
        manifest.json, …     a bundle (`export/bundle.py`)
        run/                 run.json and encoder.safetensors, in half precision: the weights, to adapt them

A name may be given wherever a bundle or a run may; `./NAME` is a folder of that name.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

ENCODERS = Path(__file__).resolve().parent / "encoders"
DEFAULT = "default"
"""Stands for the best of them. Other versions of likewise may ship another one: a collection keeps the name of its space."""
CARD = "CARD.md"
CHOSEN = "sop-mobilenetv2-1"
"""The default encoder's own name."""


def shipped() -> dict[str, Path]:
    """Names → folders, the default one first."""
    found = sorted(path.parent.name for path in ENCODERS.glob("*/manifest.json"))
    return {name: ENCODERS / name for name in sorted(found, key=lambda name: (name != CHOSEN, name))}


def bundle_folder(given: Any) -> Any:
    """The folder that a name of a shipped encoder stands for; anything else as it was given."""
    name = CHOSEN if str(given) == DEFAULT else str(given)
    return ENCODERS / name if name in shipped() else given


def is_shipped(folder: Path) -> bool:
    """Whether a folder is part of the package, which nothing is written into."""
    return folder.resolve().parent == ENCODERS


def run_folder(given: Any) -> Any:
    """`bundle_folder`, of the weights as a run folder."""
    folder = bundle_folder(given)
    return given if folder is given else folder / "run"


def flag(folder: Path) -> str:
    """How a command names the bundle, with a space before it; nothing where it takes that one by itself."""
    if not is_shipped(folder):
        return f" --bundle {folder}"
    return "" if folder.name == CHOSEN else f" --bundle {folder.name}"


BundleFolder = Annotated[Path, BeforeValidator(bundle_folder)]
"""Of a setting: a bundle's folder, or the name of a shipped one."""


def licence(folder: Path) -> str:
    """What the model card says of the weights' terms, in one line."""
    found = re.search(r"^\*\*Licence of the weights:\*\*\s*(.+?)$", (folder / CARD).read_text(), re.MULTILINE)
    return found[1] if found else f"see {CARD}"
