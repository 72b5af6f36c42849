"""`likewise bundle show | verify | diff`."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from export.bundle import Bundle
from export.parity import read_parity
from likewise import main


@pytest.fixture
def mine(run: Path, bundle: Path, many_pictures: Path, tmp_path: Path) -> Path:
    out = shutil.copytree(bundle, tmp_path / "bundle")
    flags = ["--variants", "int8", "--images", str(many_pictures)]
    assert main(["export", str(run), "--out", str(out), *flags]) == 0
    return out


def test_show_says_what_it_is(mine: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    assert main(["bundle", "show", str(mine)]) == 0
    said = capfd.readouterr().out
    manifest = Bundle.open(mine).manifest
    for what in (manifest.space_id, "32 px → 64 dimensions, pooling cls", "crop to 32", "run, sop, 3 steps on 64 pictures",
                 "model.int8.onnx", "CPUExecutionProvider", "overlap@1"):  # fmt: skip
        assert what in said
    assert main(["bundle", "show", str(mine), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["space_id"] == manifest.space_id


def test_verify_measures_every_graph_here(
    mine: Path, many_pictures: Path, capfd: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    space, before = Bundle.open(mine).space_id, read_parity(Bundle.open(mine))
    (mine / "parity.json").unlink()
    (mine / "parity.png").unlink()  # export had drawn it
    capfd.readouterr()
    assert main(["bundle", "verify", str(mine), "--images", str(many_pictures), "--device", "cpu"]) == 0
    said = capfd.readouterr().err
    assert "files match their checksums" in said and "faithful on this machine" in said
    cosine = re.search(r"fp32 on CPUExecutionProvider: canary cosine ([\d.]+)", said)
    assert cosine and float(cosine[1]) > 0.999999 and "int8 on CPUExecutionProvider" in said
    (found,) = read_parity(Bundle.open(mine)).measurements
    with Image.open(mine / "parity.png") as picture:
        assert picture.width > 2 * picture.height > 200
    (stored,) = [m for m in before.measurements if m.variant == "int8"]
    assert found.variant == "int8"
    assert found.neighbor_overlap_at_10 == pytest.approx(stored.neighbor_overlap_at_10, abs=0.02)
    assert Bundle.open(mine).space_id == space
    data = bytearray((mine / "canary" / "0.jpg").read_bytes())
    data[-20] ^= 1
    (mine / "canary" / "0.jpg").write_bytes(data)
    assert "canary/0.jpg has checksum" in refused("bundle", "verify", mine)


def test_diff_names_what_differs(
    mine: Path, bundle: Path, other_bundle: Path, run: Path, pictures: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main(["export", str(run), "--out", str(tmp_path / "p"), "--pooling", "cls+mean"]) == 0
    capfd.readouterr()

    def diff(one: Path, other: Path, *flags: str) -> str:
        assert main(["bundle", "diff", str(one), str(other), *flags]) == 0
        return capfd.readouterr().out

    assert "nothing else differs" in diff(bundle, bundle)
    said = diff(bundle, mine)
    assert "the same space" in said and "graph.int8: None → " in said
    said = diff(bundle, other_bundle, "--images", str(pictures))
    assert "may not be compared" in said and "weights: " in said and "chance 15.9 %" in said
    said = diff(bundle, tmp_path / "p", "--images", str(pictures))
    assert "encoder.pooling: cls → cls+mean" in said and "encoder.embedding_dim: 64 → 128" in said
    assert "100.0 % share the nearest" in diff(bundle, bundle, "--images", str(pictures))
