"""report.html, the sheets behind it and the TensorBoard files: written by real runs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from export.bundle import RefusalError
from likewise import main
from tests.conftest import TINY
from training.curves import panels, read_metrics
from training.encoder import Teacher, build_backbone, encode
from training.head import Head
from training.report import write_report
from training.snapshots import Snapshots, patch_similarity, read_snapshots
from training.statistics import nearest


class Page(HTMLParser):
    """Text, and every address that a browser would fetch."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.words: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.feed(path.read_text())
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A copy of the session's run that a test may change."""
    return Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("cache", "checkpoints")))


def test_a_report_shows_the_run_and_fetches_nothing(copy: Path) -> None:
    path = write_report(copy)
    assert path == copy / "report.html"
    page = Page(path)
    for heading in (
        "Alarms",
        "Curves",
        "kNN accuracy, %",
        "Nearest neighbours",
        "What the patches see",
        "Configuration",
    ):
        assert heading in page.text
    assert "koleo_weight" in page.text and "without a stabiliser the objective collapses" in page.text
    assert "Step 0" in page.text and "Step 3" in page.text
    assert page.addresses and all(a.startswith("data:image/") for a in page.addresses)
    assert "script" not in page.tags and "link" not in page.tags
    urls = re.findall(r"url\((.*?)\)", path.read_text())
    assert len(urls) > 20 and all(u.startswith("data:image/") for u in urls)
    assert "Verdict" not in page.text


def test_alarms_are_told_in_words_with_their_steps(copy: Path) -> None:
    metrics = copy / "metrics.jsonl"
    kept = [line for line in metrics.read_text().splitlines() if '"alarm"' not in line]
    metrics.write_text("\n".join(kept) + "\n")
    assert "No alarm." in Page(write_report(copy)).text
    said = [{"step": s, "alarm": "collapse to a point: 0.99 < 1", "kind": "point"} for s in (1, 2)]
    metrics.write_text("\n".join([*kept, *map(json.dumps, said)]) + "\n")
    page = Page(write_report(copy))
    assert "collapse to a point: 0.99 < 1" in page.text and "No alarm." not in page.text
    assert "2 times, steps 1 to 2; no longer at the end" in page.text


def test_the_verdict_is_shown_when_there_is_one(copy: Path) -> None:
    verdict = {"export": "initial", "sentence": "The adapted one finds 3 % fewer.", "scores": {"initial": 81.5}}
    (copy / "verdict.json").write_text(json.dumps(verdict))
    text = Page(write_report(copy)).text
    assert "Export the initial encoder. The adapted one finds 3 % fewer." in text and "81.5" in text
    (copy / "verdict.json").write_text("{}")
    with pytest.raises(RefusalError, match=r"verdict\.json cannot be read"):
        write_report(copy)


def test_a_report_needs_only_run_json(copy: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    assert "is not a run (no run.json)" in refused("report", bare)
    shutil.copy(copy / "run.json", bare)
    assert main(["report", str(bare)]) == 0
    text = Page(bare / "report.html").text
    assert "Nothing was measured yet." in text and "Nothing was logged." in text


def test_curves_hold_what_was_logged(copy: Path) -> None:
    metrics = read_metrics(copy)
    found = {panel.title: panel for panel in panels(metrics)}
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    loss = next(line for line in found["Loss"].lines if line.name == "loss")
    assert list(zip(loss.at, loss.values, strict=True)) == [(s["step"], s["loss"]) for s in lines if "loss" in s]
    knn = {line.name: line.values for line in found["kNN accuracy, %"].lines}
    health = [s for s in lines if "health" in s]
    assert knn["this encoder"] == [s["knn"] for s in health]
    assert knn["raw pixels"] == pytest.approx([health[0]["knn"] - health[0]["knn_over raw pixels"]] * len(health))
    assert "Memory age, steps" in found
    (copy / "metrics.jsonl").write_text(
        "".join(json.dumps({k: v for k, v in s.items() if k != "memory_age"}) + "\n" for s in lines)
    )
    assert "Memory age, steps" not in {panel.title for panel in panels(read_metrics(copy))}  # not logged, not shown


def test_sheets_hold_the_nearest_pictures_and_drop_steps_that_a_kill_undid(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (40, 32, 32, 3), generator=generator, dtype=torch.uint8)
    features = torch.randn(40, 8, generator=generator)
    written = Snapshots(tmp_path, pictures, torch.arange(40) % 4)
    for step in (0, 10, 20):
        written.write(step, features + step, torch.rand(4, 2, 4, 4, generator=generator))
    sheets, seen = read_snapshots(tmp_path)
    assert [s.step for s in sheets] == [0, 10, 20] and seen.queries == written.queries.tolist()
    assert torch.equal(sheets[0].rows, nearest(features, 6).rows[written.queries])
    shown = {int(i) for s in sheets for i in s.rows.flatten()} | set(seen.queries)
    assert seen.thumbnails.keys() == seen.labels.keys() == shown
    assert all(torch.equal(seen.thumbnails[i], pictures[i]) and seen.labels[i] == i % 4 for i in shown)
    Snapshots(tmp_path, pictures, None, resumed_at=10)
    assert [s.step for s in read_snapshots(tmp_path)[0]] == [0, 10]
    (tmp_path / "report" / "step-00000010.safetensors").write_bytes(b"x")
    with pytest.raises(RefusalError, match="damaged"):
        read_snapshots(tmp_path)


def test_patch_similarity_is_the_cosine_of_tokens() -> None:
    torch.manual_seed(0)
    vit = build_backbone(
        "vit_tiny_patch16_224", {"embed_dim": 64, "depth": 2, "num_heads": 4, "patch_size": 8}, 32
    ).eval()
    images = torch.randn(2, 3, 32, 48)
    found = patch_similarity(Teacher(vit, Head(64, 16, 8)), images)
    assert found.shape == (2, 2, 4, 6)
    with torch.no_grad():
        cls, patches = encode(vit, images)
    assert float(found[1, 0, 2, 5]) == pytest.approx(
        float(F.cosine_similarity(cls[1], patches[1, 17], dim=0)), abs=1e-5
    )
    assert float(found[1, 1, 2, 3]) == pytest.approx(1, abs=1e-5)  # the central patch with itself


def test_tensorboard_holds_each_number_once_after_a_resume(pictures: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from training.tensorboard import TensorBoardWriter

    flags = ["train", str(pictures), "--out", str(tmp_path / "run"), "--resume", "--tensorboard", "--steps", "3", *TINY]
    assert main(flags) == 0

    def steps(tag: str, run: Path) -> list[int]:
        events = EventAccumulator(str(run / "tensorboard"))
        events.Reload()
        return [event.step for event in events.Scalars(tag)]

    assert steps("train/loss", tmp_path / "run") == [1, 2, 3]
    assert steps("health/mean_cosine", tmp_path / "run") == [0, 1, 2, 3]
    assert steps("health/overlap_raw_pixels", tmp_path / "run") == [0, 1, 2, 3]
    # Killed at step 3 with a checkpoint of step 1: steps 2 and 3 are trained again.
    first = TensorBoardWriter(tmp_path)
    for step in (1, 2, 3):
        first.write(step=step, loss=1.0 * step)
    first.close()
    again = TensorBoardWriter(tmp_path, resumed_at=1)
    for step in (2, 3):
        again.write(step=step, loss=1.0 * step)
    again.close()
    assert steps("train/loss", tmp_path) == [1, 2, 3]
