"""Smaller graphs beside fp32: written where they pass their gate, never otherwise."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch

from export.bundle import Bundle, EncoderSpec, RefusalError
from export.onnx_graph import EmbeddingGraph, build_encoder, write_graph
from export.parity import Parity, ParityReport, Speed, mean_average_precision, read_parity, require_parity, table
from export.quantise import int8_recipes, store_fp16, write_int8
from export.runtime import Runtime, open_graph
from export.sample import read_sample
from likewise import main


@pytest.fixture(scope="module")
def complete(run: Path, bundle: Path, many_pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle to which int8 and fp16 were added."""
    out = shutil.copytree(bundle, tmp_path_factory.mktemp("complete") / "bundle")
    assert main(["export", str(run), "--out", str(out), "--variants", "int8,fp16", "--images", str(many_pictures)]) == 0
    return out


def test_variants_are_added_to_a_bundle(bundle: Path, complete: Path, pictures: Path) -> None:
    before, after = Bundle.open(bundle), Bundle.open(complete)
    assert after.space_id == before.space_id
    assert set(after.manifest.variants) == {"fp32", "int8", "fp16"}
    assert (complete / "model.int8.onnx").stat().st_size < 0.6 * (complete / "model.onnx").stat().st_size
    pixels = read_sample(pictures, after.manifest.preprocess).pixels
    fp32 = Runtime(after, "cpu", 1).embed(pixels)
    for name, floor in (("int8", 0.99), ("fp16", 0.999)):
        runtime = Runtime(after, "cpu", 1, name)
        rows = runtime.embed(pixels)
        assert rows.dtype == np.float32 and np.allclose(np.linalg.norm(rows, axis=1), 1, atol=2e-3)
        cosine = (rows * fp32).sum(1).min()
        assert floor < cosine < 1 - 1e-7  # another graph, the same space
        assert runtime.check_canary() >= after.manifest.variants[name].floor(runtime.provider)
    report = read_parity(after)
    assert {m.variant for m in report.measurements} == {"fp32", "int8", "fp16"}
    assert [m.pictures for m in report.measurements] == [64, 208, 208]  # fp32 was there before
    assert all(m.not_finite == 0 and m.map_loss is not None for m in report.measurements)
    assert all(len(m.speed) == 3 and m.speed[0].images_per_second > 0 for m in report.measurements)
    kinds = {node.op_type for node in onnx.load(str(complete / "model.int8.onnx")).graph.node}
    assert "MatMulInteger" in kinds


def test_what_is_there_already_is_not_made_again(run: Path, complete: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = (complete / "manifest.json").read_bytes()
    assert main(["export", str(run), "--out", str(complete), "--variants", "int8"]) == 0
    assert (complete / "manifest.json").read_bytes() == before
    assert "holds this encoder's bundle already" in capfd.readouterr().err


def test_a_variant_that_fails_its_gate_leaves_the_bundle_as_it_was(
    run: Path, bundle: Path, many_pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    refused: Callable[..., str],
) -> None:  # fmt: skip
    out = shutil.copytree(bundle, tmp_path / "bundle")

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != ".lock"}

    before = files()
    monkeypatch.setattr("export.parity.INT8_OVERLAP", 1.1)
    monkeypatch.setattr("export.parity.INT8_MAP_LOSS", -100.0)
    assert "64 pictures do not show whether int8" in refused("export", run, "--out", out, "--variants", "int8")
    sentence = refused("export", run, "--out", out, "--variants", "int8", "--images", many_pictures)
    assert "stays without int8" in sentence and "finds other neighbours" in sentence
    assert "choose another --out" in refused("export", run, "--out", out, "--opset", "23")
    assert "choose another --out" in refused("export", run, "--out", out, "--patches")
    assert files() == before


