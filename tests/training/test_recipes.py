"""The recipes in runs/: their pieces, and the whole of the pretraining recipe at small size."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from export.bundle import Bundle, read_run
from export.weights import read_state
from likewise import main
from tests.conftest import TINY

ROOT = Path(__file__).resolve().parents[2]


def shards(run: Path, out: Path, mib: str) -> None:
    subprocess.run([sys.executable, "-m", "runs.fp16_shards", str(run), str(out), "--mib", mib], cwd=ROOT, check=True)


def test_an_encoder_travels_in_shards(run: Path, pictures: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    shards(run, tmp_path / "s", "0.15")
    files = sorted((tmp_path / "s").iterdir())
    assert len(files) > 1 and max(file.stat().st_size for file in files) <= 0.15 * 2**20
    whole, state = load_file(run / "encoder.safetensors"), read_state(tmp_path / "s")
    assert all(torch.equal(state[name], value.half().float()) for name, value in whole.items())
    flags = ["train", str(pictures), "--out", str(tmp_path / "r"), "--steps", "0", *TINY, "--init", str(tmp_path / "s")]
    assert main(flags) == 0
    assert torch.equal(load_file(tmp_path / "r/encoder.safetensors")["norm.weight"], state["norm.weight"])
    files[1].unlink()
    assert "copy them again" in refused(*flags[:3], tmp_path / "r2", *flags[4:])
    assert "no folder of weights" in refused(*flags[:3], tmp_path / "r2", *flags[4:-1], pictures)


@pytest.mark.slow
def test_the_recipe_runs_in_slices(many_pictures: Path, tmp_path: Path) -> None:
    def go(**settings: str) -> int:
        env = os.environ | {"LIKEWISE": str(Path(sys.executable).with_name("likewise")), "SMALL": "1", **settings}
        command = ["bash", str(ROOT / "runs/likewise_ti.sh"), str(tmp_path / "ti"), str(many_pictures)]
        return subprocess.run(command, env=env, check=False).returncode

    assert go(MINUTES="0") == 75
    assert go(STEPS1="12", STEPS2="4") == 0
    assert (
        read_run(tmp_path / "ti/stage1").steps_done == 12 and read_run(tmp_path / "ti/stage1").config["mim_weight"] == 1
    )
    assert (
        read_run(tmp_path / "ti/stage2").steps_done == 4 and read_run(tmp_path / "ti/stage2").encoder.image_size == 48
    )
    assert Bundle.open(tmp_path / "ti/bundle").manifest.provenance["weights_stored_as"] == "float16"
    assert len(list((tmp_path / "ti/fp16").iterdir())) == 1
    assert go(STEPS1="12", STEPS2="4") == 0  # nothing left to do
