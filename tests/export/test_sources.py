"""Folders, globs, lists, tar shards, URLs: what is found, under which key and label, and what is refused."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from export.bundle import RefusalError
from export.preprocess import DecodeLimits, PictureFile, UnreadablePictureError, find_pictures
from export.sources.listing import Sources, list_sources
from export.sources.lists import read_list
from export.sources.picture import SourcePicture, picture_at
from tests.conftest import encode, noise
from tests.shapes import write_shapes
from training.cache import build_cache


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """Four pictures, two of them with a .cls label, one below a folder, one that is no picture."""
    path = tmp_path / "shard-0000.tar"
    with tarfile.open(path, "w") as archive:
        for i in range(2):
            add(archive, f"{i:04d}.jpg", encode(noise(20, 16, i)))
            add(archive, f"{i:04d}.cls", f"{i}\n".encode())
        add(archive, "./cats/tom.png", encode(noise(16, 16, 7), "PNG"))
        add(archive, "notes.txt", b"no picture")
        add(archive, ".hidden.jpg", b"x")
        add(archive, "bad.jpg", b"not a picture")
    return path


def keys(sources: Sources) -> list[str]:
    return [item.key for item in sources.items]


def test_a_folder_gives_the_picture_files_of_the_other_commands(pictures: Path) -> None:
    sources = list_sources([str(pictures)])
    assert sources.items == find_pictures(pictures) and all(isinstance(item, PictureFile) for item in sources.items)
    assert sources.labels[0] == sources.items[0].key.split("/")[0]


def test_a_glob_keeps_the_folders_after_its_first_wildcard(pictures: Path) -> None:
    sources = list_sources([f"{pictures}/c*/*.png"])
    expected = [p.key for p in find_pictures(pictures) if p.key.startswith("c")]
    assert keys(sources) == expected and set(sources.labels) == {"circle", "cross", "crescent"}


def test_several_specs_have_unique_keys_and_keep_their_labels(pictures: Path, tmp_path: Path) -> None:
    other = write_shapes(tmp_path / "more", 8)
    sources = list_sources([str(pictures), str(other), str(other)])
    assert len(set(keys(sources))) == len(sources.items) == 64 + 16
    assert keys(sources)[0].startswith("pictures/") and keys(sources)[70].startswith("more/")
    assert set(sources.labels) == {p.folder for p in find_pictures(pictures)}
    assert sources.items[64].read() == find_pictures(other)[0].path.read_bytes()


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_lists_name_paths_and_labels(pictures: Path, suffix: str) -> None:
    found = find_pictures(pictures)[:5]
    rows = [{"label": f"class {i % 2}", "path": p.key} for i, p in enumerate(found)]
    target = pictures.parent / "pictures" / f"list.{suffix}"
    if suffix == "parquet":
        pa = pytest.importorskip("pyarrow", reason="pyarrow comes with the [serve] extra")
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), target)
    elif suffix == "jsonl":
        target.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    else:
        comma = "\t" if suffix == "tsv" else ","
        target.write_text("\n".join(comma.join(row) for row in [["label", "path"], *(r.values() for r in rows)]))
    try:
        sources = list_sources([str(target)])
    finally:
        target.unlink()
    assert keys(sources) == [p.key for p in found] and sources.labels == [row["label"] for row in rows]
    assert [item.read() for item in sources.items] == [p.read() for p in found]
    assert [(item.size, item.mtime_ns) for item in sources.items] == [(p.size, p.mtime_ns) for p in found]


def test_what_a_list_names_in_vain_is_listed(pictures: Path, tmp_path: Path) -> None:
    there = find_pictures(pictures)[0].path
    (tmp_path / "l.csv").write_text(f"path\n{there}\n{there}\nabsent.jpg\n{tmp_path}\n")
    sources = list_sources([str(tmp_path / "l.csv")])
    assert keys(sources) == [str(there)] and sources.labels == [None]
    reasons = [reason for _, reason in sources.unreadable]
    assert "line 3 of the list repeats line 2" in reasons[0]
    assert "line 4" in reasons[1] and "No such file" in reasons[1] and "line 5" in reasons[2]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", b"file,label\nx.jpg,1\n", "line 1 names no column 'path' or 'uri' (found: 'file', 'label')"),
        ("a.csv", b"path,label\nx.jpg,1\ny.jpg\n", "line 3 has 1 cells, the first line names 2 columns"),
        ("a.csv", b'path,label\n"x.jpg,1\n', "is damaged"),
        ("a.csv", b"path\nx\xff.jpg\n", "line 2 is not UTF-8"),
        ("a.csv", b"path\nnone.jpg\n", "gives no picture that can be used"),
        ("a.jsonl", b'{"path": "x.jpg"}\n{"path": \n', "line 2 is not JSON"),
        ("a.jsonl", b'{"path": "x.jpg"}\n\n["x.jpg"]\n', "line 3 is no object"),
        ("a.jsonl", b'{"image": "x.jpg"}\n', "line 1 has no column 'path' or 'uri' (found: 'image')"),
        ("a.jsonl", b'{"path": 7}\n', "line 1 has 7 as its path"),
        ("a.tar", b"no tar" * 100, "is no uncompressed tar"),
        ("a.xyz", b"?", "neither a picture nor a list"),
    ],
)
def test_bad_lists_are_refused_with_the_line(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RefusalError) as refusal:
        list_sources([str(tmp_path / name)])
    assert expected in str(refusal.value) and "\n" not in str(refusal.value)


def test_bad_specs_are_refused(tmp_path: Path) -> None:
    for spec, expected in (
        (str(tmp_path / "absent"), "does not exist"),
        (str(tmp_path / "*.jpg"), "gives no picture"),
        ("s-{9..3}.tar", "does not count up"),
        ("nosuch://bucket/x", "no URL that fsspec knows"),
        ("memory://absent/", "cannot be listed"),
    ):
        with pytest.raises(RefusalError, match=expected):
            list_sources([spec])
    with pytest.raises(RefusalError, match="no pictures were named"):
        list_sources([])


def test_tar_members_are_read_where_they_lie(shard: Path, tmp_path: Path) -> None:
    sources = list_sources([str(shard)])
    names = ["0000.jpg", "0001.jpg", "cats/tom.png", "bad.jpg"]
    assert keys(sources) == [f"shard-0000/{name}" for name in names] and sources.labels == ["0", "1", "cats", None]
    with tarfile.open(shard) as archive:
        for item, member in zip(sources.items, ["0000.jpg", "0001.jpg", "./cats/tom.png", "bad.jpg"], strict=True):
            content = archive.extractfile(member)
            assert content is not None and item.read() == content.read()
    cache = build_cache(tmp_path / "cache", sources.items, sources.name, 16, 1, lambda _: None)
    assert len(cache) == 3 and [key for key, _ in cache.unreadable] == ["shard-0000/bad.jpg"]
    assert cache.labels == ["0", "1", "cats"] and cache.aspects.tolist() == [1.25, 1.25, 1.0]


def test_tar_shards_expand_and_their_index_is_kept_until_they_change(
    shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shard-0001.tar").write_bytes(shard.read_bytes())
    spec = str(tmp_path / "shard-{0000..0001}.tar")
    first = list_sources([spec], tmp_path / "index")
    assert len(first.items) == 8 and len(set(keys(first))) == 8
    assert keys(list_sources([str(tmp_path / "shard-*.tar")])) == keys(first)
    opened: list[object] = []
    original = tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda *a, **k: (opened.append(k), original(*a, **k))[1])
    assert list_sources([spec], tmp_path / "index").items == first.items and not opened
    with original(shard, "a") as archive:
        add(archive, "new.jpg", encode(noise(8, 8)))
    assert len(list_sources([spec], tmp_path / "index").items) == 9 and len(opened) == 1


@pytest.mark.parametrize("damage", ["cut", "header"])
def test_a_damaged_tar_gives_what_comes_before_and_says_so(shard: Path, damage: str) -> None:
    data = bytearray(shard.read_bytes())
    third = list_sources([str(shard)]).items[2]
    at = third.offset - 512  # type: ignore[attr-defined]
    shard.write_bytes(data[: at + 520] if damage == "cut" else data[:at] + b"\x55" * 512 + data[at + 512 :])
    sources = list_sources([str(shard)])
    assert keys(sources) == ["shard-0000/0000.jpg", "shard-0000/0001.jpg"]
    assert sources.unreadable[0][0] == "shard-0000.tar" and "damaged after 2 pictures" in sources.unreadable[0][1]


def link(archive: tarfile.TarFile, name: str, target: str, kind: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    archive.addfile(info)


def test_links_in_a_tar_are_followed_and_what_cannot_be_read_is_listed(tmp_path: Path) -> None:
    data, other = encode(noise(20, 16)), encode(noise(16, 16, 5))
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as archive:
        add(archive, "./a/one.jpg", data)
        link(archive, "a/hard.jpg", "./a/one.jpg", tarfile.LNKTYPE)
        link(archive, "b/soft.jpg", "../c/later.jpg", tarfile.SYMTYPE)
        link(archive, "b/twice.jpg", "soft.jpg", tarfile.SYMTYPE)
        link(archive, "b/gone.jpg", "../../outside.jpg", tarfile.SYMTYPE)
        link(archive, "b/loop.jpg", "loop.jpg", tarfile.SYMTYPE)
        link(archive, "pipe.png", "", tarfile.FIFOTYPE)
        add(archive, "c/later.jpg", other)
    for _ in range(2):  # as indexed, and from the stored index
        sources = list_sources([str(path)], tmp_path / "index")
        assert {item.key: item.read() for item in sources.items} == {
            "s/a/one.jpg": data, "s/a/hard.jpg": data, "s/b/soft.jpg": other, "s/b/twice.jpg": other, "s/c/later.jpg": other
        }  # fmt: skip
        reasons = dict(sources.unreadable)
        assert sorted(reasons) == ["s/b/gone.jpg", "s/b/loop.jpg", "s/pipe.png"]
        assert "leads to ../outside.jpg, which is no file in the tar" in reasons["s/b/gone.jpg"]
        assert "not a file" in reasons["s/pipe.png"]
    assert len(list((tmp_path / "index").iterdir())) == 1


def test_a_sparse_member_is_listed(tmp_path: Path) -> None:
    """GNU tar's format 1.0: the map of holes precedes the data, so that the bytes do not lie in one stretch."""
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        add(archive, "whole.jpg", encode(noise(20, 16)))
        info = tarfile.TarInfo("GNUSparseFile.0/holes.jpg")
        body = b"1\n0\n512\n".ljust(512, b"\0") + b"x" * 512
        info.size = len(body)
        info.pax_headers = {
            "GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "holes.jpg", "GNU.sparse.realsize": "4096"
        }  # fmt: skip
        archive.addfile(info, io.BytesIO(body))
    sources = list_sources([str(tmp_path / "s.tar")])
    assert keys(sources) == ["s/whole.jpg"] and sources.unreadable[0][0] == "s/holes.jpg"
    assert "sparse" in sources.unreadable[0][1]


