"""What the tests of the service share."""

from __future__ import annotations

from pathlib import Path

import pytest

from likewise import main


@pytest.fixture(scope="session")
def indexed(bundle: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the collection `shapes`: copy it."""
    root = tmp_path_factory.mktemp("collections")
    flags = ["--bundle", str(bundle), "--images", str(pictures), "--out", str(root / "shapes"), "--threads", "1"]
    assert main(["index", "build", *flags]) == 0
    return root
