"""The figures of `likewise index evaluate` against plain float64 ones, and its report."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from sklearn.metrics import average_precision_score

from export.bundle import Bundle, RefusalError
from export.edits import EDITS
from likewise import main
from service import evaluate as module
from service import quality
from service.collection import Collection
from service.evaluate import Evaluation, Found, IndexEvaluate, evaluate
from service.filter import Filter
from service.index import CurvePoint, IndexInfo, IndexPolicy
from service.live import Live
from service.records import NewRow
from service.report import figures_of, page

DIM = 24
HOSTILE = "<script>alert(1)</script>&'\"\n.png"
QUIET = Console(quiet=True)


def clustered(labels: np.ndarray, seed: int) -> np.ndarray:
    """Unit vectors around a centre per label, far from perfectly apart."""
    x = np.random.default_rng(1).standard_normal((60, DIM))[labels]
    x = x + 1.1 * np.random.default_rng(seed).standard_normal(x.shape)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def rows(labels: np.ndarray, start: int) -> list[NewRow]:
    """Every seventh item has no label, every third is a query."""
    made = []
    for i, label in enumerate(labels.tolist(), start):
        payload: dict[str, Any] = {"shop": {"kind": f"kind {label}"}, "split": "test" if i % 3 == 0 else "train"}
        if i % 7 == 0:
            payload["shop"] = {"kind": ["", None, [1]][i % 3]}
        made.append(NewRow(HOSTILE if i == 0 else f"k{i:04d}", json.dumps(payload), f"file:///nowhere/{i}"))
    return made


class Truth:
    """What a collection holds, in plain arrays."""

    def __init__(self, folder: Path) -> None:
        collection = Collection(folder)
        self.keys = sorted(collection.files())
        items = [collection.get(key) for key in self.keys]
        collection.close()
        self.vectors = np.stack([item.vector for item in items]).astype(np.float64)
        payloads = [json.loads(item.row.payload) for item in items]
        kinds = [p["shop"]["kind"] for p in payloads]
        self.labels = np.array([k if isinstance(k, str) else "" for k in kinds])
        self.test = np.array([p["split"] == "test" for p in payloads])
        self.scores = self.vectors @ self.vectors.T
        np.fill_diagonal(self.scores, -np.inf)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two segments with inverted lists, one of them with dead rows, and fresh rows; replaced and deleted items."""
    folder = tmp_path_factory.mktemp("evaluate") / "things"
    rng = np.random.default_rng(5)
    collection = Collection.create(folder, "lw1-x", DIM, IndexPolicy(index="IVF16,Flat", min_recall=0.3))
    for number, (start, count) in enumerate(((0, 400), (400, 300))):
        labels = rng.integers(0, 60, count)
        collection.add_segment(rows(labels, start), clustered(labels, number))
    labels = rng.integers(0, 60, 100)
    collection.upsert(rows(labels, 650), clustered(labels, 7))  # 50 replace rows of the second segment
    collection.upsert([rows(labels[:1], 650)[0]._replace(key="twin")], clustered(labels[:1], 7))
    collection.delete([f"k{i:04d}" for i in range(500, 560)] + ["k0700"])
    assert [s.dead for s in collection.segments()] == [0, 110] and collection.fresh_count == 100
    assert all(s.info.factory == "IVF16,Flat" and s.info.recall_at_10 < 0.9 for s in collection.segments())
    collection.close()
    return folder


@pytest.fixture(scope="module")
def truth(folder: Path) -> Truth:
    return Truth(folder)


@pytest.fixture(scope="module")
def found(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Found]:
    """Everything asked, so that figures can be compared exactly; blocks and chunks smaller than the data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("service.live.BLOCK", 257)
        patch.setattr("service.quality.BLOCK", 257)
        patch.setattr("service.quality._CHUNK", 100)
        patch.setattr("service.labels._RELEVANT", 1000)
        out = tmp_path_factory.mktemp("report") / "report.html"
        yield evaluate(IndexEvaluate(collection=folder, label="shop.kind", sample=5000, out=out), QUIET)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One search per query instead of three."""
    monkeypatch.setattr(module, "RECALL_AT", (10,))


def skewness(x: np.ndarray) -> float:
    return float(((x - x.mean()) ** 3).mean() / ((x - x.mean()) ** 2).mean() ** 1.5)