def test_a_sample_is_named_up_to_the_first_dot(tmp_path: Path) -> None:
    """WebDataset: 0001.rgb.png, 0001.mask.png and 0001.cls are one sample; dots of folders do not count."""
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for name in ("0001.rgb.png", "0001.mask.png", "v1.0/0002.left.png", "v1.0/0003.png"):
            add(archive, name, encode(noise(16, 16), "PNG"))
        add(archive, "0001.cls", b"cat")
        add(archive, "v1.0/0002.cls", b"dog\n")
        add(archive, "v1.cls", b"wrong")
    assert list_sources([str(tmp_path / "s.tar")]).labels == ["cat", "cat", "dog", "v1.0"]


def test_tars_one_after_another_in_a_file_are_all_read(shard: Path, tmp_path: Path) -> None:
    second = tmp_path / "second.tar"
    with tarfile.open(second, "w") as archive:
        for i in range(3):
            add(archive, f"more-{i}.jpg", encode(noise(20, 16, i)))
        add(archive, "more-0.cls", b"more")
    both = tmp_path / "both.tar"
    both.write_bytes(shard.read_bytes() + second.read_bytes())
    sources, first, last = (list_sources([str(path)]) for path in (both, shard, second))
    assert [item.read() for item in sources.items] == [item.read() for item in first.items + last.items]
    assert sources.labels == first.labels + last.labels and not sources.unreadable
    both.write_bytes(shard.read_bytes() + b"rubbish" * 200)
    sources = list_sources([str(both)])
    assert len(sources.items) == 4 and "damaged after 4 pictures" in sources.unreadable[0][1]
    both.write_bytes(shard.read_bytes() * 2)  # names that repeat are other samples
    sources = list_sources([str(both)])
    assert len(set(keys(sources))) == 8 and sources.labels == first.labels * 2


