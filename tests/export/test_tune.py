"""Which graph runs: measured once per machine, said, and never at the cost of other neighbours."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from export.bundle import Bundle, RefusalError
from export.parity import read_parity
from export.runtime import Runtime, misplaced, offered, runtime_name
from export.tune import Timings, mixing_refusal, open_runtime, overlap, read_timings
from likewise import main


@pytest.fixture(scope="module")
def complete(run: Path, bundle: Path, many_pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = shutil.copytree(bundle, tmp_path_factory.mktemp("tune") / "bundle")
    flags = ["--variants", "int8", "--images", str(many_pictures)]
    assert main(["export", str(run), "--out", str(out), *flags]) == 0
    return out


@pytest.fixture
def mine(complete: Path, tmp_path: Path) -> Path:
    # Another test may have opened it, and measured.
    return shutil.copytree(complete, tmp_path / "bundle", ignore=shutil.ignore_patterns("machine.json"))


def set_overlap(folder: Path, variant: str, value: float) -> None:
    """As if other pictures had been measured."""
    report = json.loads((folder / "parity.json").read_text())
    for measurement in report["measurements"]:
        if measurement["variant"] == variant:
            measurement["neighbor_overlap_at_10"] = value
    (folder / "parity.json").write_text(json.dumps(report))


def set_speed(folder: Path, variant: str, value: float) -> None:
    """As if this machine were another."""
    stored = json.loads((folder / "machine.json").read_text())
    for timings in stored["machines"].values():
        for timing in timings:
            if timing["variant"] == variant:
                timing["images_per_second"] = value
    (folder / "machine.json").write_text(json.dumps(stored))


def test_the_fastest_faithful_graph_is_measured_once_and_said(mine: Path) -> None:
    set_overlap(mine, "int8", 0.99)
    said: list[str] = []
    runtime = open_runtime(Bundle.open(mine), "cpu", 1, say=said.append)
    assert len(said) == 1 + len(runtime.bundle.manifest.variants) and "measuring 2 configurations" in said[0]
    assert "images/s here" in runtime.provider_reason
    stored = Timings.model_validate_json((mine / "machine.json").read_bytes())
    (machine,) = stored.machines
    assert machine == runtime_name("cpu", 1) and {t.variant for t in stored.machines[machine]} == {"fp32", "int8"}
    # The stored measurement decides from now on.
    for winner, loser in (("int8", "fp32"), ("fp32", "int8")):
        set_speed(mine, winner, 1e6)
        set_speed(mine, loser, 1.0)
        said.clear()
        assert open_runtime(Bundle.open(mine), "cpu", 1, say=said.append).variant == winner
        assert said == []
    assert Bundle.open(mine).space_id == runtime.bundle.space_id  # outside every hash


def test_with_two_threads_two_lanes_are_tried(mine: Path) -> None:
    set_overlap(mine, "int8", 0.5)
    said: list[str] = []
    open_runtime(Bundle.open(mine), "cpu", 2, say=said.append)
    assert "measuring 2 configurations" in said[0] and "in 2 lanes" in said[2]
    stored = json.loads((mine / "machine.json").read_text())
    for timings in stored["machines"].values():
        for timing in timings:
            timing["images_per_second"] = 100.0 * timing["lanes"]
    (mine / "machine.json").write_text(json.dumps(stored))
    runtime = open_runtime(Bundle.open(mine), "cpu", 2, say=said.append)
    assert runtime.lanes == 2 and len(said) == 3 and "in 2 lanes 200.0 images/s here" in runtime.provider_reason


def test_a_graph_that_finds_other_neighbours_runs_only_where_asked_for(mine: Path) -> None:
    set_overlap(mine, "int8", 0.97)
    bundle = Bundle.open(mine)
    assert overlap(bundle, "int8", "CPUExecutionProvider") == 0.97
    assert overlap(bundle, "int8", "CUDAExecutionProvider") is None
    assert open_runtime(bundle, "cpu", 1).variant == "fp32"
    assert not (mine / "machine.json").exists()  # nothing to choose from
    assert open_runtime(bundle, "cpu", 1, "int8").variant == "int8"
    with pytest.raises(RefusalError, match="holds no variant 'fp16'"):
        open_runtime(bundle, "cpu", 1, "fp16")


def test_a_measurement_of_another_bundle_or_a_damaged_one_is_made_again(mine: Path) -> None:
    set_overlap(mine, "int8", 0.99)
    open_runtime(Bundle.open(mine), "cpu", 1)
    stored = json.loads((mine / "machine.json").read_text())
    for text in (json.dumps({**stored, "seal": "other"}), "{", json.dumps({**stored, "machines": {"another": []}})):
        (mine / "machine.json").write_text(text)
        said: list[str] = []
        open_runtime(Bundle.open(mine), "cpu", 1, say=said.append)
        assert "measuring 2 configurations" in said[0]


def test_a_bundle_in_a_read_only_folder_is_measured_into_the_cache(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_overlap(mine, "int8", 0.99)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (mine / "machine.json").mkdir()  # what cannot be replaced by a file, for root too
    open_runtime(Bundle.open(mine), "cpu", 1)
    assert len(list((tmp_path / "cache" / "likewise").iterdir())) == 1


def test_what_came_with_a_read_only_folder_and_what_was_measured_here_both_count(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_overlap(mine, "int8", 0.99)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bundle = Bundle.open(mine)
    open_runtime(bundle, "cpu", 1)
    here = Timings.model_validate_json((mine / "machine.json").read_bytes())
    cache = tmp_path / "cache" / "likewise" / f"{bundle.manifest.seal[:32]}.json"
    cache.parent.mkdir(parents=True)
    cache.write_text(here.model_dump_json())
    (mine / "machine.json").write_text(here.model_copy(update={"machines": {"builder": []}}).model_dump_json())
    said: list[str] = []
    open_runtime(bundle, "cpu", 1, say=said.append)
    assert said == [] and set(read_timings(bundle).machines) == {"builder", *here.machines}


def test_a_graph_that_fails_its_canary_here_is_not_chosen(mine: Path) -> None:
    set_overlap(mine, "int8", 0.99)
    bundle = Bundle.open(mine)
    strict = bundle.manifest.variants["int8"].model_copy(update={"canary_min_cosine": {"*": 1.1}})
    variants = {**bundle.manifest.variants, "int8": strict}
    manifest = bundle.manifest.model_copy(update={"variants": variants}).sealed()
    (mine / "manifest.json").write_text(manifest.model_dump_json())
    said: list[str] = []
    assert open_runtime(Bundle.open(mine), "cpu", 1, say=said.append).variant == "fp32"
    assert any("do not serve it here" in line for line in said)
    with pytest.raises(RefusalError, match="do not serve it here"):
        Runtime(Bundle.open(mine), "cpu", 1, "int8")


def test_variants_mix_from_a_stored_overlap_on(mine: Path) -> None:
    bundle = Bundle.open(mine)
    cpu = "CPUExecutionProvider"
    set_overlap(mine, "int8", 0.98)
    assert mixing_refusal(bundle, f"int8/{cpu}", {f"fp32/{cpu}"}) is None
    assert mixing_refusal(bundle, f"fp32/{cpu}", {f"int8/{cpu}", "fp32/CUDAExecutionProvider"}) is None
    assert mixing_refusal(bundle, f"int8/{cpu}", set()) is None
    # Another provider is another kernel: its own measurement counts.
    assert "was not measured" in str(mixing_refusal(bundle, f"fp32/{cpu}", {"fp32/OpenVINOExecutionProvider"}))
    set_overlap(mine, "int8", 0.9799)
    said = str(mixing_refusal(bundle, f"fp32/{cpu}", {f"int8/{cpu}"}))
    assert "neighbour overlap of int8/CPUExecutionProvider is 0.980" in said
    (mine / "parity.json").unlink()
    assert "was not measured" in str(mixing_refusal(bundle, f"int8/{cpu}", {f"fp32/{cpu}"}))
    assert read_parity(bundle).measurements == []


def test_a_collection_takes_one_kind_of_vectors(
    mine: Path, pictures: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    set_overlap(mine, "int8", 0.97)
    flags = ["--bundle", str(mine), "--images", str(pictures), "--out", str(tmp_path / "c"), "--device", "cpu"]
    few = shutil.copytree(pictures, tmp_path / "few")
    for path in sorted(few.rglob("*.png"))[:4]:
        path.unlink()
    started = ["--bundle", str(mine), "--images", str(few), "--out", str(tmp_path / "c"), "--device", "cpu"]
    assert main(["index", "build", *started, "--variant", "fp32"]) == 0
    assert main(["index", "build", *started, "--variant", "int8"]) == 0  # nothing to embed
    sentence = refused("index", "build", *flags, "--variant", "int8")
    assert (
        "holds vectors of fp32/CPUExecutionProvider, this encoder is int8/" in sentence and "--variant fp32" in sentence
    )
    set_overlap(mine, "int8", 0.99)
    assert main(["index", "build", *flags, "--variant", "int8"]) == 0


def test_operators_that_run_elsewhere_are_named() -> None:
    gpu, cpu = "CUDAExecutionProvider", "CPUExecutionProvider"
    placed = [(gpu, "MatMul")] * 5 + [(cpu, "Shape"), (cpu, "Concat")]
    assert misplaced(placed, gpu) == ""
    placed += [(cpu, "Attention")] * 2
    assert misplaced(placed, gpu) == "2 of 9 operators run elsewhere (2 Attention)"
    assert misplaced([(cpu, "MatMul")], cpu) == ""


def test_a_required_provider_that_is_there_is_no_hindrance(bundle: Path) -> None:
    assert open_runtime(Bundle.open(bundle), "cpu", 1, require_provider=True).provider == "CPUExecutionProvider"


def test_this_machine_offers_a_cpu() -> None:
    assert offered("cpu")[0] == "CPUExecutionProvider"
    assert "onnxruntime" in runtime_name("cpu")