def test_recall_is_that_of_the_answers(folder: Path, truth: Truth, found: Found) -> None:
    it = found.evaluation
    assert it.items == it.sampled == len(truth.keys) == 690
    collection = Collection(folder)
    try:
        for at in it.index:
            exact = np.sort(truth.scores, axis=1)[:, -at.k]
            shares = []
            for i, key in enumerate(truth.keys):
                (hits,) = collection.search(truth.vectors[i], at.k, leave_out=[frozenset([key])])
                places = np.searchsorted(truth.keys, [hit.row.key for hit in hits])
                shares.append((truth.scores[i, places] >= exact[i] - 1e-6).sum() / at.k)
            assert at.recall.mean == pytest.approx(np.mean(shares), abs=1e-9)
            assert at.recall.error == pytest.approx(np.std(shares, ddof=1) / len(shares) ** 0.5)
            assert 0 < at.p50_ms <= at.p95_ms
    finally:
        collection.close()
    assert [at.k for at in it.index] == [1, 10, 100] and 0.3 < it.index[1].recall.mean < 0.99


def test_hubs_and_duplicates(truth: Truth, found: Found) -> None:
    it = found.evaluation.hubness
    lists = np.argsort(-truth.scores, axis=1)[:, :10]
    counts = np.bincount(lists.ravel(), minlength=len(truth.keys))
    for each in (it.within, it.collection):  # the same where every item is asked
        assert each.skewness == pytest.approx(skewness(counts), rel=1e-3)
        assert each.anti_hubs == pytest.approx((counts == 0).mean())
        assert each.most == counts.max() and each.lists == each.items == len(counts)
        assert each.skewness > 2 * each.chance_skewness
    best = {hub.key: hub.occurrences for hub in it.hubs}
    assert best == {key: counts[truth.keys.index(key)] for key in best}
    assert sorted(best.values(), reverse=True) == sorted(counts.tolist(), reverse=True)[:8]
    expected = np.bincount(np.minimum(counts, 60), minlength=len(it.counts))
    assert np.abs(np.array(it.counts) - expected).sum() <= 4  # either of two twins may be the tenth
    top = truth.scores.max(axis=1)
    for twins in found.evaluation.duplicates:
        assert twins.share.mean == pytest.approx((top >= twins.score - 1e-6).mean()) and twins.share.mean > 0
    assert sum(found.evaluation.scores.nearest) == len(top)
    assert found.evaluation.scores.nearest_median == pytest.approx(np.median(top), abs=1e-6)


def test_hubs_by_chance_are_what_random_lists_have() -> None:
    rng = np.random.default_rng(0)
    for items, lists in ((400, 400), (20_000, 300)):
        drawn = [rng.choice(items - 1, 10, replace=False) for _ in range(lists)]
        counts = np.bincount(np.concatenate([d + (d >= i) for i, d in enumerate(drawn)]), minlength=items)
        seen = counts[counts > 0]
        for given in (counts, seen):  # items that never occur need not be given
            it = quality._occurrences(given, items, lists)
            assert it.skewness == pytest.approx(skewness(counts)) and it.anti_hubs == pytest.approx(
                (counts == 0).mean()
            )
            assert it.skewness == pytest.approx(it.chance_skewness, rel=0.25, abs=0.15)
            assert it.anti_hubs == pytest.approx(it.chance_anti_hubs, abs=0.01)


def by_label(truth: Truth, queries: np.ndarray, gallery: np.ndarray) -> tuple[list[float], list[int], int]:
    """Average precisions, ranks of the first relevant item, queries without any."""
    precisions, firsts, without = [], [], 0
    for q in np.flatnonzero(queries & (truth.labels != "")):
        there = gallery & (truth.labels != "") & (np.arange(len(gallery)) != q)
        same, scores = truth.labels[there] == truth.labels[q], truth.scores[q, there].astype(np.float32)
        if not same.any():
            without += 1
            continue
        precisions.append(average_precision_score(same, scores))
        firsts.append(int((scores[~same] >= scores[same].max()).sum()))
    return precisions, firsts, without