@pytest.fixture
def store(shard: Path) -> Iterator[str]:
    """fsspec's file system in memory, with a folder, a list and a tar."""
    fsspec = pytest.importorskip("fsspec", reason="fsspec comes with torch")
    files = fsspec.filesystem("memory")
    for i in range(4):
        files.pipe(f"/store/{'ab'[i % 2]}/{i}.jpg", encode(noise(24, 12, i)))
    files.pipe("/store/list.csv", b"uri,label\na/0.jpg,x\nmemory://store/b/1.jpg,y\n")
    files.pipe("/store/s.tar", shard.read_bytes())
    yield "memory://store"
    files.rm("/store", recursive=True)


def test_urls_of_folders_globs_lists_and_tars(store: str, shard: Path) -> None:
    import fsspec

    glob = list_sources([f"{store}/*/*.jpg"])
    assert keys(glob) == ["a/0.jpg", "a/2.jpg", "b/1.jpg", "b/3.jpg"] and glob.labels == ["a", "a", "b", "b"]
    assert glob.items[0].read() == fsspec.filesystem("memory").cat_file("/store/a/0.jpg")
    listed = list_sources([f"{store}/list.csv"])
    assert listed.labels == ["x", "y"] and [i.read() for i in listed.items] == [
        glob.items[0].read(),
        glob.items[2].read(),
    ]
    tar, local = list_sources([f"{store}/s.tar"]), list_sources([str(shard)])
    assert [i.read() for i in tar.items] == [i.read() for i in local.items] and tar.labels == local.labels
    assert len(list_sources([store + "/a"]).items) == 2
    before = glob.items[0].mtime_ns
    fsspec.filesystem("memory").pipe("/store/a/0.jpg", encode(noise(24, 12, 9)))
    assert list_sources([f"{store}/*/*.jpg"]).items[0].mtime_ns != before  # a changed object is another identity


