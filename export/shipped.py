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
DEFAULT_NAME = "sop-mobilenetv2-1"
"""The default encoder's own name."""


def shipped() -> dict[str, Path]:
    """Names → folders, the default one first."""
    found = sorted(path.parent.name for path in ENCODERS.glob("*/manifest.json"))
    return {name: ENCODERS / name for name in sorted(found, key=lambda name: (name != DEFAULT_NAME, name))}


def bundle_folder(given: Any) -> Any:
    """The folder that a name of a shipped encoder stands for; anything else as it was given, `./NAME` as an absolute path,
    which no other reading takes for the name."""
    name = DEFAULT_NAME if str(given) == DEFAULT else str(given)
    if name in shipped():
        return ENCODERS / name
    return Path(given).absolute() if isinstance(given, str) and _is_name(Path(given)) else given


def is_shipped(folder: Path) -> bool:
    """Whether a folder is part of the package, which nothing is written into."""
    return folder.resolve().parent == ENCODERS


def run_folder(given: Any) -> Any:
    """`bundle_folder`, of the weights as a run folder."""
    folder = bundle_folder(given)
    return folder / "run" if isinstance(folder, Path) and is_shipped(folder) else folder


def bundle_flag(folder: Path) -> str:
    """How a command names the bundle, with a space before it; nothing where it takes that one by itself."""
    if is_shipped(folder):
        return "" if folder.name == DEFAULT_NAME else f" --bundle {folder.name}"
    return f" --bundle {'./' if _is_name(folder) else ''}{folder}"


def _is_name(path: Path) -> bool:
    return str(path) == DEFAULT or str(path) in shipped()


BundleFolder = Annotated[Path, BeforeValidator(bundle_folder)]
"""Of a setting: a bundle's folder, or the name of a shipped one."""


def licence(folder: Path) -> str:
    """What the model card says of the weights' terms, in one line."""
    card = folder / CARD
    text = card.read_text("utf-8") if card.is_file() else ""
    found = re.search(r"^\*\*Licence of the weights:\*\*\s*(.+?)$", text, re.MULTILINE)
    return f"{found[1] if found else 'not stated'} ({card})"