def test_map_is_scikit_learns(folder: Path, truth: Truth, found: Found, quick: None) -> None:
    everything = np.ones(len(truth.keys), bool)
    asked = IndexEvaluate(
        collection=folder, label='payload."shop".kind', sample=5000, query_filter="split = test",
        gallery_filter='split != test AND shop.kind != ("kind 3" OR "kind 4")',
    )  # fmt: skip
    some = ~truth.test & ~np.isin(truth.labels, ["kind 3", "kind 4"])
    cases = [(found.evaluation, everything, everything), (evaluate(asked, QUIET).evaluation, truth.test, some)]
    for evaluation, queries, gallery in cases:
        precisions, firsts, without = by_label(truth, queries, gallery)
        it = evaluation.labels
        assert it is not None and it.mean_average_precision.queries == len(precisions)
        assert it.mean_average_precision.mean == pytest.approx(np.mean(precisions), abs=1e-4)
        assert it.mean_average_precision.error == pytest.approx(
            np.std(precisions, ddof=1) / len(precisions) ** 0.5, rel=1e-3
        )
        for at in it.recall_at:
            assert at.value.mean == pytest.approx((np.array(firsts) < at.k).mean(), abs=1e-3)
        assert it.without_relevant == without and it.unlabelled == (truth.labels == "").sum()
        assert it.gallery == (gallery & (truth.labels != "")).sum()
        assert it.candidates == (queries & (truth.labels != "")).sum()
    assert cases[1][0].labels is not None and cases[1][0].labels.without_relevant > 0


def test_ties_are_no_gain(tmp_path: Path) -> None:
    """Twenty items of two labels, all alike: each is found by chance at best."""
    collection = Collection.create(tmp_path / "same", "lw1-x", DIM)
    same = [NewRow(f"k{i}", json.dumps({"l": i % 2})) for i in range(20)]
    collection.upsert(same, np.ones((20, DIM), np.float32))
    collection.close()
    it = evaluate(IndexEvaluate(collection=tmp_path / "same", label="l"), QUIET).evaluation
    assert it.labels is not None and it.labels.mean_average_precision.mean == pytest.approx(9 / 19)
    assert it.labels.recall_at[0].value.mean == 0 and it.index[0].recall.mean == 1
    assert it.duplicates[0].share.mean == 1 and [at.k for at in it.index] == [1, 10]


def test_a_sample_is_drawn_from_the_seed(folder: Path, found: Found, quick: None) -> None:
    asked = IndexEvaluate(collection=folder, sample=300, seed=3, label="shop.kind")
    first, second = (evaluate(asked, QUIET).evaluation for _ in range(2))
    other = evaluate(asked.model_copy(update={"seed": 4}), QUIET).evaluation
    volatile = {"seconds": 0.0, "index": ()}
    assert first.model_copy(update=volatile) == second.model_copy(update=volatile)
    assert [at.recall for at in first.index] == [at.recall for at in second.index]
    assert first.scores != other.scores and first.sampled == other.sampled == 300
    for it in (first, other):
        assert it.labels is not None and found.evaluation.labels is not None
        near = it.labels.mean_average_precision
        assert abs(near.mean - found.evaluation.labels.mean_average_precision.mean) < 4 * near.error
        assert abs(it.index[0].recall.mean - found.evaluation.index[1].recall.mean) < 4 * it.index[0].recall.error
        assert it.hubness.within.items == 300 and it.hubness.collection.items == 690


def test_rows_keep_their_numbers(folder: Path, truth: Truth) -> None:
    collection = Collection(folder)
    try:
        live = Live(collection.view)
        flags = live.flags()
        numbers = np.flatnonzero(flags)
        assert sorted(live.row(int(n)).key for n in numbers) == truth.keys
        assert live.locate([live.row(int(n)).id for n in numbers]).tolist() == numbers.tolist()
        assert live.locate([10**9]).tolist() == [-1]
        read = [(n, v) for block, vectors in live.blocks(flags) for n, v in zip(block.tolist(), vectors)]
        assert [n for n, _ in read] == numbers.tolist()
        assert np.array_equal(np.stack([v for _, v in read]), live.vectors(numbers))
        wanted = Filter.parse("split = test")
        assert sorted(live.row(int(n)).key for n in np.flatnonzero(live.flags(wanted))) == [
            key for key, test in zip(truth.keys, truth.test) if test
        ]
        payloads = {n + i: p for n, batch in live.payloads() for i, p in enumerate(batch)}
        assert len(payloads) == live.rows and all(payloads[int(n)] == live.row(int(n)).payload for n in numbers[::50])
    finally:
        collection.close()