def test_lists_are_taken_by_wildcards_only_when_their_suffix_is_named(store: str, tmp_path: Path) -> None:
    import fsspec

    (folder := tmp_path / "folder").mkdir()
    for i in range(3):
        (folder / f"{i}.jpg").write_bytes(encode(noise(20, 16, i)))
    (folder / "meta.csv").write_text("camera,lens\nA,B\n")
    (folder / "list.tsv").write_text("path\n0.jpg\n")
    assert keys(list_sources([f"{folder}/*"])) == ["0.jpg", "1.jpg", "2.jpg"]
    assert keys(list_sources([f"{folder}/*.tsv"])) == ["0.jpg"]
    with pytest.raises(RefusalError, match="names no column 'path'"):
        list_sources([f"{folder}/*.csv"])
    fsspec.filesystem("memory").pipe("/store/a/meta.csv", b"camera,lens\nA,B\n")
    assert keys(list_sources([f"{store}/a"])) == keys(list_sources([f"{store}/a/*"])) == ["0.jpg", "2.jpg"]
    assert len(list_sources([f"{store}/*.csv"]).items) == 2


def test_a_line_with_a_url_that_cannot_be_opened_is_listed_with_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.registry import known_implementations

    (tmp_path / "0.jpg").write_bytes(encode(noise(20, 16)))
    (tmp_path / "l.csv").write_text("path\n0.jpg\nfoo://bucket/x.jpg\nsimplecache::foo://b/y.jpg\n")
    sources = list_sources([str(tmp_path / "l.csv")])
    assert keys(sources) == ["0.jpg"]
    assert [reason.partition(" (")[0] for _, reason in sources.unreadable] == [
        f"line {line} of the list names a URL that fsspec does not know" for line in (3, 4)
    ]
    # A missing client is for the user to install, before anything is decoded.
    (tmp_path / "l.csv").write_text("path\n0.jpg\nnone://bucket/x.jpg\n")
    monkeypatch.setitem(known_implementations, "none", {"class": "no_such_client.Files", "err": "Install it"})
    with pytest.raises(RefusalError, match=r"l\.csv line 3 .*needs a package that is not installed"):
        list_sources([str(tmp_path / "l.csv")])


