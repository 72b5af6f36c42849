"""`likewise train`: finds and decodes the pictures, chooses, announces, trains, judges."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from rich.console import Console

from export.bundle import RefusalError, make_folder, printable, read_run, write_unreadable
from export.machine import cpu_quota
from export.sources.listing import list_sources
from training.cache import PictureCache, build_cache
from training.checkpoint import NAME as CHECKPOINT
from training.config import Hardware, Train
from training.distributed import first_rank_first, processes, rank, world_size
from training.loop import Trainer, out_of_memory
from training.monitor import SAMPLE as PLAN_PICTURES
from training.plan import Whole, print_plan
from training.presets import choose_views
from training.progress import bar
from training.resolve import resolve

# What a run folder may hold before its first checkpoint.
_BEFORE = {
    "cache", "unreadable.tsv", "near-duplicates.tsv", "monitor.safetensors", "initial.safetensors", "metrics.jsonl",
    "report", "report.html", "tensorboard", "best.safetensors", "best.json",
}  # fmt: skip


def train(asked: Train) -> int:
    """Run `likewise train`; returns the exit code. Raises `RefusalError`.

    Under torchrun every process calls this; the first one decodes, logs and saves.
    """
    with _processes(asked), _interrupts():
        if asked.shard and world_size() == 1:
            raise RefusalError(
                "--shard splits a model over processes and there is one: start with torchrun, or leave it out"
            )
        quiet = rank() > 0
        console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, quiet=quiet)
        hardware = _hardware(asked)
        torch.set_num_threads(hardware.threads)
        with first_rank_first():
            cache, whole = _pictures(asked, hardware, console)
        spread = torch.linspace(0, len(cache) - 1, min(len(cache), 256)).long()
        views = choose_views(cache.gather(spread, torch.device("cpu"))) if len(cache) else ("photographs", "")
        asked = as_started(asked, hardware)
        recipe, reasons = resolve(asked, whole.pictures, hardware, views)
        try:
            trainer = Trainer(recipe, reasons, cache, asked, hardware, console)
            return print_plan(trainer, whole) if asked.plan else trainer.fit()
        except (MemoryError, RuntimeError) as e:  # torch.OutOfMemoryError is a RuntimeError
            known = isinstance(e, MemoryError | torch.OutOfMemoryError)
            if not known and "can't allocate memory" not in str(e):  # torch's words on a CPU
                raise
            raise RefusalError(out_of_memory(recipe, asked.accumulate, str(e))) from e


def as_started(asked: Train, hardware: Hardware) -> Train:
    """A run that continues keeps the batch that was chosen for it, with whatever number of processes it began."""
    if asked.batch_size is not None or not (asked.resume and (asked.out / "run.json").is_file()):
        return asked
    batch = int(read_run(asked.out).config["batch_size"])
    if batch % hardware.processes:
        raise RefusalError(
            f"the run in {asked.out} has batches of {batch} pictures, which do not divide over {hardware.processes} "
            "processes: start it with a number that does"
        )
    return asked.model_copy(update={"batch_size": batch})


def _pictures(asked: Train, hardware: Hardware, console: Console) -> tuple[PictureCache, Whole]:
    """The cache, of a sample where only a plan is asked for, and what the whole of it is."""
    if not (asked.plan and (asked.out / CHECKPOINT).is_file()):  # a plan may be made for the folder of a run
        _check_folder(asked)
    sources = list_sources(asked.pictures, asked.out / "cache")
    found, unreadable = sources.items, list(sources.unreadable)
    make_folder(asked.out)
    # A run goes on with the pictures that it began with, and keeps the list that it began with.
    started = (asked.out / CHECKPOINT).is_file()
    listed = (asked.out / "cache" if asked.plan or started else asked.out) / "unreadable.tsv"
    # The number of readable pictures decides the sizes that do not depend on the cache's; decode first.
    draft, _ = resolve(asked, max(len(found), 1), hardware)
    name = os.fsencode(sources.name).decode("utf-8", "replace")
    folder, total = asked.out / "cache", len(found)
    if asked.plan and total > 2 * PLAN_PICTURES and not any(folder.glob(f"{draft.cache_size}px-*")):
        folder = folder / "plan"
        found = found[:: total // PLAN_PICTURES]
    since = time.monotonic()
    with bar(console, "decoding", len(found)) as advance:
        cache = build_cache(
            folder, found, name, draft.cache_size, hardware.threads, advance, retry=rank() == 0 and not started
        )
    seconds = time.monotonic() - since
    for notice in cache.notices:
        console.print(notice)
    unreadable += cache.unreadable
    if rank() == 0:
        write_unreadable(listed, unreadable)
    if unreadable:
        console.print(
            f"{len(unreadable)} of {len(found)} files are skipped, for example {printable(unreadable[0][0])}: "
            f"{unreadable[0][1]} (all in {listed})"
        )
    if len(found) == total:
        return cache, Whole(len(cache), 0.0)
    return cache, Whole(total * len(cache) // len(found), seconds * total / len(found))


def _check_folder(asked: Train) -> None:
    if (asked.out / CHECKPOINT).is_file() and not asked.resume:
        raise RefusalError(f"{asked.out} already holds a run: pass --resume to continue it, or choose another --out")
    if rank() > 0 or asked.resume or not asked.out.is_dir():
        return
    if any(p.name not in _BEFORE for p in asked.out.iterdir()):
        raise RefusalError(f"{asked.out} is not empty and holds no run: choose another --out")


@contextmanager
def _processes(asked: Train) -> Iterator[None]:
    """The process group, when torchrun started more than one process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or world_size() > 1:
        yield
        return
    on_gpu = asked.device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    with processes("nccl" if on_gpu else "gloo"):
        yield


@contextmanager
def _interrupts() -> Iterator[None]:
    """Until the loop listens, SIGTERM and SIGUSR1 end the command as Ctrl-C does: what was decoded is kept."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    kinds = (signal.SIGTERM, signal.SIGUSR1)
    before = [signal.signal(kind, stop) for kind in kinds]
    try:
        yield
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)


def _hardware(asked: Train) -> Hardware:
    threads = asked.threads or max(1, cpu_quota() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise RefusalError("--device cuda was asked for, but torch sees no CUDA device: check nvidia-smi, or use cpu")
    if asked.device != "cpu" and torch.cuda.is_available():
        return Hardware("cuda", torch.cuda.get_device_name(), threads, torch.cuda.is_bf16_supported(), world_size())
    # bfloat16 is faster on CPUs with tile instructions only; elsewhere it is emulated, 10 times slower (measured).
    fast = bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())
    return Hardware("cpu", f"{threads} CPU threads", threads, fast, world_size())