def test_overlap_with_another_collection(folder: Path, truth: Truth, tmp_path: Path, quick: None) -> None:
    """The other holds two of three items, some moved, and items of its own."""
    kept = np.arange(len(truth.keys)) % 3 != 0
    moved = truth.vectors + 0.12 * np.random.default_rng(2).standard_normal(truth.vectors.shape)
    moved /= np.linalg.norm(moved, axis=1, keepdims=True)
    other = Collection.create(tmp_path / "other", "lw1-y", DIM)
    other.add_segment([NewRow(key, "{}") for key, k in zip(truth.keys, kept) if k], moved[kept])
    other.upsert([NewRow(f"own {i}", "{}") for i in range(80)], clustered(np.arange(80) % 60, 9))
    other.close()
    shutil.copytree(folder, tmp_path / "exact")
    exact = Collection(tmp_path / "exact")
    exact.keep_to(IndexPolicy(index="exact"))
    exact.close()
    asked = IndexEvaluate(collection=tmp_path / "exact", against=tmp_path / "other", sample=5000)
    it = evaluate(asked, QUIET).evaluation.against
    places = np.flatnonzero(kept)
    a = truth.scores[np.ix_(places, places)]
    b = moved[places] @ moved[places].T
    np.fill_diagonal(b, -np.inf)
    first, second = np.argsort(-a, axis=1)[:, :10], np.argsort(-b, axis=1)[:, :10]
    shared = [len(set(x) & set(y)) / 10 for x, y in zip(first.tolist(), second.tolist())]
    assert it is not None and it.missing == (~kept).sum() and it.short == 0 and it.space_id == "lw1-y"
    assert it.overlap_at[1].k == 10 and it.overlap_at[1].value.mean == pytest.approx(np.mean(shared), abs=2e-3)
    assert it.overlap_at[0].value.mean == pytest.approx((first[:, 0] == second[:, 0]).mean(), abs=2e-3)
    assert 0.2 < it.overlap_at[1].value.mean < 0.95


