"""Fewer dimensions inside the graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from export.bundle import Bundle, EncoderSpec, ProjectionSpec, make_space_id
from export.preprocess import PreprocessSpec
from export.projection import append_projection, fit_projection, project
from export.runtime import Runtime, open_graph
from export.sample import read_sample
from likewise import main


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def test_the_axes_are_those_of_the_pictures() -> None:
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    spread = np.array([3.0, 2.0, 1.0, *[0.01] * 9])
    rows = (rng.normal(size=(4000, 12)) * spread) @ axes.T + 5 * axes[:, 11]
    mean, matrix = fit_projection(rows.astype(np.float32), 3, 0.0)
    assert np.allclose(mean, rows.mean(0), atol=1e-4)
    directions = matrix / np.linalg.norm(matrix, axis=0)
    assert np.all(np.abs((directions * axes[:, :3]).sum(0)) > 0.999)
    assert np.allclose(np.linalg.norm(matrix, axis=0) / np.linalg.norm(matrix[:, 0]), 1)  # plain PCA
    _, half = fit_projection(rows.astype(np.float32), 3, 0.5)
    _, full = fit_projection(rows.astype(np.float32), 3, 1.0)
    assert np.allclose(((rows - rows.mean(0)) @ full).std(0) / ((rows - rows.mean(0)) @ full).std(0)[0], 1, atol=1e-3)
    lengths = np.linalg.norm(half, axis=0)
    assert np.allclose(lengths / lengths[0], (spread[:3] / spread[0]) ** -0.5, rtol=0.05)
    again, same = fit_projection(rows.astype(np.float32), 3, 0.0)
    assert np.array_equal(again, mean) and np.array_equal(same, matrix)


def test_a_bundle_gives_projected_rows(
    run: Path, bundle: Path, many_pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "b"
    flags = ["--images", str(many_pictures), "--dimensions", "16", "--whitening", "0.5", "--stored", "float16"]
    assert main(["export", str(run), "--out", str(out), *flags, "--variants", "int8"]) == 0
    plain, small = Bundle.open(bundle), Bundle.open(out)
    assert small.dim == 16 and small.space_id != plain.space_id
    found = small.manifest.encoder.projection
    assert found is not None and (found.dimensions, found.whitening, found.pictures) == (16, 0.5, 208)
    pixels = read_sample(many_pictures, small.manifest.preprocess).pixels
    rows = Runtime(plain, "cpu", 1).embed(pixels)
    expected = project(rows, *fit_projection(rows, 16, 0.5))
    given = Runtime(small, "cpu", 1).embed(pixels)
    assert given.shape == (208, 16) and np.allclose(np.linalg.norm(given, axis=1), 1, atol=1e-5)
    assert float((given * expected).sum(1).min()) > 0.9999
    assert Runtime(small, "cpu", 1, "int8").check_canary() > 0.9
    capsys.readouterr()
    assert main(["bundle", "show", str(out)]) == 0
    assert "16 dimensions, pooling cls → PCA of 208 pictures, whitening 0.5" in capsys.readouterr().out
    # The same flags again find the same axes: nothing is made twice.
    assert main(["export", str(run), "--out", str(out), *flags]) == 0


@pytest.mark.parametrize("opset", [17, 20])
def test_graphs_of_older_opsets_are_projected(opset: int, tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["embedding"]), helper.make_node("Neg", ["embedding"], ["other"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 6])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 6]) for n in ("embedding", "other")],
    )  # fmt: skip
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), str(path))
    rng = np.random.default_rng(1)
    rows = unit(rng.normal(size=(9, 6)))
    mean, matrix = rng.normal(size=6).astype(np.float32), rng.normal(size=(6, 2)).astype(np.float32)
    append_projection(path, mean, matrix)
    given = open_graph(path)
    assert np.allclose(given({"x": rows}, "embedding"), project(rows, mean, matrix), atol=1e-6)
    assert np.allclose(given({"x": rows}, "other"), -rows)  # what else used it is as it was


def test_what_cannot_be_projected_is_refused(
    run: Path, pictures: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    start = ["export", run, "--out", tmp_path / "b", "--dimensions"]
    assert "is not below the encoder's 64: leave it out" in refused(*start, 64)
    assert "64 readable pictures, 32 dimensions need 128" in refused(*start, 32)
    assert "leave --patches out" in refused(*start, 8, "--patches")
    assert not (tmp_path / "b").exists()


def test_spaces_without_a_projection_keep_their_names() -> None:
    spec = EncoderSpec(model="m", image_size=32, embedding_dim=8)
    prepared = PreprocessSpec(size=32)
    assert make_space_id(spec, "0" * 64, prepared) == "lw1-585ad3eb52cfeb5b336c62227d590e76"
    some = ProjectionSpec(dimensions=8, whitening=0.0, pictures=100, sha256="1" * 64)
    assert (
        make_space_id(spec.model_copy(update={"projection": some}), "0" * 64, prepared)
        != "lw1-585ad3eb52cfeb5b336c62227d590e76"
    )