@pytest.mark.parametrize("chain", ["memory://store", "simplecache::memory://store", "file"])
def test_pictures_in_a_zip_archive_are_read(store: str, tmp_path: Path, chain: str) -> None:
    import fsspec

    pictures = {f"{'ab'[i % 2]}/{i}.jpg": encode(noise(24, 12, i)) for i in range(4)}
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        for name, data in pictures.items():
            archive.writestr(name, data)
        archive.writestr("list.csv", "path,label\na/0.jpg,x\n")
    fsspec.filesystem("memory").pipe("/store/z.zip", (tmp_path / "z.zip").read_bytes())
    target = (tmp_path / "z.zip").as_uri() if chain == "file" else f"{chain}/z.zip"
    for spec, expected in (
        ("zip://*/*.jpg", list(pictures)),
        ("zip://a", ["0.jpg", "2.jpg"]),
        ("zip://list.csv", ["a/0.jpg"]),
    ):
        items = list_sources([f"{spec}::{target}"]).items
        assert [item.key for item in items] == sorted(expected)
        for item in items:
            assert item.read() == pictures[item.key if "/" in item.key else f"a/{item.key}"]
    cached = list_sources([f"simplecache::{store}/a"]).items
    assert len(cached) == 2 and all(item.where.startswith("simplecache::") for item in cached)  # type: ignore[attr-defined]
    assert [item.read() for item in cached] == [pictures["a/0.jpg"], pictures["a/2.jpg"]]
    with pytest.raises(UnreadablePictureError):
        SourcePicture("x", 0, 0, "", f"zip://absent.jpg::{target}").read()
    with pytest.raises(UnreadablePictureError):
        SourcePicture("x", 0, 0, "", "zip://without-archive.jpg").read()


def test_a_file_url_reads_as_the_folder_does(pictures: Path, tmp_path: Path) -> None:
    pytest.importorskip("fsspec", reason="fsspec comes with torch")
    url, folder = list_sources([pictures.as_uri()]), list_sources([str(pictures)])
    assert keys(url) == keys(folder) and url.labels == folder.labels
    a = build_cache(tmp_path / "a", url.items, url.name, 16, 1, lambda _: None)
    b = build_cache(tmp_path / "b", folder.items, folder.name, 16, 1, lambda _: None)
    assert a.fingerprint.sha256 == b.fingerprint.sha256
    assert np.array_equal(a._shards[0], b._shards[0])