class Reader(html.parser.HTMLParser):
    """Elements that must be closed are, and what would be fetched or run is noted."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.addresses: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            if name in ("src", "href", "action", "data", "xlink:href"):
                self.addresses.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag in self.open[-1:]:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert not reader.open and not {"script", "link", "iframe", "object"} & set(reader.seen)
    assert all(address.startswith("data:image/jpeg;base64,") for address in reader.addresses)
    assert not re.search(r"https?:|//|url\(|@import", re.sub(r"base64,[A-Za-z0-9+/=]+", "", text))
    return reader


def test_the_report_is_one_page_and_escapes_names(found: Found) -> None:
    query = found.sheets[0].query._replace(key=HOSTILE)
    sheets = [found.sheets[0]._replace(query=query), *found.sheets[1:]]
    points = [(1, 2, 0.4), (4, 2, 0.8), (9, 2, 0.9), (1, 8, 0.5), (4, 8, 0.96)]
    curve = tuple(CurvePoint(visits=v, rescore=r, recall_at_10=recall, ms=v * r / 100) for v, r, recall in points)
    index = IndexInfo(factory="IVF16,<SQ8>", visits=4, rescore=8, recall_at_10=0.96, curve=curve, why="<i>")
    segments = tuple(s.model_copy(update={"index": index}) for s in found.evaluation.segments)
    evaluation = found.evaluation.model_copy(
        update={"name": "<b>things", "origins": ("<img src=x>",), "segments": segments}
    )
    text = page(Found(evaluation, sheets, found.hubs))
    assert "<script" not in text and "<b>things" not in text and "<img src=x" not in text and "<i>" not in text
    reader = read(text)
    assert any("<script>alert(1)</script>&'\"\ufffd.png" in each for each in reader.text)
    assert any("✓ same" in each for each in reader.text) and any("✗ other" in each for each in reader.text)
    assert (
        reader.seen.count("polyline") == 4
        and text.count("class='chosen'") == 2
        and len(found.sheets) == 12
        and not reader.addresses
    )
    for name, value, _ in figures_of(evaluation):
        assert any(name in each for each in reader.text) and any(value in each for each in reader.text)


def test_the_command_with_pictures(
    bundle: Path, pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "pictures"
    shutil.copytree(pictures, images)
    out = tmp_path / "shapes"
    flags = ["--bundle", str(bundle), "--threads", "1"]
    assert main(["index", "build", "--images", str(images), "--out", str(out), *flags]) == 0
    gone = sorted(images.rglob("*.png"))[:3]
    gone[0].unlink()
    gone[1].write_bytes(b"no picture")
    gone[2].write_bytes(gone[2].read_bytes()[:60])
    capfd.readouterr()
    asked = IndexEvaluate(
        collection=out, bundle=bundle, label="folder", device="cpu", threads=1, out=tmp_path / "report.html",
        json=tmp_path / "figures.json",
    )  # fmt: skip
    assert asked.cli_cmd() == 0
    printed = capfd.readouterr().out
    it = Evaluation.model_validate_json((tmp_path / "figures.json").read_text())
    for name, value, _ in figures_of(it):
        assert name in printed and value in printed
    own = it.self_retrieval
    assert own is not None and own.pictures == 61 and own.unreadable == 3 and own.made_by.startswith("fp32/")
    assert [each.edit for each in own.edits] == ["unchanged", *EDITS]
    assert own.edits[0].recall_at_10.mean == 1 and all(e.recall_at_1.mean <= e.recall_at_10.mean for e in own.edits)
    assert min(e.recall_at_10.mean for e in own.edits) < 1
    assert {"python", "numpy"} <= it.versions.keys() and it.machine and it.seed == 0
    assert it.labels is not None and it.labels.labels == 8 and it.labels.without_relevant == 0
    reader = read((tmp_path / "report.html").read_text())
    assert len(reader.addresses) > 100 and (tmp_path / "report.html").stat().st_size < 2_000_000
    again = evaluate(asked.model_copy(update={"out": None}), QUIET).evaluation
    assert again.self_retrieval == own


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"label": "colour"}, "no item has a label in the payload field 'colour'.*fields are shop, split; give one"),
        ({"label": "shop"}, "no item has a label"),
        ({"label": "a b"}, "--label 'a b' is no field of the payload"),
        ({"label": "a = 1 AND b"}, "is no field of the payload"),
        ({"label": "NOT a"}, "is no field of the payload"),
        ({"label": "key"}, "is no field of the payload"),
        ({"query_filter": "a = 1"}, "give --label FIELD"),
        ({"label": "split", "gallery_filter": "a ="}, "--gallery-filter: "),
        ({"label": "split", "query_filter": "split = x"}, "of 0 labelled queries none has another item"),
        ({"label": "split", "query_filter": "split = test", "gallery_filter": "split = train"}, "none has another item"),
        ({"duplicates": (0.0,)}, "scores above 0 and up to 1"),
        ({"against": "itself"}, "is the collection itself"),
        ({"against": "unlike"}, "that both collections hold: give a collection of the same items"),
        ({"collection": "empty"}, "holds 0 items, at least 20 are needed"),
        ({"collection": "small"}, "holds 19 items, at least 20 are needed"),
        ({"collection": "nothing"}, "is not a collection"),
    ],
)  # fmt: skip
def test_refusals(folder: Path, tmp_path: Path, given: dict[str, Any], said: str) -> None:
    for name, count in (("empty", 0), ("small", 19), ("unlike", 30)):
        collection = Collection.create(tmp_path / name, "lw1-x", DIM)
        collection.upsert([NewRow(f"u{i}", "{}") for i in range(count)], clustered(np.arange(count), 1))
        collection.close()
    places = {name: folder if given[name] == "itself" else tmp_path / given[name]
              for name in ("collection", "against") if name in given}  # fmt: skip
    asked = IndexEvaluate(**{"collection": folder, "sample": 20, **given, **places})
    with pytest.raises(RefusalError, match=said):
        evaluate(asked, QUIET)
    Collection(folder).close()  # the lock was given back


def test_another_space_and_an_output_that_has_no_folder(folder: Path, bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusalError, match="MODEL_INDEX_MISMATCH"):
        evaluate(IndexEvaluate(collection=folder, bundle=bundle), QUIET)
    with pytest.raises(RefusalError, match="give a file in a folder that exists"):
        IndexEvaluate(collection=folder, out=tmp_path / "no" / "r.html").cli_cmd()


def test_without_pictures_a_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    opened = Bundle.open(bundle)
    collection = Collection.create(tmp_path / "bare", opened.space_id, opened.dim)
    vectors = np.random.default_rng(0).standard_normal((30, opened.dim))
    collection.upsert([NewRow(f"u{i}", "{}", "https://example.org/x.png") for i in range(30)], vectors)
    collection.close()
    asked = IndexEvaluate(collection=tmp_path / "bare", bundle=bundle, device="cpu", threads=1)
    with pytest.raises(RefusalError, match=r"none of 30 sampled items has a picture.*--images"):
        evaluate(asked, QUIET)


def test_the_command_is_registered(refused: Callable[..., str], tmp_path: Path) -> None:
    said = refused("index", "evaluate", tmp_path / "none")
    assert "is not a collection" in said
