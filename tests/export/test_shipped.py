"""The encoders that come with the package: whole, small, described, used where no bundle is named, left as they are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export.bundle import Bundle, RefusalError, read_run, sha256_file
from export.preprocess import find_pictures, preprocess
from export.runtime import Runtime
from export.shipped import CARD, DEFAULT_NAME, ENCODERS, bundle_flag, bundle_folder, licence, run_folder, shipped
from likewise import main
from runs.demo import photographs
from service.client import Client
from service.config import IndexBuild
from tests.service.test_server import start
from training.config import Hardware, Recipe, Train
from training.resolve import resolve

NAMES = sorted(shipped())


def digests() -> dict[str, str]:
    return {str(p): sha256_file(p) for p in ENCODERS.rglob("*") if p.is_file()}


@pytest.fixture(autouse=True)
def untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is written into the package, whatever is done with its encoders."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = digests()
    yield
    assert digests() == before


def test_there_is_a_default_one() -> None:
    assert DEFAULT_NAME in NAMES and next(iter(shipped())) == DEFAULT_NAME
    assert bundle_folder("default") == bundle_folder(DEFAULT_NAME) == ENCODERS / DEFAULT_NAME
    assert run_folder("default") == ENCODERS / DEFAULT_NAME / "run"
    assert bundle_folder("./default") == run_folder("./default") == Path.cwd() / "default"
    assert run_folder("mine") == "mine" and run_folder(None) is None and run_folder(Path("mine")) == Path("mine")
    assert (bundle_flag(ENCODERS / DEFAULT_NAME), bundle_flag(Path("mine"))) == ("", " --bundle mine")
    assert bundle_flag(Path("default")) == " --bundle ./default"  # what a command wrote there


@pytest.mark.parametrize("name", NAMES)
def test_each_is_whole_faithful_here_and_small(name: str) -> None:
    bundle = Bundle.open(ENCODERS / name)
    assert Runtime(bundle, "cpu", 1).check_canary() > 0.9999
    assert all(picture.file.endswith(".png") for picture in bundle.manifest.canary)  # read alike by every decoder
    assert sum(p.stat().st_size for p in (ENCODERS / name).rglob("*") if p.is_file()) < 25e6
    run = read_run(ENCODERS / name / "run")
    assert run.weights_sha256 == bundle.manifest.weights_sha256
    assert run.preprocess == bundle.manifest.preprocess
    texts = [p.read_text() for p in (ENCODERS / name).rglob("*") if p.suffix in (".json", ".md")]
    assert not re.search(r"/(home|root|work|tmp|Users)/", "".join(texts))


@pytest.mark.parametrize("name", NAMES)
def test_each_has_a_card(name: str) -> None:
    card = (ENCODERS / name / CARD).read_text()
    for heading in ("Data", "Licences", "Method", "Results", "Intended use", "Limits"):
        assert f"\n## {heading}\n" in card, heading
    assert not licence(ENCODERS / name).startswith("not stated")
    assert Bundle.open(ENCODERS / name).space_id in card


def test_they_are_listed_and_shown(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bundle", "list"]) == 0
    said = capfd.readouterr().out
    assert f"{DEFAULT_NAME} (the default)" in said and all(name in said for name in NAMES)
    assert main(["bundle", "list", "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == {name: str(ENCODERS / name) for name in shipped()}
    assert main(["bundle", "show", "default"]) == 0
    assert Bundle.open(ENCODERS / DEFAULT_NAME).space_id in capfd.readouterr().out


def test_verifying_one_keeps_nothing(many_pictures: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bundle", "verify", "default", "--images", str(many_pictures), "--device", "cpu"]) == 0
    assert "stays as it is" in capfd.readouterr().err


def test_without_a_bundle_photographs_find_their_scene(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Views of photographs: crops, mirrored, rotated, blurred, recoloured, compressed, framed."""
    pictures, queries = photographs(tmp_path / "demo")
    build = ["index", "build", "--images", str(pictures), "--out", str(tmp_path / "collections" / "pictures")]
    assert main([*build, "--threads", "1"]) == 0
    assert f"licence of its weights: {licence(ENCODERS / DEFAULT_NAME)}" in capfd.readouterr().err
    flags = ["--collections", tmp_path / "collections", "--port", 0, "--metrics-port", 0, "--threads", 1]
    process, address = start(*flags)
    try:
        with Client(address) as client:
            assert client.encoder().space_id == Bundle.open(ENCODERS / DEFAULT_NAME).space_id
            found = [client.search("pictures", image=q.path.read_bytes(), top_k=1)[0] for q in queries]
    finally:
        process.terminate()
        assert process.wait(20) == 0
        assert process.stderr is not None
        process.stderr.close()
    right = np.mean([n.payload["folder"] == q.scene for n, q in zip(found, queries, strict=True)])
    assert right >= 0.9 > pixels_alone(pictures, [q.path for q in queries])


