"""Similar pictures, from a folder to answers over gRPC: index → serve → query, with the encoder that comes with likewise.

    make demo                          photographs that ship with scikit-image and scikit-learn, many views of each
    make demo IMAGES=~/Pictures        your own pictures
    make demo-train [IMAGES=…]         the whole chain: train an encoder on these pictures alone, export it, then the same

Everything lands in demo/. Interrupted and run again, it continues where it was.
"""

from __future__ import annotations

import argparse
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from export.bundle import sha256_json
from export.preprocess import PictureFile, find_pictures
from service.client import CallError, Client, Neighbor
from service.sheet import Mark, Tile, draw_sheet, picture_of

# The photographs inside the wheels; drawings, text and test patterns are left out.
SKIMAGE = (
    "astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "hubble_deep_field", "ihc", "moon",
    "motorcycle_left", "motorcycle_right", "retina", "rocket",
)  # fmt: skip
SKLEARN = ("china", "flower")
QUERIES_SHOWN = 6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="your own folder of pictures")
    parser.add_argument("--train", action="store_true", help="train an encoder on these pictures, too")
    parser.add_argument("--minutes", type=float, default=2.0, help="training time (default: 2)")
    parser.add_argument("--out", type=Path, default=Path("demo"))
    args = parser.parse_args()
    start = time.monotonic()

    if args.images:
        pictures = args.images.expanduser().resolve()
        if not pictures.is_dir():
            sys.exit(f"likewise: {pictures} is not a folder: pass IMAGES=FOLDER with your pictures")
        found = find_pictures(pictures)
        # One workplace per set of pictures: what was trained on others must not be taken for theirs.
        place = args.out / f"own-{sha256_json([str(pictures), [(p.key, p.size) for p in found]])[:8]}"
        queries = _own_queries(found, place)
    else:
        place = args.out / "photographs"
        pictures, queries = photographs(place)

    names = ["default"]
    if args.train:
        names = ["untrained", "run", "default"]
        _step("train: SOP, on these pictures alone")
        common = ["--encoder", "vit_micro", "--image-size", "48", "--patch-size", "8", "--device", "auto"]
        train = ["train", str(pictures), *common, "--resume"]
        _likewise(*train, "--out", str(place / "untrained"), "--steps", "0", quiet=True)
        _likewise(*train, "--out", str(place / "run"), "--minutes", str(args.minutes))
        _step("export: one ONNX file, proven against the network")
        for name in ("untrained", "run"):
            _likewise("export", str(place / name), "--out", str(place / f"bundle-{name}"), quiet=name == "untrained")
    shown = "run" if args.train else "default"
    _step("index: embed the pictures, build a collection")
    for name in names:
        build = ["index", "build", *_bundle(place, name), "--images", str(pictures)]
        _likewise(*build, "--out", str(place / f"collections-{name}" / "pictures"), quiet=name != shown)
    _step("serve and query, over gRPC")
    right = {name: _query(place, name, queries, place / "sheet.png" if name == shown else None) for name in names}
    print()
    known = right[shown]
    if known is not None and args.train:
        print(f"Recall@1 of {known.queries} queries whose scene is known: {known} after training, ", end="")
        print(f"{right['untrained']} with the same network untrained, {right['default']} with likewise's own encoder.")
    elif known is not None:
        print(f"{known.right} of {known.queries} queries found a picture of their own scene first ({known}).")
    minutes = (time.monotonic() - start) / 60
    print(f"The contact sheet is {place / 'sheet.png'}. This took {minutes:.1f} minutes.\n")
    print("Next:")
    bundle = "".join(f" {part}" for part in _bundle(place, shown))
    print(f"  .venv/bin/likewise serve{bundle} --collections {place / f'collections-{shown}'} &")
    print("  .venv/bin/likewise query PICTURE.jpg --out sheet.png")
    if not args.images:
        print("  make demo IMAGES=~/Pictures        # the same with your own")
    if not args.train:
        print("  make demo-train                    # train an encoder, too (installs torch, 6 GB)")
    return 0


class Right(NamedTuple):
    """Queries whose first neighbour is the right one."""

    right: int
    queries: int

    def __str__(self) -> str:
        return f"{self.right / self.queries:.0%}"


def _bundle(place: Path, name: str) -> list[str]:
    """Flags that name an encoder; none for the default one."""
    return [] if name == "default" else ["--bundle", str(place / f"bundle-{name}")]


class Query:
    """A picture to ask with, and what is known of its answer."""

    def __init__(self, path: Path, scene: str | None, leave_out: str | None) -> None:
        self.path, self.scene, self.leave_out = path, scene, leave_out


def _own_queries(found: list[PictureFile], place: Path) -> list[Query]:
    place.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    labels = [p.folder for p in found]
    known = len(set(labels)) > 1 and "" not in labels
    chosen = sorted(rng.permutation(len(found))[:100].tolist())

    def query(picture: PictureFile) -> Query:
        return Query(picture.path, picture.folder if known else None, picture.key)

    return [query(found[i]) for i in chosen]