def test_a_flipped_byte_of_a_variant_is_found(complete: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(complete, tmp_path / "copy")
    data = bytearray((copy / "model.int8.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "model.int8.onnx").write_bytes(data)
    with pytest.raises(RefusalError, match=r"model\.int8\.onnx has checksum"):
        Bundle.open(copy)


def test_convolutions_are_calibrated(pictures: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    from export.bundle import EncoderSpec
    from export.preprocess import PreprocessSpec

    spec = EncoderSpec(model="resnet10t", image_size=64, embedding_dim=512, pooling="model")
    graph = EmbeddingGraph(timm.create_model("resnet10t", num_classes=0), spec).eval()
    write_graph(graph, 64, tmp_path / "m.onnx", 20)
    assert int8_recipes(tmp_path / "m.onnx") == ("static",)
    pixels = read_sample(pictures, PreprocessSpec(size=64)).pixels
    write_int8(tmp_path / "m.onnx", tmp_path / "i.onnx", "static", pixels)
    rows = open_graph(tmp_path / "i.onnx")({"images": pixels}, "embedding")
    assert (rows * graph.embed(torch.from_numpy(pixels)).numpy()).sum(1).min() > 0.97
    assert (tmp_path / "i.onnx").stat().st_size < 0.35 * (tmp_path / "m.onnx").stat().st_size


def measured(**changed: object) -> Parity:
    fields = {
        "variant": "int8", "provider": "CPUExecutionProvider", "machine": "m", "pictures": 200, "not_finite": 0,
        "minimum_cosine": 0.999, "mean_cosine": 0.9995, "maximum_difference": 0.01, "neighbor_overlap_at_1": 0.9,
        "neighbor_overlap_at_10": 0.96, "speed": [Speed(batch=1, images_per_second=10, milliseconds=100)],
        "peak_memory_mib": None,
    }  # fmt: skip
    return Parity.model_validate({**fields, **changed})


def test_the_gates() -> None:
    require_parity(measured())
    require_parity(measured(neighbor_overlap_at_10=0.9, map_loss=0.8))  # labels were given: they count
    with pytest.raises(RefusalError, match=r"overlap of at least 0\.95 or a mAP loss of at most 1 point"):
        require_parity(measured(neighbor_overlap_at_10=0.9))
    with pytest.raises(RefusalError, match=r"mAP loss 1\.20 points"):
        require_parity(measured(neighbor_overlap_at_10=0.9, map_loss=1.2))
    with pytest.raises(RefusalError, match="at least 200 are needed"):
        require_parity(measured(pictures=199, neighbor_overlap_at_10=1.0))
    with pytest.raises(RefusalError, match="not finite"):
        require_parity(measured(not_finite=3))
    require_parity(measured(variant="fp16", minimum_cosine=0.9991))
    for cosine in (0.9989, float("nan")):
        with pytest.raises(RefusalError, match=r"a cosine of at least 0\.999 is needed"):
            require_parity(measured(variant="fp16", minimum_cosine=cosine))


def test_measuring_again_replaces_what_was_measured_here() -> None:
    report = ParityReport(measurements=[measured()]).with_(measured(variant="fp16")).with_(measured(mean_cosine=0.5))
    assert [(m.variant, m.mean_cosine) for m in report.measurements] == [("fp16", 0.9995), ("int8", 0.5)]
    assert "fp16" in table(report) and "0.960" in table(report)
    assert report.with_(measured(pictures=20, mean_cosine=0.1)) == ParityReport(
        measurements=[report.measurements[0], measured(pictures=20, mean_cosine=0.1)]
    )
    well = ParityReport(measurements=[measured(pictures=1000)])
    assert well.with_(measured(pictures=300)) == well


def test_mean_average_precision_by_hand() -> None:
    rows = np.array([[1, 0], [0.9, 0.1], [0.8, 0.2], [0, 1]], np.float32)
    # The first finds the third at rank 2, the third the first at rank 1; the others have no like.
    assert mean_average_precision(rows, ["a", "b", "a", "c"]) == pytest.approx((1 / 2 + 1) / 2)
    assert mean_average_precision(rows, ["a", "a", "b", "b"]) == pytest.approx((1 + 1 + 1 / 3 + 1) / 4)


def test_weights_are_stored_in_half_the_bytes(run: Path, bundle: Path, many_pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "b"
    flags = ["--images", str(many_pictures), "--stored", "float16", "--variants", "int8"]
    assert main(["export", str(run), "--out", str(out), *flags]) == 0
    half, whole = Bundle.open(out), Bundle.open(bundle)
    assert half.graph().stat().st_size < 0.65 * whole.graph().stat().st_size
    assert half.space_id == whole.space_id and half.manifest.provenance["weights_stored_as"] == "float16"
    pixels = read_sample(many_pictures, half.manifest.preprocess).pixels[:32]
    rows, expected = (Runtime(b, "cpu", 1).embed(pixels) for b in (half, whole))
    cosine = (rows * expected).sum(1).min()
    assert cosine > 0.99999 and not np.array_equal(rows, expected)
    assert Runtime(half, "cpu", 1, "int8").check_canary() > 0.98


def test_first_layers_of_convolutional_networks_stay_whole(tmp_path: Path) -> None:
    spec = EncoderSpec(model="mobilenetv2_035", image_size=64, embedding_dim=1280, pooling="model")
    torch.manual_seed(0)
    write_graph(EmbeddingGraph(build_encoder(spec), spec).eval(), 64, tmp_path / "m.onnx", 20)
    before = (tmp_path / "m.onnx").stat().st_size
    store_fp16(tmp_path / "m.onnx")
    stored = {t.name.removesuffix("/float16"): t for t in onnx.load(str(tmp_path / "m.onnx")).graph.initializer}
    sizes = {name: np.prod(t.dims) for name, t in stored.items()}
    half = {name for name, t in stored.items() if t.data_type == onnx.TensorProto.FLOAT16}
    limit = sum(sizes.values()) / 128
    assert half and limit > 2048 and half == {name for name, size in sizes.items() if size >= limit}
    assert (tmp_path / "m.onnx").stat().st_size < 0.65 * before


def test_a_weight_that_float16_cannot_hold_is_refused(bundle: Path, tmp_path: Path) -> None:
    model = onnx.load(str(bundle / "model.onnx"))
    large = next(
        t for t in model.graph.initializer if np.prod(t.dims) >= 1024 and t.data_type == onnx.TensorProto.FLOAT
    )
    values = onnx.numpy_helper.to_array(large).copy()
    values.flat[0] = 1e5
    large.CopyFrom(onnx.numpy_helper.from_array(values, large.name))
    onnx.save(model, str(tmp_path / "m.onnx"))
    with pytest.raises(RefusalError, match="float16 ends at 65504: leave --stored"):
        store_fp16(tmp_path / "m.onnx")


def test_lanes_give_what_all_threads_together_give(bundle: Path, many_pictures: Path) -> None:
    opened = Bundle.open(bundle)
    together, lanes = Runtime(opened, "cpu", 2), Runtime(opened, "cpu", 2, lanes=2)
    pixels = read_sample(many_pictures, opened.manifest.preprocess).pixels[:37]
    expected = together.embed(pixels)
    for count in (0, 1, 2, 7, 37):
        assert np.allclose(lanes.embed(pixels[:count]), expected[:count], atol=1e-5)
    assert np.array_equal(lanes.embed(pixels), lanes.embed(pixels))  # whichever lane was free
    with ThreadPoolExecutor(6) as pool:  # beside others, too
        found = list(pool.map(lambda i: lanes.embed(pixels[i : i + 3]), range(30)))
    assert all(np.allclose(rows, expected[i : i + 3], atol=1e-5) for i, rows in enumerate(found))
