"""A tiny run, bundle and collection, made once per test session by the real commands."""

from __future__ import annotations

import io
import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["GRPC_VERBOSITY"] = "NONE"

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from likewise import main
from tests.shapes import write_shapes

TINY = ["--encoder", "vit_nano", "--image-size", "32", "--patch-size", "8", "--threads", "1", "--device", "cpu"]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 drawn shapes in 8 folders."""
    return write_shapes(tmp_path_factory.mktemp("data") / "pictures", 64)


@pytest.fixture(scope="session")
def many_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """208 drawn shapes: enough for what goes by neighbours."""
    return write_shapes(tmp_path_factory.mktemp("data") / "many", 208, seed=3)


@pytest.fixture(scope="session")
def run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps."""
    out = tmp_path_factory.mktemp("run") / "run"
    assert main(["train", str(pictures), "--out", str(out), "--steps", "3", *TINY]) == 0
    return out


@pytest.fixture(scope="session")
def bundle(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its bundle."""
    out = tmp_path_factory.mktemp("bundle") / "bundle"
    assert main(["export", str(run), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def other_bundle(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of another space."""
    folder = tmp_path_factory.mktemp("other")
    flags = ["--steps", "0", "--seed", "7", *TINY]
    assert main(["train", str(pictures), "--out", str(folder / "run"), *flags]) == 0
    assert main(["export", str(folder / "run"), "--out", str(folder / "bundle")]) == 0
    return folder / "bundle"


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    """Run a command that must be refused with exit code 1 and one sentence; returns the sentence."""

    def call(*arguments: object) -> str:
        capfd.readouterr()
        assert main([str(a) for a in arguments]) == 1
        captured = capfd.readouterr().err
        lines = [line for line in captured.splitlines() if line.startswith("likewise: ")]
        assert len(lines) == 1, captured
        assert "Traceback" not in captured
        return lines[0]

    yield call


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Send this process SIGTERM, once, before a training step."""
    from training.learner import Learner

    def arm(number: int) -> None:
        step, stops = Learner.step, {number}

        def interrupted(self: Learner, batch: Any, number: int) -> Any:
            if number in stops:
                stops.clear()
                os.kill(os.getpid(), signal.SIGTERM)
            return step(self, batch, number)

        monkeypatch.setattr(Learner, "step", interrupted)

    return arm


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    """The image as a file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """A random RGB picture, smooth enough to survive JPEG."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)
