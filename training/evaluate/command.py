"""`likewise evaluate SOURCE DATA --out FOLDER`: open, choose the tasks, extract features, measure, write.

OUT/
    results.json        every figure with its protocol, seed and digests
    *.png               bars, precision against recall, neighbours
    features/           what a repeated evaluation reuses (features.py)
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from export.bundle import RefusalError, make_folder, printable, write_file, write_unreadable
from export.machine import cpu_quota
from training.evaluate import plots
from training.evaluate.config import Evaluate, Task
from training.evaluate.encoders import open_source, renamed
from training.evaluate.report import print_tables
from training.evaluate.sheets import neighbor_sheets
from training.evaluate.tasks import Evaluation

RESULTS_FORMAT = 1
_SURROGATES = re.compile("[\ud800-\udfff]")


def evaluate(asked: Evaluate) -> int:
    """Run `likewise evaluate`; returns the exit code. Raises `RefusalError`."""
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise RefusalError("--device cuda was asked for, but torch sees no CUDA device: check nvidia-smi, or use cpu")
    _refuse(asked)
    device = torch.device("cuda" if asked.device != "cpu" and torch.cuda.is_available() else "cpu")
    threads = asked.threads or cpu_quota()
    torch.set_num_threads(threads)
    encoders = [open_source(asked.source, asked, device, threads, console.print)]
    if asked.against is not None:
        other = open_source(asked.against, asked, device, threads, console.print)
        first = encoders[0].extractor.name
        if other.extractor.name == first:
            encoders[0], other = renamed(encoders[0], f"{first} (source)"), renamed(other, f"{first} (against)")
        encoders.append(other)

    with _bars(console) as bar:
        evaluation = Evaluation(asked, encoders, bar)
        tasks = evaluation.choose()
        console.print(f"tasks: {', '.join(tasks)}" + ("" if asked.tasks else "  (what the data offer)"))
        make_folder(asked.out)
        measured: dict[str, Any] = {task: evaluation.measure(task) for task in tasks}
        if len(encoders) == 2:
            measured["agreement"] = evaluation.agreement()
    results = _unicode(measured)
    _unreadable(evaluation, asked, console)
    for note in evaluation.notes:
        console.print(printable(note))
    # A file or a pipe has no width of its own.
    print_tables(Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120), results)
    stored = {
        "format_version": RESULTS_FORMAT,
        "encoders": {e.extractor.name: e.about | {"digest": e.extractor.digest} for e in encoders},
        "data": evaluation.about_data(),
        "settings": asked.model_dump(),
        "unreadable": len(evaluation.unreadable),
        "notes": evaluation.notes,
        "tasks": results,
    }
    write_file(asked.out / "results.json", json.dumps(_unicode(stored), indent=2, ensure_ascii=False))
    drawn = _draw(evaluation, results, tasks, asked)
    console.print(printable(f"done: {asked.out / 'results.json'}, {', '.join(drawn)}"))
    return 0


def _refuse(asked: Evaluate) -> None:
    """What would be ignored, or would spoil the next evaluation. Raises `RefusalError`."""
    sources = [s for s in (asked.source, asked.against) if s is not None]
    given = [
        f"--{name.replace('_', '-')}" for name in ("model", "normalization", "patch_size")
        if getattr(asked, name) is not None
    ]  # fmt: skip
    if given and all(s.is_dir() for s in sources):
        raise RefusalError(
            f"{' and '.join(given)} says how to read a file of weights, but {' and '.join(map(str, sources))} says so "
            "itself: leave it out"
        )
    for folder in (asked.data, asked.bank, asked.gallery):
        if folder is not None and asked.out.resolve().is_relative_to(folder.resolve()):
            raise RefusalError(
                f"--out {asked.out} lies in {folder}, so that its plots would count as pictures next time: give a folder "
                "outside"
            )


def _unicode(value: Any) -> Any:
    """A JSON value whose texts can be written: bytes of a path that are not UTF-8 (Python's surrogates) become U+FFFD."""
    if isinstance(value, dict):
        return {_unicode(key): _unicode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_unicode(item) for item in value]
    if isinstance(value, str | Path):
        return _SURROGATES.sub("\ufffd", str(value))
    return value


def _draw(evaluation: Evaluation, results: dict[str, Any], tasks: list[Task], asked: Evaluate) -> list[str]:
    drawn = [plots.bars(results, [e.extractor.name for e in evaluation.encoders], asked.out / "scores.png")]
    if "copies" in tasks:
        drawn.append(plots.precision_recall(evaluation.curves, asked.out / "precision_recall.png"))
    for number, sheet in enumerate(neighbor_sheets(evaluation)):
        name = "neighbors.png" if number == 0 else "neighbors_against.png"
        drawn.append(plots.neighbors(sheet, asked.out / name))
    return drawn


def _unreadable(evaluation: Evaluation, asked: Evaluate, console: Console) -> None:
    found = evaluation.unreadable
    write_unreadable(asked.out / "unreadable.tsv", found)
    if found:
        console.print(
            printable(
                f"{len(found)} files are skipped, for example {found[0][0]}: {found[0][1]} (all in "
                f"{asked.out / 'unreadable.tsv'})"
            )
        )


Bar = Callable[[str, int], Callable[[int], None]]


@contextmanager
def _bars(console: Console) -> Iterator[Bar]:
    """Makes progress bars on a terminal, nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as progress:

        def bar(title: str, total: int) -> Callable[[int], None]:
            task = progress.add_task(title, total=total)
            return lambda count: progress.advance(task, count)

        yield bar