def pixels_alone(pictures: Path, queries: list[Path]) -> float:
    """Recall@1 of the same queries by 16 × 16 pixels."""

    def rows(paths: list[Path]) -> np.ndarray:
        small = [np.asarray(Image.open(p).convert("RGB").resize((16, 16)), np.float32).ravel() for p in paths]
        centred = np.stack(small) - np.mean(small, axis=1, keepdims=True)
        return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-6)

    gallery = [p.path for p in find_pictures(pictures)]
    nearest = (rows(queries) @ rows(gallery).T).argmax(1)
    return float(
        np.mean([gallery[i].parent.name == q.name.split(".")[0] for i, q in zip(nearest, queries, strict=True)])
    )


def test_adapting_begins_with_its_weights(pictures: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    out = tmp_path / "run"
    flags = ["--out", str(out), "--threads", "1", "--device", "cpu", "--image-size", "64", "--batch-size", "8"]
    train = ["train", str(pictures), "--init", "default", *flags, "--steps", "2"]
    assert main(train) == 0
    run, origin = read_run(out), read_run(run_folder("default"))
    assert run.initial_sha256 is not None and run.reasons["model"] == "that of --init"
    assert run.encoder == origin.encoder.model_copy(update={"image_size": 64})
    assert run.preprocess.fit == origin.preprocess.fit
    # The network that it started from is the one that is shipped, before the projection.
    assert main(["export", str(out), "--weights", "initial", "--image-size", "160", "--out", str(tmp_path / "b")]) == 0
    pixels = np.stack([preprocess(p.read(), origin.preprocess).pixels for p in find_pictures(pictures)[:16]])
    mine = Runtime(Bundle.open(tmp_path / "b"), "cpu", 1).embed(pixels)
    theirs = Runtime(Bundle.open(ENCODERS / DEFAULT_NAME), "cpu", 1).embed(pixels)
    assert np.corrcoef((mine @ mine.T).ravel(), (theirs @ theirs.T).ravel())[0, 1] > 0.9
    assert "leave --patch-size out" in refused(*train[:-4], "--patch-size", "8", "--out", tmp_path / "other")


def test_settings_take_names_and_folders(tmp_path: Path) -> None:
    given = {"images": [str(tmp_path)], "out": tmp_path / "c"}
    assert IndexBuild.model_validate(given).bundle == ENCODERS / DEFAULT_NAME
    for name in NAMES:
        assert IndexBuild.model_validate({**given, "bundle": name}).bundle == ENCODERS / name
    own = IndexBuild.model_validate({**given, "bundle": "./default"}).bundle
    assert own == Path.cwd() / "default" and IndexBuild(images=["x"], out=tmp_path, bundle=own).bundle == own


def test_what_starts_from_a_run_takes_after_it(tmp_path: Path) -> None:
    origin = read_run(run_folder("sop-micro-1"))

    def chosen(**asked: object) -> tuple[Recipe, dict[str, str]]:
        given = {"pictures": ["p"], "out": tmp_path, "init": "sop-micro-1", "steps": 2, **asked}
        return resolve(Train.model_validate(given), 200, Hardware("cpu", "CPU", 1, False))

    for encoder in (None, "vit_micro"):
        recipe, why = chosen(encoder=encoder)
        spec = (origin.encoder.model, origin.encoder.kwargs, origin.encoder.image_size, origin.preprocess.fit)
        assert (recipe.model, recipe.model_kwargs, recipe.image_size, recipe.fit) == spec
        assert why["image_size"] == why["fit"] == "that of --init"
    recipe, why = chosen(fit="crop", image_size=32)
    assert (recipe.fit, recipe.image_size) == ("crop", 32) and not {"fit", "image_size"} & why.keys()
    with pytest.raises(RefusalError, match="patches of 8 px: leave --patch-size out"):
        chosen(patch_size=16)


def test_a_shipped_encoder_is_exported_at_another_size(many_pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "default"
    assert main(["export", "sop-micro-1", "--images", str(many_pictures), "--image-size", "96", "--out", str(out)]) == 0
    assert Bundle.open(out).manifest.preprocess.size == 96


def test_a_plan_takes_the_default_dimensions(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["index", "plan", "--rows", "1000", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["dimensions"] == Bundle.open(ENCODERS / DEFAULT_NAME).dim
