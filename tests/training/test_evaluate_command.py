"""`likewise evaluate` on a run, its bundle and its weights; every task; refusals."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import save_file

from export.bundle import read_run
from export.preprocess import preprocess, whole_picture
from likewise import main
from tests.shapes import write_shapes
from training.evaluate import plots
from training.evaluate.config import Evaluate
from training.evaluate.encoders import multi_scale, open_source
from training.evaluate.features import extract
from training.evaluate.metrics import Curve
from training.evaluate.pictures import read_set

CPU = ["--threads", "1", "--device", "cpu", "--label-free-queries", "6"]


def evaluate(*arguments: object) -> dict[str, Any]:
    """Run the command; returns results.json."""
    words = [str(a) for a in arguments]
    assert main(["evaluate", *words, *CPU]) == 0
    return json.loads((Path(words[words.index("--out") + 1]) / "results.json").read_text())


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("bank") / "pictures", 48, seed=5)


def test_a_labelled_folder_is_measured_leave_one_out(
    run: Path, pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = evaluate(run, pictures, "--out", tmp_path / "out")
    assert list(found["tasks"]) == ["knn", "retrieval", "label-free"]
    names = {
        "run",
        "untrained network",
        "raw pixels",
        "grey, normalised pixels",
        "HSV colour histogram",
        "perceptual hash",
    }
    assert set(found["tasks"]["knn"]["results"]) == names
    assert found["tasks"]["knn"]["leave_one_out"] and "leave-one-out" in found["tasks"]["knn"]["protocol"]
    assert all(0 <= row["top1"] <= 1 for row in found["tasks"]["knn"]["results"].values())
    assert found["tasks"]["retrieval"]["queries"] == 64
    assert found["encoders"]["run"]["weights_sha256"] == read_run(run).weights_sha256
    for name in ("scores.png", "neighbors.png"):
        with Image.open(tmp_path / "out" / name) as image:
            assert min(image.size) > 100
            assert len(np.unique(np.asarray(image.convert("L")))) > 10  # something is drawn
    printed = capfd.readouterr()
    assert "leave-one-out" in printed.out and "untrained network" in printed.out and "tasks: knn" in printed.err
    # Again: the same figures, from the features that were kept.
    stored = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "features").iterdir()}
    assert evaluate(run, pictures, "--out", tmp_path / "out")["tasks"] == found["tasks"]
    alone = evaluate(run, pictures, "--out", tmp_path / "out", "--no-baselines")
    assert all(set(task["results"]) == {"run"} for task in alone["tasks"].values())
    assert alone["tasks"]["knn"]["results"]["run"] == found["tasks"]["knn"]["results"]["run"]
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "features").iterdir()} == stored


def test_a_bundle_and_weights_give_the_runs_figures(
    run: Path, bundle: Path, pictures: Path, bank: Path, tmp_path: Path
) -> None:
    tasks = ["--bank", bank, "--tasks", "knn,retrieval", "--out"]
    of_run = evaluate(run, pictures, *tasks, tmp_path / "run")
    of_bundle = evaluate(bundle, pictures, *tasks, tmp_path / "bundle")
    for task in ("knn", "retrieval"):
        mine, theirs = (x["tasks"][task]["results"] for x in (of_run, of_bundle))
        assert theirs["bundle"] == pytest.approx(mine["run"], abs=0.02)
        assert theirs["raw pixels"] == mine["raw pixels"]
        assert "untrained network" in mine and "untrained network" not in theirs
    assert any("no untrained network" in note for note in of_bundle["notes"])
    assert of_run["tasks"]["knn"]["bank"] == 48 and not of_run["tasks"]["knn"]["leave_one_out"]


def test_a_path_that_is_not_utf_8_is_measured_and_written(run: Path, pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"te\xffst")
    try:
        shutil.copytree(pictures / "star", folder / "a")
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    shutil.copytree(pictures / "ring", folder / "b")
    bank = tmp_path / os.fsdecode(b"ba\xffnk")
    shutil.copytree(folder, bank)
    found = evaluate(run, folder, "--bank", bank, "--tasks", "knn,label-free", "--out", tmp_path / "out")
    assert found["settings"]["data"].endswith("te\ufffdst") and "ba\ufffdnk" in found["tasks"]["knn"]["protocol"]


def test_greyscale_views_take_gamma_out_of_the_label_free_score(run: Path, pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    about = json.loads((run / "run.json").read_text())
    assert about["config"]["views"] in ("photographs", "products", "orientation-free", "documents")
    about["config"]["views"] = "greyscale"
    (tmp_path / "run" / "run.json").write_text(json.dumps(about))
    flags = ["--tasks", "label-free", "--out"]
    found = evaluate(tmp_path / "run", pictures, *flags, tmp_path / "out")
    task = found["tasks"]["label-free"]
    assert "gamma" not in task["results"]["run"]["recall_at_1_by_edit"] and len(task["edits"]) == 8
    assert any("without the gamma edit" in note for note in found["notes"])
    assert "gamma" in evaluate(run, pictures, *flags, tmp_path / "other")["tasks"]["label-free"]["edits"]


def test_names_are_drawn_letter_by_letter(tmp_path: Path) -> None:
    strange = (r"$\frac{1$", "a_$x^{$", "_hidden", "$5 or $6", "\\$")
    results = {"knn": {"results": {name: {"top1": 0.5} for name in strange}}}
    assert plots.bars(results, [strange[0]], tmp_path / "bars.png") == "bars.png"
    curve = Curve(np.array([0.5, 1.0]), np.array([1.0, 0.5]))
    assert plots.precision_recall(dict.fromkeys(strange, curve), tmp_path / "pr.png") == "pr.png"
    # What is drawn for a name with two `$` is as long as what is drawn for two other letters of its width.
    figure = Figure()
    texts = [figure.text(0, 0, plots.drawn(name)) for name in ("$ab$", "0ab0")]
    widths = [text.get_window_extent(FigureCanvasAgg(figure).get_renderer()).width for text in texts]
    assert widths[0] == pytest.approx(widths[1], rel=0.05)


def test_weights_of_a_timm_model(pictures: Path, tmp_path: Path) -> None:
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    save_file({k: v.contiguous() for k, v in vit.state_dict().items()}, tmp_path / "weights.safetensors")
    asked = Evaluate(source=tmp_path / "weights.safetensors", data=pictures, out=tmp_path, device="cpu",
                     model="vit_tiny_patch16_224", image_size=64, fit="pad", normalization="model")  # fmt: skip
    encoder = open_source(asked.source, asked, torch.device("cpu"), 1)
    assert encoder.extractor.spec.size == 64 and encoder.extractor.spec.fit == "pad"
    rows = extract(read_set("data", pictures, []), [encoder.extractor], None, []).rows["weights.safetensors"]
    # The same from timm alone, with its own normalisation and its own resizing of the position embedding.
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64)
    plain.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(vit.state_dict(), plain))
    first = read_set("data", pictures, []).pictures[0].read()
    x = torch.from_numpy(preprocess(first, encoder.extractor.spec).pixels).permute(2, 0, 1)[None] / 255
    x = (x - torch.tensor(vit.pretrained_cfg["mean"]).view(3, 1, 1)) / torch.tensor(vit.pretrained_cfg["std"]).view(
        3, 1, 1
    )
    with torch.no_grad():
        expected = torch.nn.functional.normalize(plain.eval().forward_features(x)[:, 0], dim=1)
    np.testing.assert_allclose(rows[:1], expected.numpy(), atol=1e-4)


def test_linear_probe_and_labels_that_only_queries_have(run: Path, pictures: Path, bank: Path, tmp_path: Path) -> None:
    smaller = tmp_path / "bank"
    shutil.copytree(bank, smaller)
    shutil.rmtree(smaller / "star")
    found = evaluate(run, pictures, "--bank", smaller, "--out", tmp_path / "out")
    assert list(found["tasks"]) == ["knn", "linear", "retrieval", "label-free"]
    assert found["tasks"]["linear"]["results"]["run"]["learning_rate"] > 0
    assert found["tasks"]["retrieval"]["queries_without_relevant"] == 8
    assert any("8 of 64 queries have a label that the bank lacks, for example star" in note for note in found["notes"])


def test_a_query_never_finds_its_own_file(bundle: Path, pictures: Path, tmp_path: Path) -> None:
    tasks = ["--tasks", "knn,retrieval", "--out"]
    alone = evaluate(bundle, pictures, *tasks, tmp_path / "alone")["tasks"]
    link = tmp_path / "the same folder"
    link.symlink_to(pictures)
    same = evaluate(bundle, pictures, "--bank", link, *tasks, tmp_path / "same")["tasks"]
    assert same["knn"]["leave_one_out"] and same["knn"] == alone["knn"] and same["retrieval"] == alone["retrieval"]
    # The bank holds the queries' files among others: the figures are those of leave-one-out for queries that are all of it.
    part = tmp_path / "part"
    for folder in pictures.iterdir():
        (part / folder.name).mkdir(parents=True)
        for path in sorted(folder.iterdir()):
            (part / folder.name / path.name).symlink_to(path)
    linked = evaluate(bundle, pictures, "--bank", part, *tasks, tmp_path / "linked")
    assert any("64 of 64 queries are in the bank themselves" in note for note in linked["notes"])
    assert linked["tasks"]["knn"]["results"] == alone["knn"]["results"]
    assert linked["tasks"]["retrieval"]["results"] == alone["retrieval"]["results"]
    assert "own file" in linked["tasks"]["knn"]["protocol"] and not linked["tasks"]["knn"]["leave_one_out"]


def test_the_linear_probe_is_not_trained_on_queries(
    bundle: Path, bank: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    queries, both = tmp_path / "queries", tmp_path / "both"
    for name in ("star", "ring"):
        (queries / name).mkdir(parents=True)
        shutil.copytree(bank / name, both / name)
        for path in sorted((both / name).iterdir())[:2]:
            (queries / name / path.name).symlink_to(path)
    found = evaluate(bundle, queries, "--bank", both, "--tasks", "linear", "--out", tmp_path / "out")
    assert found["tasks"]["linear"]["bank"] == 8 and any(
        "4 pictures of the bank are queries" in n for n in found["notes"]
    )
    out = ["--tasks", "linear", "--out", tmp_path / "out", *CPU]
    assert "training pictures that are not" in refused("evaluate", bundle, both, "--bank", both, *out)


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory, bank: Path) -> Path:
    """Gallery of 16, each as JPEG and flipped; 8 negatives."""
    folder = tmp_path_factory.mktemp("copies") / "set"
    for name in ("gallery", "q:jpeg", "q:flip", "neg:jpeg"):
        (folder / name).mkdir(parents=True)
    for i, path in enumerate(sorted(bank.rglob("*.png"))[:24]):
        image = Image.open(path).convert("RGB")
        if i >= 16:
            image.save(folder / "neg:jpeg" / f"{path.stem}.jpg", quality=30)
            continue
        image.save(folder / "gallery" / path.name)
        image.save(folder / "q:jpeg" / f"{path.stem}.jpg", quality=30)
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "q:flip" / path.name)
    return folder


def test_copy_detection_of_two_encoders(
    run: Path, bundle: Path, other_bundle: Path, copies: Path, tmp_path: Path
) -> None:
    found = evaluate(bundle, copies, "--against", other_bundle, "--out", tmp_path / "out")
    assert list(found["tasks"]) == ["copies", "label-free", "agreement"]
    task = found["tasks"]["copies"]
    assert (task["queries"], task["negatives"], task["gallery"]) == (32, 8, 16)
    hashed = task["results"]["perceptual hash"]
    assert hashed["recall_at_1_by_transform"]["jpeg"] > 0.9 > hashed["recall_at_1_by_transform"]["flip"]
    assert task["results"]["HSV colour histogram"]["recall_at_1_by_transform"]["flip"] == 1.0
    assert found["tasks"]["label-free"]["gallery"] == 16  # copies are not searched: they would be right answers too
    difference = found["tasks"]["label-free"]["difference"]
    assert difference["of"] == "bundle (source) minus bundle (against)"
    assert difference["mrr"]["low"] <= difference["mrr"]["mean"] <= difference["mrr"]["high"]
    agreement = found["tasks"]["agreement"]["results"]
    assert 0 < agreement["bundle (source) and bundle (against)"]["agreement"] <= 1
    for name in ("precision_recall.png", "neighbors.png", "neighbors_against.png"):
        assert (tmp_path / "out" / name).stat().st_size > 1000
    # The same through two folders and a list.
    pairs = tmp_path / "pairs.csv"
    rows = [(p.relative_to(copies).as_posix(), f"{p.stem}.png") for name in ("q:jpeg", "q:flip")
            for p in sorted((copies / name).iterdir())]  # fmt: skip
    shutil.copytree(copies / "gallery", tmp_path / "gallery")
    shutil.copytree(copies, tmp_path / "queries", ignore=shutil.ignore_patterns("gallery"))
    pairs.write_text("query,original\n" + "".join(f"{q},{o}\n" for q, o in rows))
    listed = evaluate(bundle, tmp_path / "queries", "--gallery", tmp_path / "gallery", "--pairs", pairs, "--tasks",
                      "copies", "--out", tmp_path / "listed")  # fmt: skip
    for key in ("micro_ap", "micro_ap_best", "map", "recall_at_1"):
        assert listed["tasks"]["copies"]["results"]["bundle"][key] == pytest.approx(
            task["results"]["bundle (source)"][key]
        )


def test_revisited_protocol_at_three_scales(run: Path, bank: Path, tmp_path: Path) -> None:
    names = sorted(p.stem for p in bank.rglob("*.png"))
    truth = {
        "imlist": names[4:20],
        "qimlist": names[:4],
        "gnd": [{"easy": [4 + q, 8 + q], "hard": [12 + q], "junk": [q], "bbx": [0, 0, 1, 1]} for q in range(4)],
    }
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(truth))
    found = evaluate(
        run, bank, "--ground-truth", path, "--tasks", "revisited", "--image-size", 48, "--out", tmp_path / "out"
    )
    row = found["tasks"]["revisited"]["results"]["run"]
    assert {row["easy_queries"], row["medium_queries"], row["hard_queries"]} == {4}
    assert all(0 < row[f"{p}_map"] <= 1 for p in ("easy", "medium", "hard")) and 0 <= row["medium_mp_at_10"] <= 1
    assert "scales 1, 1/√2, 1/2" in found["tasks"]["revisited"]["protocol"]


def test_scales_are_averaged_and_sides_rounded_to_patches(run: Path, tmp_path: Path) -> None:
    asked = Evaluate(source=run, data=tmp_path, out=tmp_path, device="cpu")
    encoder = open_source(run, asked, torch.device("cpu"), 1)
    network = encoder.network
    assert network is not None and network.patch == 8
    rng = np.random.default_rng(0)
    square = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    np.testing.assert_allclose(network.embed_scales(square, (1.0,)), network.embed(square[None])[0], atol=1e-6)
    wide = rng.integers(0, 256, (21, 37, 3), dtype=np.uint8)
    images = network.normalise(wide[None])
    total = torch.zeros(64)
    for size in ((24, 40), (16, 24), (8, 16)):  # 21 × 37 times 1, 1/√2, 1/2, in patches of 8
        resized = torch.nn.functional.interpolate(images, size=size, mode="bilinear", align_corners=False)
        total += network.backbone.forward_features(resized)[0, 0]
    expected = torch.nn.functional.normalize(total, dim=0).numpy()
    np.testing.assert_allclose(network.embed_scales(wide), expected, atol=1e-5)
    buffer = io.BytesIO()
    Image.fromarray(wide).save(buffer, "PNG")
    whole = np.asarray(whole_picture(buffer.getvalue(), 32))
    assert multi_scale(encoder).embed(whole[None]).shape == (1, 64)


def test_refusals(
    run: Path, bundle: Path, pictures: Path, bank: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    out = ["--out", tmp_path / "out", *CPU]
    assert "is neither a run" in refused("evaluate", pictures, pictures, *out)
    (tmp_path / "empty").mkdir()
    assert "holds no pictures" in refused("evaluate", run, tmp_path / "empty", *out)
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in sorted(pictures.rglob("*.png"))[:3]:
        shutil.copy(path, flat)
    assert "--tasks knn" in (said := refused("evaluate", run, flat, "--tasks", "knn", *out)) and "no labels" in said
    assert "--bank FOLDER" in refused("evaluate", run, pictures, "--tasks", "linear", *out)
    assert "no copy-detection layout" in refused("evaluate", run, pictures, "--tasks", "copies", *out)
    assert "--ground-truth FILE" in refused("evaluate", run, pictures, "--tasks", "revisited", *out)
    assert "preprocessing is fixed: leave out --fit" in refused("evaluate", bundle, pictures, "--fit", "pad", *out)
    assert "not a multiple of the patch size 8" in refused("evaluate", run, pictures, "--image-size", 33, *out)
    weights = run / "encoder.safetensors"
    assert "--model" in refused("evaluate", weights, pictures, *out)
    other = refused("evaluate", weights, pictures, "--model", "vit_tiny_patch16_224", *out)
    assert "another architecture" in other and "--model" in other and "--init" not in other
    for flag, value in (("--model", "vit_tiny_patch16_224"), ("--normalization", "imagenet"), ("--patch-size", 8)):
        for source in (run, bundle):
            assert f"{flag} says how to read a file" in refused("evaluate", source, pictures, flag, value, *out)
    below = ["--out", bank / "star" / "out", *CPU]
    assert "plots would count as pictures" in refused("evaluate", run, pictures, "--bank", bank, *below)
    assert not (bank / "star" / "out").exists()
    one = tmp_path / "one" / "star"
    one.mkdir(parents=True)
    shutil.copy(flat / sorted(p.name for p in flat.iterdir())[0], one)
    (one.parent / "ring").mkdir()
    (one.parent / "ring" / "broken.png").write_bytes(b"no picture")
    (one / "broken.png").write_bytes(b"no picture")
    assert "leave-one-out needs two" in refused("evaluate", run, one.parent, "--tasks", "knn", *out)
    pairs = tmp_path / "pairs.csv"
    first, second = sorted(p.name for p in flat.iterdir())[:2]
    pairs.write_text(f"query,original\n{first},{second}\n")
    listed = refused("evaluate", run, flat, "--gallery", flat, "--pairs", pairs, "--tasks", "copies", *out)
    assert "3 queries, for example" in listed and "would find themselves" in listed
    strange = tmp_path / "strange"
    shutil.copytree(bank / "star", strange / "unheard")
    shutil.copytree(bank / "ring", strange / "of")
    assert "no label of" in refused("evaluate", run, pictures, "--bank", strange, *out)


def test_damaged_sources_are_refused(
    run: Path, bundle: Path, pictures: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    out = ["--out", tmp_path / "out", *CPU]
    shutil.copytree(bundle, tmp_path / "bundle")
    model = tmp_path / "bundle" / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1] + b"\0")
    assert "checksum" in refused("evaluate", tmp_path / "bundle", pictures, *out)
    shutil.copytree(run, tmp_path / "run")
    state = timm.create_model("vit_tiny_patch16_224", num_classes=0, embed_dim=64, depth=2, num_heads=4, patch_size=8,
                              img_size=32).state_dict()  # fmt: skip
    save_file(state, tmp_path / "run" / "encoder.safetensors")
    assert "run.json says" in refused("evaluate", tmp_path / "run", pictures, *out)
