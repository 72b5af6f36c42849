"""The data path from its second epoch on: cached pictures and views, against decoding every epoch with Pillow.

    python -m benchmarks.data_path --out FOLDER [--pictures PICTURES] [--size 224] [--device cpu] [--quick]

Without --pictures: crops of the photographs that ship with scikit-image and scikit-learn, as 640×480 JPEGs. All contenders
use the same number of threads and take turns; medians of the rounds. On a CPU, seconds are those of the process (all its
threads together), so that other work on the machine does not count; on a GPU they are of the clock. kornia is measured where
it is installed.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.record import cpu_name, finish
from export.sources.listing import list_sources
from export.sources.picture import Picture
from training.cache import build_cache
from training.duplicates import near_duplicates
from training.loader import Batches
from training.masks import draw_masks
from training.views import Views

GLOBAL, LOCAL = (0.4, 1.0), (0.1, 0.4)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 32


def write_photographs(folder: Path, count: int) -> Path:
    """Random crops of real photographs as JPEGs of 640×480."""
    import skimage.data
    import sklearn.datasets

    scenes = [Image.fromarray(s) for s in sklearn.datasets.load_sample_images().images]
    scenes += [
        Image.fromarray(getattr(skimage.data, n)()).convert("RGB") for n in ("astronaut", "coffee", "rocket", "chelsea")
    ]
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        scene = scenes[i % len(scenes)]
        w = rng.uniform(0.5, 1.0) * min(scene.width, scene.height * 4 / 3)
        x, y = rng.uniform(0, scene.width - w), rng.uniform(0, scene.height - w * 3 / 4)
        picture = scene.resize((640, 480), Image.Resampling.BICUBIC, box=(x, y, x + w, y + w * 3 / 4))
        picture.save(folder / f"{i:05d}.jpg", quality=90)
    return folder


def pillow(items: list[Picture], side: int, pool: ThreadPoolExecutor, draft: bool) -> None:
    """One epoch of decoding to `side` pixels."""

    def decode(item: Picture) -> Any:
        image = Image.open(io.BytesIO(item.read()))
        if draft:
            image.draft("RGB", (side, side))
        return np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC))

    for low in range(0, len(items), BATCH):
        torch.from_numpy(np.stack(list(pool.map(decode, items[low : low + BATCH]))))


def torchvision_views(items: list[Picture], size: int, local: int, pool: ThreadPoolExecutor) -> None:
    """The usual pipeline: decode with Pillow each epoch, then two global and two local views by torchvision's transforms."""
    from torchvision.transforms import v2

    def chain(side: int, scale: tuple[float, float], blur: float, solarize: float) -> Any:
        return v2.Compose([
            v2.RandomResizedCrop(side, scale, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(), v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8), v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(23 * size // 224 // 2 * 2 + 1, (0.1, 2.0))], blur),
            v2.RandomSolarize(128, solarize),
            v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD),
        ])  # fmt: skip

    chains = [chain(size, GLOBAL, 1.0, 0.0), chain(size, GLOBAL, 0.1, 0.2), *[chain(local, LOCAL, 0.5, 0.0)] * 2]

    def views(item: Picture) -> list[Tensor]:
        image = Image.open(io.BytesIO(item.read())).convert("RGB")
        return [chain(image) for chain in chains]

    for low in range(0, len(items), BATCH):
        rows = list(pool.map(views, items[low : low + BATCH]))
        for number in range(len(chains)):
            torch.stack([row[number] for row in rows])


def kornia_chain(size: int, scale: tuple[float, float], blur: float, solarize: float) -> Any:
    """The same recipe by kornia, on batches."""
    import kornia.augmentation as K

    taps = max(3, 23 * size // 224 // 2 * 2 + 1)
    return torch.nn.Sequential(
        K.RandomResizedCrop((size, size), scale, resample="bicubic", cropping_mode="resample"),
        K.RandomHorizontalFlip(), K.ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8), K.RandomGrayscale(p=0.2),
        K.RandomGaussianBlur((taps, taps), (0.1, 2.0), p=blur), K.RandomSolarize(p=solarize),
        K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    )  # fmt: skip


def crop_error(items: list[Picture], side: int, size: int) -> dict[str, float]:
    """Mean absolute difference (of 255 levels) between crops from the squeezed cache and torchvision's antialiased crops of
    the original: whole picture and a random half, and bilinear sampling of the cache without antialiasing beside it."""
    from torchvision.transforms.v2.functional import InterpolationMode, resized_crop

    from training.presets import PerKind, ViewRecipe

    none = PerKind(0.0, 0.0, 0.0)
    views = Views(ViewRecipe(flip=0, jitter=0, grey=0, blur=none, solarize=none), (0.0,) * 3, (1.0,) * 3)
    cubic = InterpolationMode.BICUBIC
    found: dict[str, list[float]] = {}
    for item in items[:24]:
        image = Image.open(io.BytesIO(item.read())).convert("RGB")
        cached = torch.from_numpy(np.array(image.resize((side, side), Image.Resampling.BICUBIC)))[None]
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        for name, share in (("whole", 1.0), ("half of each side", 0.5)):
            w, h = round(image.width * share), round(image.height * share)
            left, top = (image.width - w) // 2, (image.height - h) // 2
            expected = resized_crop(pixels, top, left, h, w, [size, size], cubic, antialias=True).float()
            draw = views.draw(1, size, (1.0, 1.0), "first", torch.Generator().manual_seed(0))
            box = torch.tensor([[0.5, 0.5, w / image.width, h / image.height]])
            ours = 255 * views.apply(cached, draw._replace(box=box), size)
            theta = torch.tensor([[[share, 0, 0], [0, share, 0.0]]])
            grid = torch.nn.functional.affine_grid(theta, [1, 3, size, size], align_corners=False)
            plain = torch.nn.functional.grid_sample(cached.permute(0, 3, 1, 2).float(), grid, align_corners=False)
            found.setdefault(f"{size} px, {name}, ours", []).append(float((ours - expected).abs().mean()))
            found.setdefault(f"{size} px, {name}, bilinear", []).append(float((plain - expected).abs().mean()))
    return {name: statistics.mean(values) for name, values in found.items()}


