"""A bundle is whole, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file

from export.bundle import (
    Bundle,
    BundleManifest,
    Embeddings,
    RefusalError,
    changing,
    make_space_id,
    read_run,
    tensors_sha256,
)
from export.machine import cpu_quota
from export.onnx_graph import EmbeddingGraph, load_encoder
from export.parity import ParityReport, measure_parity, neighbor_overlap, require_parity
from export.preprocess import Pixels, find_pictures, preprocess
from export.runtime import Runtime
from likewise import main
from tests.shapes import write_shapes


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(bundle, tmp_path / "copy")


def network(run: Path) -> EmbeddingGraph:
    return load_encoder(read_run(run).encoder, load_file(run / "encoder.safetensors"), str(run))


def embedder(run: Path) -> Callable[[Pixels], Embeddings]:
    graph = network(run)
    return lambda pixels: graph.embed(torch.from_numpy(pixels)).numpy()


def edit(folder: Path, **values: object) -> None:
    """Change the manifest and keep its own checksum right."""
    manifest = BundleManifest.model_validate_json((folder / "manifest.json").read_bytes()).model_copy(update=values)
    (folder / "manifest.json").write_text(manifest.sealed().model_dump_json())


def test_the_graph_is_one_file_with_a_named_batch(bundle: Path) -> None:
    model = onnx.load(str(bundle / "model.onnx"))
    (given,), (result,) = model.graph.input, model.graph.output
    assert given.name == "images" and given.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [d.dim_param or d.dim_value for d in given.type.tensor_type.shape.dim] == ["batch", 32, 32, 3]
    assert result.name == "embedding" and result.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert not {n.op_type for n in model.graph.node} & {"If", "Loop"}
    files = {p.name for p in bundle.iterdir()} - {
        "machine.json",
        ".lock",
    }  # of whoever opened it, or added to it, since
    assert files == {"model.onnx", "manifest.json", "parity.json", "parity.png", "canary"}


def test_the_runtime_gives_what_torch_gives(run: Path, bundle: Path, pictures: Path) -> None:
    opened = Bundle.open(bundle)
    pixels = np.stack(
        [preprocess(p.path.read_bytes(), opened.manifest.preprocess).pixels for p in find_pictures(pictures)]
    )
    expected = network(run).embed(torch.from_numpy(pixels)).numpy()
    runtime = Runtime(opened, "cpu", 1)
    for size in (1, 3, 64):
        got = runtime.embed(pixels[:size])
        assert got.dtype == np.float32 and got.shape == (size, 64)
        assert np.abs(got - expected[:size]).max() < 1e-5
        assert np.allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)
    assert runtime.embed(pixels[:0]).shape == (0, 64)
    (stored,) = ParityReport.model_validate_json((bundle / "parity.json").read_bytes()).measurements
    assert stored.minimum_cosine >= 0.99999 and stored.neighbor_overlap_at_10 == 1.0 and stored.pictures == 64


def test_a_canary_may_be_made_of_other_pictures(
    run: Path, bundle: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    others = write_shapes(tmp_path / "others", 8, seed=11)
    flags = ["export", run, "--canary", others]
    assert main([str(a) for a in [*flags, "--out", tmp_path / "b"]]) == 0
    mine = Bundle.open(tmp_path / "b")
    assert [p.file for p in mine.manifest.canary] == [f"canary/{i}.png" for i in range(4)]
    assert not {p.pixels_sha256 for p in mine.manifest.canary} & {
        p.pixels_sha256 for p in Bundle.open(bundle).manifest.canary
    }
    assert mine.space_id == Bundle.open(bundle).space_id and Runtime(mine, "cpu", 1).check_canary() > 0.9999
    assert "with a canary of its own: remove it first" in refused(*flags, "--out", tmp_path / "b")
    for path in list(others.rglob("*.png"))[3:]:
        path.unlink()
    assert "at least 4 are needed to make a canary of them" in refused(*flags, "--out", tmp_path / "c")


def test_parity_refuses_another_network(run: Path, other_bundle: Path, pictures: Path) -> None:
    opened = Bundle.open(other_bundle)
    pixels = np.stack(
        [preprocess(p.path.read_bytes(), opened.manifest.preprocess).pixels for p in find_pictures(pictures)]
    )
    parity = measure_parity(embedder(run), Runtime(opened, "cpu", 1), pixels)
    assert parity.minimum_cosine < 0.999 and parity.neighbor_overlap_at_10 < 0.9
    with pytest.raises(RefusalError, match="no bundle was written"):
        require_parity(parity)
    with pytest.raises(RefusalError):
        require_parity(parity.model_copy(update={"minimum_cosine": float("nan")}))


def test_an_export_that_fails_its_gate_leaves_nothing(
    run: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.parity.MIN_COSINE", {"fp32": 1.5})  # a gate that nothing passes
    assert "no bundle was written" in refused("export", run, "--out", tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["model.onnx", "manifest.json", "canary/0.jpg", "canary/3.png"])
def test_a_flipped_byte_is_found(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(RefusalError, match=r"checksum|damaged|cannot be read|format") as caught:
        Bundle.open(copy)
    assert name in str(caught.value)


def test_measurements_are_outside_every_hash(copy: Path) -> None:
    space = Bundle.open(copy).space_id
    (copy / "parity.json").write_text("{}")
    assert Bundle.open(copy).space_id == space


def test_missing_files_and_foreign_folders(copy: Path, tmp_path: Path) -> None:
    (copy / "model.onnx").unlink()
    with pytest.raises(RefusalError, match="missing though the manifest names it"):
        Bundle.open(copy)
    with pytest.raises(RefusalError, match="is not a bundle"):
        Bundle.open(tmp_path)
    fields = json.loads((copy / "manifest.json").read_bytes())
    (copy / "manifest.json").write_text(json.dumps({**fields, "format_version": 99}))
    with pytest.raises(RefusalError, match="format 99, this version of likewise reads format 2"):
        Bundle.open(copy)
    (copy / "manifest.json").write_text(json.dumps({**fields, "surprise": 1}))
    with pytest.raises(RefusalError, match="surprise"):
        Bundle.open(copy)


def test_the_runtime_refuses_what_it_cannot_run_faithfully(copy: Path) -> None:
    manifest = Bundle.open(copy).manifest
    wrong = [p.model_copy(update={"embedding": [-v for v in p.embedding]}) for p in manifest.canary]
    edit(copy, canary=wrong)
    with pytest.raises(RefusalError, match=r"cosine -1\.0"):
        Runtime(Bundle.open(copy), "cpu", 1)
    drifted = [p.model_copy(update={"pixels_sha256": "0" * 64}) for p in manifest.canary]
    edit(copy, canary=drifted)
    with pytest.raises(RefusalError, match="decodes to other pixels here"):
        Runtime(Bundle.open(copy), "cpu", 1)
    newer = {"fp32": manifest.variants["fp32"].model_copy(update={"minimum_onnxruntime": "99.0"})}
    edit(copy, canary=manifest.canary, variants=newer)
    with pytest.raises(RefusalError, match=r"needs onnxruntime 99\.0 or later"):
        Runtime(Bundle.open(copy), "cpu", 1)
    for changed in ({"scaled_jpeg": not manifest.preprocess.scaled_jpeg}, {"fit": "pad"}, {"background": (0, 0, 0)}):
        spec = manifest.preprocess.model_copy(update=changed)
        assert spec.sha256() != manifest.preprocess.sha256()
        edit(copy, variants=manifest.variants, preprocess=spec)
        with pytest.raises(RefusalError, match=r"names space .* its contents make .* export it again"):
            Bundle.open(copy)


def test_another_space_is_another_name(bundle: Path) -> None:
    m = Bundle.open(bundle).manifest
    assert make_space_id(m.encoder, m.weights_sha256, m.preprocess) == m.space_id
    others = {
        make_space_id(m.encoder, "f" * 64, m.preprocess),
        make_space_id(m.encoder, m.weights_sha256, m.preprocess.model_copy(update={"scaled_jpeg": False})),
        make_space_id(m.encoder.model_copy(update={"kwargs": {"depth": 9}}), m.weights_sha256, m.preprocess),
    }
    assert len(others) == 3 and m.space_id not in others


def test_exporting_again_changes_nothing(run: Path, bundle: Path, refused: Callable[..., str]) -> None:
    before = (bundle / "manifest.json").read_bytes()
    assert main(["export", str(run), "--out", str(bundle)]) == 0
    assert (bundle / "manifest.json").read_bytes() == before
    assert "exists already, and is no bundle" in refused("export", run, "--out", run)


def test_what_lies_in_out_is_named(
    run: Path, copy: Path, other_bundle: Path, many_pictures: Path, refused: Callable[..., str]
) -> None:
    assert "holds another encoder's bundle" in refused("export", run, "--out", other_bundle)
    with changing(copy):  # as another process would
        more = ["--variants", "int8", "--images", many_pictures]
        assert "another process is adding to" in refused("export", run, "--out", copy, *more)
    data = bytearray((copy / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "model.onnx").write_bytes(data)
    assert "is damaged" in refused("export", run, "--out", copy)


def test_refusals(run: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "is not a run" in refused("export", tmp_path, "--out", tmp_path / "b")
    assert "give a run folder" in refused("export", tmp_path / "gone", "--out", tmp_path / "b")
    copy = shutil.copytree(run, tmp_path / "run")
    manifest = json.loads((copy / "run.json").read_bytes())
    manifest["data"]["folder"] = str(tmp_path / "gone")
    (copy / "run.json").write_text(json.dumps(manifest))
    assert "pass --images" in refused("export", copy, "--out", tmp_path / "b")
    weights = bytearray((copy / "encoder.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "encoder.safetensors").write_bytes(weights)
    assert "continue it with --resume" in refused("export", copy, "--out", tmp_path / "b")
    (copy / "run.json").write_text("{}")
    assert "cannot be read" in refused("export", copy, "--out", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_tensor_digest_sees_names_types_shapes_and_values() -> None:
    base = {"a": np.zeros((2, 3), np.float32)}
    variants = [
        {"b": base["a"]},
        {"a": base["a"].astype(np.float64)},
        {"a": base["a"].reshape(3, 2)},
        {"a": base["a"] + 1},
    ]
    digests = {tensors_sha256(v) for v in (base, *variants)}
    assert len(digests) == 5


def test_overlap_by_hand() -> None:
    a = np.eye(4, dtype=np.float32)[[0, 0, 1, 1]]
    assert neighbor_overlap(a, a, 1) == 1.0
    assert neighbor_overlap(a, a[[0, 2, 1, 3]], 1) == 0.0


def test_cpu_quota_is_what_this_process_has() -> None:
    assert 1 <= cpu_quota() <= 4096


@pytest.mark.gpu
def test_cuda_reproduces_the_canary(bundle: Path) -> None:
    runtime = Runtime(Bundle.open(bundle), "cuda")
    assert runtime.provider == "CUDAExecutionProvider" and runtime.check_canary() > 0.9999
