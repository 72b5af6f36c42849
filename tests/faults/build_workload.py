"""A process that builds a collection from a folder, follows it, and embeds it again, by the real commands; it says so.

    python -m tests.faults.build_workload DISK MARKERS WORK SABOTAGE

SABOTAGE takes one of our syncs away (workload.py). WORK holds the bundles `bundle` and `other`, and the folders `first` and
`then`, which `images` becomes a copy of in turn. Shards and segments are small, so that there are several.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from likewise import main as likewise
from tests.faults.workload import sabotage

NAME = "shelf/things"
"""The collection on the disk."""
AGAIN = "shelf/again"
"""What is embedded again of it."""


class Command(NamedTuple):
    """One of the commands, and what lies in the folder then."""

    name: str
    folder: str


COMMANDS = (Command("build", "first"), Command("sync", "then"), Command("reembed", "then"))


def show(work: Path, folder: str) -> None:
    """Make WORK/images a copy of one of the folders, times included."""
    shutil.rmtree(work / "images", ignore_errors=True)
    shutil.copytree(work / folder, work / "images")


def run(command: str, disk: Path, work: Path) -> int:
    """Run a command to its end; its exit code."""
    flags = ["--threads", "1", "--device", "cpu", "--variant", "fp32"]
    if command == "reembed":
        bundle, out = work / "other", disk / AGAIN
        arguments = [str(disk / NAME)]
    else:
        bundle, out = work / "bundle", disk / NAME
        arguments = ["--images", str(work / "images")]
        arguments += ["--max-delete", "1"] if command == "sync" else []
    with patch("service.embedding.SHARD", 4), patch("service.build.GROUP", 8), patch("service.reembed.ROUND", 8):
        return likewise(["index", command, *arguments, "--bundle", str(bundle), "--out", str(out), *flags])


def main(disk: Path, markers: Path, work: Path, name: str) -> None:
    """Run all commands."""
    with markers.open("wb", buffering=0) as said, sabotage(name, disk):
        for command in COMMANDS:
            show(work, command.folder)
            said.write(json.dumps({"begin": command.name}).encode())
            code = run(command.name, disk, work)
            assert code == 0, f"{command} ends with {code}"
            said.write(json.dumps({"done": command.name}).encode())


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), sys.argv[4])
