"""A million damaged pictures: pixels of the right shape, or one refusal, within time and memory; nothing else.

    python -m benchmarks.fuzz_pictures --out FOLDER [--inputs 1000000] [--seed 0]
    python -m benchmarks.fuzz_pictures --out FOLDER --quick

Small pictures of every format that we accept, in the modes that it has, with each EXIF orientation, animated, tiled and
compressed in several ways, are mutated: bits and bytes, cuts, doubled, moved and foreign parts, numbers of two and four
bytes replaced by extreme ones (sizes in headers among them), parts of two files joined. Each goes through `preprocess` as
the server calls it. Workers are processes with limited memory, that say what they are at before they begin: one that dies or
takes more than `--seconds` of CPU for a picture has found something, as has any other exception. Findings are written to
FOLDER/findings, made smaller first where that is quick. Run again, it goes on after the last whole block
(FOLDER/progress.json), and tries pictures that were stopped once more.

`--coverage` has atheris (libFuzzer) choose the mutations instead, by what they reach in our own Python; Pillow's C code is
not instrumented.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import resource
import struct
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.record import cpu_name, finish
from export.preprocess import DecodeLimits, PreprocessSpec, UnreadablePictureError, preprocess

SPEC = PreprocessSpec(size=24)
LIMITS = DecodeLimits(max_bytes=2**20, max_pixels=1_000_000)
# Address space beyond what a worker has at its start: of a million pixels no decoder needs more.
ROOM = 512 * 2**20
BLOCK = 2000
REASONS = ("IMAGE_EMPTY", "IMAGE_UNDECODABLE", "IMAGE_TOO_LARGE", "IMAGE_TOO_SMALL")
EXTREME = (
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    1000,
    1001,
    65535,
    46341,
)


def seeds() -> list[bytes]:
    """Sound pictures."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 4, 3), dtype=np.uint8))
    colours = coarse.resize((28, 20), Image.Resampling.BICUBIC)
    grey16 = Image.fromarray(np.asarray(colours.convert("L"), np.uint16) * 257)
    modes = {m: colours.convert(m) for m in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "F")}
    found: list[bytes] = []

    def add(image: Image.Image, kind: str, **options: Any) -> None:
        buffer = io.BytesIO()
        image.copy().save(buffer, kind, **options)
        found.append(buffer.getvalue())

    def frames() -> list[Image.Image]:  # new ones, as saving leaves settings in them
        return [colours.rotate(90), colours.rotate(180)]

    exif = Image.Exif()
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        for kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF"):
            if orientation in (3, 6) or kind == "JPEG":
                add(colours, kind, exif=exif)
    for mode in ("L", "RGB", "CMYK"):
        add(modes[mode], "JPEG", quality=80)
        add(modes[mode], "JPEG", progressive=True, subsampling=0, restart_marker_blocks=2)
    add(colours, "MPO", save_all=True, append_images=frames())
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        add(modes[mode], "PNG")
    add(grey16, "PNG")
    add(colours, "PNG", save_all=True, append_images=frames(), duration=50)
    add(modes["P"], "PNG", transparency=3)
    for options in ({}, {"lossless": True}, {"quality": 20}):
        add(modes["RGBA"], "WEBP", **options)
    add(colours, "WEBP", save_all=True, append_images=frames(), duration=50)
    add(modes["P"], "GIF")
    add(modes["P"], "GIF", transparency=3, interlace=1)
    add(colours, "GIF", save_all=True, append_images=frames(), duration=50)
    for mode in ("1", "L", "P", "RGB", "RGBA"):
        add(modes[mode], "BMP")
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd", "lzma"):
        add(colours, "TIFF", compression=compression)
    for compression in ("group3", "group4", "tiff_ccitt"):
        add(modes["1"], "TIFF", compression=compression)
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "LAB", "I", "F"):
        add(modes[mode], "TIFF")
    add(grey16, "TIFF")
    add(colours, "TIFF", save_all=True, append_images=frames())
    for mode in ("1", "L", "RGB", "I"):
        add(modes[mode], "PPM")
    add(grey16, "PPM")
    found += [b"P3 3 2 255\n" + b"10 20 30 " * 6 + b"\n" * 4, b"P1\n8 5\n" + b"1 0 " * 20, b"P2 5 5 99\n" + b"7 " * 25]
    add(modes["RGBA"], "AVIF", quality=40)
    add(colours, "AVIF", save_all=True, append_images=frames())
    return found