def rate(work: Callable[[], object], images: int, clock: Callable[[], float] = time.process_time) -> float:
    """Images per second of one go."""
    start = clock()
    work()
    return images / (clock() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pictures")
    parser.add_argument("--size", type=int, default=224, help="side of a global view")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    count, rounds = (48, 1) if asked.quick else (128, 3)
    size, device = asked.size, torch.device(asked.device)
    local, side = round(size * 3 / 7 / 8) * 8, -(-size * 3 // 2 // 8) * 8
    torch.set_num_threads(asked.threads)
    clock = time.process_time if asked.device == "cpu" else time.perf_counter

    source = asked.pictures or str(write_photographs(asked.out / f"photographs-{count}", count))
    items = list_sources([source]).items[:count]
    seconds = clock()
    cache = build_cache(asked.out / f"cache-{count}-{side}", items, source, side, asked.threads, lambda _: None)
    seconds = clock() - seconds
    images = len(cache) // BATCH * BATCH
    steps = images // BATCH
    views = Views("photographs", MEAN, STD)
    kinds = [("first", size, GLOBAL), ("second", size, GLOBAL), ("local", local, LOCAL), ("local", local, LOCAL)]

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    streaming = Batches(cache, BATCH, 0, device, prefetch=2)

    def deliver(then: Callable[[Tensor, Tensor], object] | None = None) -> None:
        for step in range(steps):
            batch = streaming.local(step)
            if then:
                then(batch.pixels, batch.aspects)
        wait()

    def ours(pixels: Tensor, aspects: Tensor) -> None:
        generator = torch.Generator().manual_seed(0)
        for kind, side_, scale in kinds:
            views(pixels, side_, scale, kind, generator, aspects)  # type: ignore[arg-type]

    contenders: dict[str, Callable[[], object]] = {}
    with ThreadPoolExecutor(asked.threads) as pool:
        contenders["decode with Pillow"] = lambda: pillow(items[:images], side, pool, draft=False)
        contenders["decode with Pillow, draft()"] = lambda: pillow(items[:images], side, pool, draft=True)
        contenders["cache, epoch 2"] = deliver
        contenders["Pillow + torchvision, 2 + 2 views"] = lambda: torchvision_views(items[:images], size, local, pool)
        contenders["cache + our views, 2 + 2"] = lambda: deliver(ours)
        try:
            chains = [
                kornia_chain(s, scale, *p)
                for (_, s, scale), p in zip(kinds, [(1.0, 0.0), (0.1, 0.2), (0.5, 0.0), (0.5, 0.0)], strict=True)
            ]

            def kornia_views(pixels: Tensor, aspects: Tensor) -> None:
                x = pixels.permute(0, 3, 1, 2).float() / 255
                for chain in chains:
                    chain(x)

            contenders["cache + kornia, 2 + 2"] = lambda: deliver(kornia_views)
        except ImportError:
            print("kornia is not installed: left out")
        speed: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(rounds):
            for name, work in contenders.items():
                speed[name].append(rate(work, images, clock))
    streaming.close()
    median = {name: statistics.median(values) for name, values in speed.items()}

    mask_seconds = min(
        1 / rate(lambda: draw_masks(512, 14, 14, 0.5, (0.1, 0.5), "block", torch.Generator().manual_seed(0)), 1)
        for _ in range(20)
    )
    hashes = np.random.default_rng(0).integers(0, 2**63, (2_000 if asked.quick else 100_000, 4)).astype(np.uint64)
    duplicate_seconds = 1 / rate(lambda: near_duplicates(hashes), 1)
    error = {**crop_error(items, side, size), **crop_error(items, side, local)}

    print(
        f"{cpu_name()}, {asked.threads} thread(s), {images} pictures, cache {side} px, views {size} and {local} px, {device}"
    )
    print(f"building the cache: {images / seconds:,.0f} images/s (more where it was there)")
    for name, value in median.items():
        print(f"{name:<36}{value:>10,.0f} images/s")
    print(f"block masks, 512 of 14×14: {1e3 * mask_seconds:.2f} ms")
    print(f"near-duplicates, {len(hashes):,} random hashes: {duplicate_seconds:.1f} s")
    for name, value in error.items():
        print(f"crop against torchvision's of the original, {name}: {value:.2f} of 255")
    goals = [
        ("delivery over Pillow", median["cache, epoch 2"] / median["decode with Pillow"], 10.0),
        (
            "views over Pillow and torchvision",
            median["cache + our views, 2 + 2"] / median["Pillow + torchvision, 2 + 2 views"],
            1.0,
        ),
    ]
    figures: dict[str, Any] = {
        "images_per_second": median, "threads": asked.threads, "device": str(device), "block_masks_ms": 1e3 * mask_seconds,
        "near_duplicates_seconds": duplicate_seconds, "crop_error": error, "size": size, "pictures": images,
    }  # fmt: skip
    finish("data_path", figures, goals, 0, asked.quick)


if __name__ == "__main__":
    main()