def test_a_picture_that_vanishes_is_unreadable_not_fatal(store: str, pictures: Path, tmp_path: Path) -> None:
    import fsspec

    remote = list_sources([f"{store}/a"]).items
    fsspec.filesystem("memory").rm("/store/a/0.jpg")
    with pytest.raises(UnreadablePictureError, match="cannot be read"):
        remote[0].read()
    cache = build_cache(tmp_path / "c", remote, "store", 16, 1, lambda _: None)
    assert len(cache) == 1 and cache.unreadable[0][0] == "0.jpg"


def test_what_lists_and_tars_say_of_pictures_becomes_fields(shard: Path, pictures: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow comes with the [serve] extra")
    first, second, third = (p.path for p in find_pictures(pictures)[:3])
    columns = "path,label,n,x,flag,day,code,note,"
    rows = [f"{first},7,1,0.5,true,2024-01-02,007,a,", f"{second},,,2,false,,12,,", f'{third},c,3,1,true,,9,"b, c",']
    (tmp_path / "l.csv").write_text("\ufeff" + "\n\n".join([columns, *rows]) + "\n")
    found = [json.loads(i.fields) for i in list_sources([str(tmp_path / "l.csv")], with_fields=True).items]  # type: ignore[attr-defined]
    assert found == [
        {"folder": "", "label": "7", "n": 1, "x": 0.5, "flag": True, "day": "2024-01-02", "code": "007", "note": "a"},
        {"folder": "", "x": 2.0, "flag": False, "code": "12"},
        {"folder": "", "label": "c", "n": 3, "x": 1.0, "flag": True, "code": "9", "note": "b, c"},
    ]
    (tmp_path / "l.jsonl").write_text(json.dumps({"uri": str(first), "tags": ["a"], "in": {"b": None}, "gone": None}))
    (only,) = list_sources([str(tmp_path / "l.jsonl")], with_fields=True).items
    assert json.loads(only.fields) == {"tags": ["a"], "in": {"b": None}}  # type: ignore[attr-defined]
    (tmp_path / "l.jsonl").write_text(json.dumps({"path": str(first)}))
    assert [i.fields for i in list_sources([str(tmp_path / "l.jsonl")], with_fields=True).items] == [""]  # type: ignore[attr-defined]
    for index in (None, tmp_path / "index", tmp_path / "index"):
        found = [i.fields for i in list_sources([str(shard)], index, with_fields=True).items]  # type: ignore[attr-defined]
        assert found == ['{"folder": "", "label": "0"}', '{"folder": "", "label": "1"}', "", ""]
        assert all(not i.fields for i in list_sources([str(shard)], index).items)  # type: ignore[attr-defined]


def test_a_type_is_that_of_every_cell(pictures: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow comes with the [serve] extra")
    paths = [p.path for p in find_pictures(pictures)] * 2000
    (tmp_path / "l.csv").write_text("path,n\n" + "".join(f"x{i}-{p},{i}\n" for i, p in enumerate(paths)) + "last,two\n")
    rows = list(read_list("l.csv", (tmp_path / "l.csv").read_bytes(), with_fields=True))  # several blocks of Arrow's
    assert rows[0].fields == '{"n": "0"}' and rows[-1].fields == '{"n": "two"}' and rows[-1].line == len(paths) + 2


def test_values_that_no_payload_can_hold_are_refused_with_the_line(pictures: Path, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="pyarrow comes with the [serve] extra")
    import pyarrow.parquet as pq

    path = str(find_pictures(pictures)[0].path)
    pq.write_table(pa.table({"path": [path, path], "raw": [None, b"x"]}), tmp_path / "l.parquet")
    with pytest.raises(RefusalError, match=r"l\.parquet line 2 cannot become a payload \(a value of type bytes\)"):
        list_sources([str(tmp_path / "l.parquet")], with_fields=True)
    (tmp_path / "l.csv").write_text(f"path,x\n{path},1\nother.jpg,inf\n")
    with pytest.raises(RefusalError, match=r"l\.csv line 3 cannot become a payload"):
        list_sources([str(tmp_path / "l.csv")], with_fields=True)


def test_a_picture_is_found_again_by_its_uri(shard: Path, store: str, pictures: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd #1 ?ü"
    odd.mkdir()
    (odd / "a b%20.jpg").write_bytes(encode(noise(20, 16)))
    (odd / "l.csv").write_text("path\na b%20.jpg\n")
    (odd / "s#1.tar").write_bytes(shard.read_bytes())
    (tmp_path / "linked").symlink_to(odd)
    specs = [
        str(pictures), str(tmp_path / "linked"), f"{odd}/*.jpg", str(odd / "l.csv"), str(odd / "s#1.tar"), odd.as_uri(),
        f"{store}/a", f"{store}/list.csv", f"{store}/s.tar", f"simplecache::{store}/s.tar",
    ]  # fmt: skip
    for spec in specs:
        items = list_sources([spec] if "odd" not in spec or "://" not in spec else [f"file://{odd}"]).items
        assert items
        for item in items:
            again = picture_at(item.uri, item.key)
            assert again.read() == item.read() and again.key == item.key and again.uri == item.uri
            if item.uri.startswith("file:") and not getattr(item, "is_remote", False):
                assert (again.size, again.mtime_ns) == (item.size, item.mtime_ns)
    tar = list_sources([str(shard)]).items[1]
    assert tar.uri == f"{shard.as_uri()}#bytes={tar.offset}-{tar.offset + tar.size - 1}"  # type: ignore[attr-defined]
    assert list_sources([str(tmp_path / "linked")]).items[0].uri == (odd / "a b%20.jpg").as_uri()
    remote = list_sources([f"{store}/s.tar"]).items[0]
    assert remote.uri.startswith("memory://") and "/store/s.tar#bytes=" in remote.uri


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("", "no address of a picture"),
        ("photos/a.jpg", "no address of a picture"),
        ("file://other-host/a.jpg", "no file of this machine"),
        ("file://[a.jpg", "no file of this machine"),
        ("file:///s.tar#bytes=", "#bytes=FIRST-LAST"),
        ("file:///s.tar#bytes=9-8", "#bytes=FIRST-LAST"),
        ("file:///s.tar#bytes=-8", "#bytes=FIRST-LAST"),
        ("s3://b/s.tar#bytes=1-2,4-5", "#bytes=FIRST-LAST"),
        ("s3://b/s.tar#bytes=１-2", "#bytes=FIRST-LAST"),
    ],
)
def test_uris_that_name_no_picture_are_refused(uri: str, expected: str) -> None:
    with pytest.raises(RefusalError, match=expected):
        picture_at(uri, "key")


def test_what_lies_at_a_uri_no_more_is_unreadable(shard: Path, tmp_path: Path) -> None:
    with pytest.raises(UnreadablePictureError, match="No such file"):
        picture_at((tmp_path / "gone.jpg").as_uri(), "gone").read()
    end = shard.stat().st_size
    with pytest.raises(UnreadablePictureError, match="ends before byte"):
        picture_at(f"{shard.as_uri()}#bytes={end - 10}-{end + 10}", "cut").read()
    with pytest.raises(UnreadablePictureError, match="at most 10 are accepted"):
        picture_at(f"{shard.as_uri()}#bytes=0-99", "large").read(DecodeLimits(max_bytes=10))


def test_a_server_without_ranges_is_refused_before_anything_is_read(store: str) -> None:
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    class Whole(MemoryFileSystem):  # type: ignore[misc]
        """Answers as servers do that ignore the header Range."""

        protocol = "whole"

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            stripped: str = super()._strip_protocol(path.replace("whole://", "memory://"))
            return stripped

        def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: object) -> bytes:
            data: bytes = super().cat_file(path)
            return data

    fsspec.register_implementation("whole", Whole, clobber=True)
    with pytest.raises(RefusalError, match=r"s\.tar: the server sends whole files where parts are asked for"):
        list_sources(["whole://store/s.tar"])
    assert len(list_sources(["whole://store/a"]).items) == 2  # whole files are what is wanted there