class Mutations:
    """Inputs by number: the same number gives the same bytes."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._seeds = seeds()

    def __len__(self) -> int:
        return len(self._seeds)

    def input(self, number: int) -> bytes:
        """The seeds themselves come first."""
        if number < len(self._seeds):
            return self._seeds[number]
        rng = random.Random(self._seed * 10**12 + number)
        data = bytearray(rng.choice(self._seeds))
        kinds: tuple[Callable[[random.Random, bytearray], None], ...] = (
            _bits, _bits, _bytes, _number, _number, _number, _cut, _double, _move, _erase, self._foreign, self._join
        )  # fmt: skip
        for _ in range(rng.choice((1, 1, 1, 2, 3, 5, 9))):
            rng.choice(kinds)(rng, data)
            if not data:
                break
        return bytes(data)

    def _foreign(self, rng: random.Random, data: bytearray) -> None:
        other = rng.choice(self._seeds)
        start = rng.randrange(len(other))
        part = other[start : start + rng.randrange(1, 64)]
        at = _place(rng, data)
        data[at : at + (len(part) if rng.random() < 0.5 else 0)] = part

    def _join(self, rng: random.Random, data: bytearray) -> None:
        other = rng.choice(self._seeds)
        data[rng.randrange(len(data)) :] = other[rng.randrange(len(other)) :]


def _place(rng: random.Random, data: bytearray) -> int:
    """Headers count more than what follows."""
    return rng.randrange(min(len(data), rng.choice((16, 64, 256, len(data)))))


def _bits(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[_place(rng, data)] ^= 1 << rng.randrange(8)


def _bytes(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.choice((1, 2, 4, 16))):
        data[_place(rng, data)] = rng.randrange(256)


def _number(rng: random.Random, data: bytearray) -> None:
    form = rng.choice(("<H", ">H", "<I", ">I", "B"))
    size = struct.calcsize(form)
    at = _place(rng, data)
    if at + size <= len(data):
        old = int.from_bytes(data[at : at + size], "little" if form[0] == "<" else "big")
        value = rng.choice(EXTREME) if rng.random() < 0.7 else old + rng.choice((-1, 1, 16, -16, 256))
        struct.pack_into(form, data, at, value % (1 << (8 * size)))


def _cut(rng: random.Random, data: bytearray) -> None:
    del data[rng.randrange(len(data)) :]


def _double(rng: random.Random, data: bytearray) -> None:
    at = _place(rng, data)
    data[at:at] = data[at : at + rng.randrange(1, 200)] * rng.choice((1, 1, 2, 20))


def _move(rng: random.Random, data: bytearray) -> None:
    at, size = _place(rng, data), rng.randrange(1, 40)
    part = data[at : at + size]
    del data[at : at + size]
    to = rng.randrange(len(data) + 1)
    data[to:to] = part


def _erase(rng: random.Random, data: bytearray) -> None:
    at = _place(rng, data)
    del data[at : at + rng.randrange(1, 40)]


def outcome(data: bytes) -> str:
    """`ok`, a reason, or what must not be. Refusals whose message Pillow wrote count by their first words."""
    try:
        found = preprocess(data, SPEC, LIMITS)
    except UnreadablePictureError as e:
        if e.reason not in REASONS:
            return f"FINDING reason {e.reason}"
        said = str(e)
        inner = said.partition("(")[2][:28] if said.startswith("the picture is damaged") else ""
        return f"{e.reason} {''.join('#' if c.isdigit() else c for c in inner)}".strip()
    except BaseException as e:
        return f"FINDING {type(e).__name__}: {str(e)[:80]}"
    if found.pixels.shape != (24, 24, 3) or found.pixels.dtype != np.uint8:
        return f"FINDING pixels {found.pixels.shape} {found.pixels.dtype}"
    return "ok" if min(found.width, found.height) >= LIMITS.min_side else "FINDING too small, and accepted"


def _work(pipe: Connection, seed: int) -> None:
    """Blocks as they come; says in a file what it is at."""
    warnings.simplefilter("ignore")
    mutations = Mutations(seed)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pipe.send(("ready", peak))
    while True:
        first, last, at = pipe.recv()
        counts: Counter[str] = Counter()
        slowest = (0.0, 0)
        findings = []
        with open(at, "r+b", buffering=0) as note:
            for number in range(first, last):
                data = mutations.input(number)
                note.seek(0)
                note.write(struct.pack("<Qd", number, time.process_time()))
                start = time.process_time()
                said = outcome(data)
                slowest = max(slowest, (time.process_time() - start, number))
                counts[said] += 1
                if said.startswith("FINDING"):
                    findings.append((number, said))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        pipe.send(("done", first, counts, slowest, findings, peak))


class Worker:
    """A process with a pipe, and a file that says what it is at."""

    def __init__(self, out: Path, number: int, seed: int) -> None:
        self.note = out / f"at-{number}"
        self.note.write_bytes(struct.pack("<Qd", 0, math.inf))
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, seed), daemon=True)
        self.process.start()
        theirs.close()
        _, self.floor = self.pipe.recv()
        self.block: tuple[int, int] | None = None

    def give(self, first: int, last: int) -> None:
        self.block = first, last
        self.note.write_bytes(struct.pack("<Qd", first, math.inf))
        self.pipe.send((first, last, str(self.note)))

    def at(self) -> tuple[int, float]:
        """Number of the input, and CPU seconds since it began: how busy the machine is says nothing of a picture."""
        number, began = struct.unpack("<Qd", self.note.read_bytes())
        used = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(number), (int(used[11]) + int(used[12])) / os.sysconf("SC_CLK_TCK") - began


class Fuzzing:
    """Blocks of inputs over workers; what they find is kept."""

    def __init__(self, out: Path, seed: int, workers: int, seconds: float) -> None:
        self._out, self._seed, self._seconds = out, seed, seconds
        self._file = out / "progress.json"
        (out / "findings").mkdir(parents=True, exist_ok=True)
        known = json.loads(self._file.read_text()) if self._file.is_file() else {}
        if known and known["seed"] != seed:
            raise SystemExit(f"{out} was begun with seed {known['seed']}: pass it, or another folder")
        self.done: int = known.get("done", 0)
        self.counts: Counter[str] = Counter(known.get("counts", {}))
        self.slowest: tuple[float, int] = tuple(known.get("slowest", (0.0, 0)))  # type: ignore[assignment]
        self.findings: list[tuple[int, str]] = [tuple(each) for each in known.get("findings", [])]  # type: ignore[misc]
        self.peak: int = known.get("peak", 0)
        self._mutations = Mutations(seed)
        self._workers = [Worker(out, i, seed) for i in range(workers)]

    def run(self, inputs: int) -> None:
        """Up to so many, those of former runs included."""
        todo: Iterator[tuple[int, int]] = ((low, min(low + BLOCK, inputs)) for low in range(self.done, inputs, BLOCK))
        finished: set[int] = set()  # blocks beyond the first that is not
        started, before, said = time.monotonic(), self.done, 0.0
        stopped = [each for each in self.findings if each[1].startswith("FINDING more")]
        self.findings = [each for each in self.findings if each not in stopped]
        self.counts -= Counter(said for _, said in stopped)
        again = [(number, number + 1) for number, _ in stopped]  # of a former run: tried once more
        todo = itertools.chain(again, todo)
        for worker in self._workers:
            self._next(worker, todo)
        while any(worker.block for worker in self._workers):
            busy = [worker for worker in self._workers if worker.block]
            ready = wait([worker.pipe for worker in busy], timeout=1.0)
            for i, worker in enumerate(self._workers):
                if worker.block is None:
                    continue
                if worker.pipe in ready:
                    try:
                        self._took(worker.pipe.recv(), worker)
                    except EOFError:
                        self._replace(i, "FINDING the process died")
                        continue
                    if worker.block not in again:
                        finished.add(worker.block[0])
                    self._next(worker, todo)
                elif worker.at()[1] > self._seconds:
                    self._replace(i, f"FINDING more than {self._seconds:g} s")
            while self.done in finished:
                finished.remove(self.done)
                self.done = min(self.done + BLOCK, inputs)
            if time.monotonic() - said > 20:
                said = time.monotonic()
                self._save()
                rate = (self.done - before) / (said - started)
                print(
                    f"{self.done:>10,} of {inputs:,}   {rate:,.0f}/s   {len(self.counts)} outcomes   "
                    f"{len(self.findings)} findings   slowest {self.slowest[0]:.2f} s   peak {self.peak >> 10} MiB",
                    flush=True,
                )
        self._save()
        for worker in self._workers:
            worker.process.kill()

    def _next(self, worker: Worker, todo: Iterator[tuple[int, int]]) -> None:
        block = next(todo, None)
        worker.block = None
        if block is not None:
            worker.give(*block)

    def _took(self, message: tuple[Any, ...], worker: Worker) -> None:
        _, _, counts, slowest, findings, peak = message
        self.counts += counts
        self.slowest = max(self.slowest, slowest)
        self.peak = max(self.peak, peak - worker.floor)
        for number, said in findings:
            self._found(number, said)

    def _replace(self, i: int, said: str) -> None:
        """The input that a process died of, or hangs in, is left out; the rest of its block is done by another."""
        worker = self._workers[i]
        assert worker.block is not None
        number, last = worker.at()[0], worker.block[1]
        worker.process.kill()
        worker.process.join()
        self._found(number, f"{said} (exit code {worker.process.exitcode})")
        self.counts[said] += 1
        first = worker.block[0]
        self._workers[i] = Worker(self._out, i, self._seed)
        # Counts of what it did before are lost with it: they are counted as what they were, unknown.
        self.counts["(not known, as the process was stopped later)"] += number - first
        self._workers[i].give(number + 1, last)
        self._workers[i].block = first, last

    def _found(self, number: int, said: str) -> None:
        self.findings.append((number, said))
        data = self._mutations.input(number)
        if said.startswith("FINDING") and "process" not in said and "more than" not in said:
            data = smaller(data, said.split(":")[0])
        name = f"{said.split()[1].strip(':')}-{hashlib.sha256(data).hexdigest()[:10]}"
        (self._out / "findings" / name).write_bytes(data)
        print(f"input {number}: {said}   {len(data)} bytes in findings/{name}", flush=True)

    def _save(self) -> None:
        state = {
            "seed": self._seed, "done": self.done, "counts": self.counts, "slowest": self.slowest, "peak": self.peak,
            "findings": self.findings,
        }  # fmt: skip
        temporary = self._file.with_suffix(".new")
        temporary.write_text(json.dumps(state))
        os.replace(temporary, self._file)  # noqa: PTH105


def smaller(data: bytes, kind: str) -> bytes:
    """Fewer bytes of the same outcome: parts are left out as long as that works."""
    step = len(data) // 2
    while step:
        at = 0
        while at < len(data):
            shorter = data[:at] + data[at + step :]
            if outcome(shorter).startswith(kind):
                data = shorter
            else:
                at += step
        step //= 2
    return data


def by_coverage(out: Path, inputs: int, seed: int) -> None:
    """libFuzzer over our Python."""
    import atheris

    corpus = out / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for data in seeds():
        (corpus / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()

    def one(data: bytes) -> None:
        said = outcome(data)
        counts[said] += 1
        if said.startswith("FINDING"):
            raise AssertionError(said)

    atheris.instrument_func(preprocess)
    flags = [f"-runs={inputs}", f"-seed={seed + 1}", "-max_len=20000", "-rss_limit_mb=2048", "-timeout=10"]
    atheris.Setup([sys.argv[0], str(corpus), *flags, f"-artifact_prefix={out}/findings/"], one)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=5.0, help="longest time for a picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--coverage", action="store_true", help="atheris instead of our own mutations (pip install atheris)"
    )
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    inputs = 20_000 if args.quick else args.inputs
    args.out.mkdir(parents=True, exist_ok=True)
    if args.coverage:
        (args.out / "findings").mkdir(exist_ok=True)
        by_coverage(args.out, inputs, args.seed)
        return
    fuzzing = Fuzzing(args.out, args.seed, args.workers, args.seconds)
    fuzzing.run(inputs)
    print(f"\n{cpu_name()}, {args.workers} processes, {len(fuzzing._mutations)} seeds")
    for said, count in fuzzing.counts.most_common(40):
        print(f"  {count:>9,}  {said}")
    reasons = Counter[str]()
    for said, count in fuzzing.counts.items():
        reasons[" ".join(said.split()[:1])] += count
    figures = {
        "inputs": fuzzing.done, "seeds": len(seeds()),
        "distinct outcomes": len(fuzzing.counts), "outcomes": dict(reasons.most_common()),
        "findings": [said for _, said in fuzzing.findings], "slowest, s": round(fuzzing.slowest[0], 3),
        "memory beyond the start, MiB": fuzzing.peak >> 10,
    }  # fmt: skip
    goals = [
        ("inputs_without_a_finding", 1 - len(fuzzing.findings) / max(1, fuzzing.done), 1.0),
        ("seconds_below_the_bound", args.seconds - fuzzing.slowest[0], 0.0),
    ]
    finish("fuzz_pictures", figures, goals, args.seed, args.quick)


if __name__ == "__main__":
    main()