def photographs(place: Path) -> tuple[Path, list[Query]]:
    """Write the demo's pictures: `pictures/SCENE/NN.jpg` to train and search, `queries/SCENE.NN.jpg` to ask with."""
    done = place / "pictures.json"
    pictures, queries = place / "pictures", place / "queries"
    if not done.is_file():
        print("writing the demo's pictures: views of the photographs in scikit-image and scikit-learn")
        for scene, photograph in _scenes():
            rng = np.random.default_rng(list(scene.encode()))
            (pictures / scene).mkdir(parents=True, exist_ok=True)
            queries.mkdir(parents=True, exist_ok=True)
            for i in range(15):
                data = _view(photograph, i, rng)
                to = pictures / scene / f"{i:02d}.jpg" if i < 12 else queries / f"{scene}.{i:02d}.jpg"
                to.write_bytes(data)
        done.write_text(json.dumps({"source": "scikit-image and scikit-learn", "views": 15}))
    return pictures, [Query(p.path, p.key.split(".")[0], None) for p in find_pictures(queries)]


def _scenes() -> list[tuple[str, Image.Image]]:
    import skimage
    import sklearn.datasets

    data = Path(skimage.__file__).parent / "data"
    found = []
    for name in SKIMAGE:
        path = next((p for p in (data / f"{name}.png", data / f"{name}.jpg") if p.is_file()), None)
        if path is not None:
            found.append((name.split("_")[0], path))
    found += [(name, Path(sklearn.datasets.__file__).parent / "images" / f"{name}.jpg") for name in SKLEARN]
    scenes: dict[str, Image.Image] = {}
    for name, path in found:
        with Image.open(path) as image:
            photograph = image.convert("RGB")
        photograph.thumbnail((640, 640))
        scenes.setdefault(name, photograph)
    return list(scenes.items())


def _view(photograph: Image.Image, number: int, rng: np.random.Generator) -> bytes:
    """One edited view of a photograph, encoded as JPEG; number 0 is the photograph itself."""
    image, quality = photograph, 90
    width, height = image.size
    if number:
        kind = number % 5
        share = rng.uniform(0.45, 0.9)
        w, h = int(width * share**0.5), int(height * share**0.5)
        left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
        image = image.crop((left, top, left + w, top + h))
        if kind == 0:
            image = image.rotate(rng.uniform(-25, 25), Image.Resampling.BICUBIC, fillcolor=(128, 128, 128))
        elif kind == 1:
            image = ImageEnhance.Color(image).enhance(rng.uniform(0, 2))
            image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.5, 1.5))
        elif kind == 2:
            image = ImageOps.mirror(image).filter(ImageFilter.GaussianBlur(rng.uniform(1, 4)))
        elif kind == 3:
            image = ImageOps.expand(image, int(0.1 * min(w, h)), tuple(rng.integers(0, 256, 3).tolist()))
        else:
            image, quality = ImageOps.grayscale(image), 20
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _query(place: Path, name: str, queries: list[Query], sheet: Path | None) -> Right | None:
    """Ask a server of its own, and draw the contact sheet where asked for; None where the truth is not known."""
    log = place / f"serve-{name}.log"
    with log.open("w") as file:
        server = subprocess.Popen(
            [*_COMMAND, "serve", *_bundle(place, name), "--collections", str(place / f"collections-{name}"),
             "--port", "0", "--metrics-port", "0"],
            stderr=file,
        )  # fmt: skip
    try:
        address = _address(server, log)
        with Client(address) as client:
            answers = [_ask(client, query) for query in queries]
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)
    if sheet is not None:
        print(f"{len(queries)} queries answered by {address}")
        _show(queries, answers, sheet)
    right = [n[0].payload.get("folder") == q.scene for q, n in zip(queries, answers, strict=True) if q.scene and n]
    return Right(sum(right), len(right)) if right else None


def _ask(client: Client, query: Query) -> list[Neighbor]:
    try:
        found = client.search("pictures", image=query.path.read_bytes(), top_k=7)
    except CallError as e:
        print(f"  {query.path.name}: {e}")
        return []
    return [n for n in found if n.key != query.leave_out][:6]


def _show(queries: list[Query], answers: list[list[Neighbor]], sheet: Path) -> None:
    rows = []
    step = max(1, len(queries) // QUERIES_SHOWN)
    for query, neighbors in list(zip(queries, answers, strict=True))[::step][:QUERIES_SHOWN]:
        if not neighbors:
            continue
        shown = ", ".join(f"{n.key} {n.score:.2f}" for n in neighbors[:4])
        print(f"  {query.leave_out or query.path.name:<28} → {shown}")
        tiles = []
        for n in neighbors:
            mark: Mark = "right" if n.payload.get("folder") == query.scene else "wrong"
            if query.scene is None:
                mark = "none"
            tiles.append(Tile(picture_of(n.source_uri, n.key, None), f"{n.score:.2f} {n.key}", mark))
        rows.append((Tile(query.path.read_bytes(), query.path.name), tiles))
    if rows:
        draw_sheet(rows, sheet)


_COMMAND = [sys.executable, "-m", "likewise"]


def _likewise(*arguments: str, quiet: bool = False) -> None:
    done = subprocess.run([*_COMMAND, *arguments], check=False, stderr=subprocess.PIPE if quiet else None, text=True)
    if done.returncode:
        if quiet:
            print(done.stderr, file=sys.stderr)
        sys.exit(done.returncode)


def _address(server: subprocess.Popen[bytes], log: Path) -> str:
    """Where the server says that it listens."""
    for _ in range(300):
        for line in log.read_text().splitlines():
            if line.startswith("serving "):
                return line.split(" on ")[1].split()[0]
        if server.poll() is not None:
            break
        time.sleep(0.1)
    sys.exit(f"likewise: the server did not start:\n{log.read_text()}")


def _step(title: str) -> None:
    print(f"\n── {title}", flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nlikewise: interrupted; the same command continues", file=sys.stderr)
        sys.exit(130)
