"""A loss of power during `index build`, `sync` and `reembed`: what a command has said is done is there, what was there
stays, and the same command goes on to the end that it would have come to.

Recorded and replayed as in test_power_loss.py.
"""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from export.bundle import RefusalError
from service.collection import Collection
from tests.conftest import encode, noise
from tests.faults.build_workload import AGAIN, COMMANDS, NAME, run, show
from tests.faults.disk import Tree, lose_power
from tests.faults.recording import Recording, record, write_tree
from tests.faults.test_power_loss import _why_not, memory  # noqa: F401 - a fixture

LOSSES = 24

State = dict[str, tuple[Any, ...]]


class Recorded(NamedTuple):
    """The commands, and what each left."""

    work: Path
    recording: Recording
    ends: dict[str, State | None]
    """What the collection and the one that is embedded again hold after each command, by command."""


class Loss(NamedTuple):
    """What a power loss left, and during or after what."""

    name: str
    tree: Tree
    command: str
    done: bool
    """Whether the command has said so."""


def contents(folder: Path) -> State:
    """Key → vector, digest and payload. Raises `RefusalError` where the collection does not open."""
    collection = Collection(folder)
    try:
        collection.verify()
        items = {key: collection.get(key) for key in collection.files()}
        files = collection.files()
        return {
            key: (i.vector.tobytes(), files[key].sha256, i.row.payload, i.row.source_uri) for key, i in items.items()
        }
    finally:
        collection.close()


@pytest.fixture(scope="module")
def recorded(memory: Path, bundle: Path, other_bundle: Path) -> Iterator[Recorded]:  # noqa: F811
    """14 pictures; then two are gone, one is new, one has other bytes, one another name, and one another time."""
    if (reason := _why_not()) is not None:
        pytest.skip(reason)
    work, disk = memory / "work", memory / "work" / "disk"
    first, then = work / "first", work / "then"
    (first / "sub").mkdir(parents=True)
    for i in range(14):
        (first / "sub" / f"{i:02d}.png").write_bytes(encode(noise(20, 16, i), "PNG"))
    (first / "cut.png").write_bytes(encode(noise(20, 16), "PNG")[:99])
    shutil.copytree(first, then)
    (then / "sub" / "01.png").unlink()
    (then / "sub" / "09.png").unlink()
    (then / "new.png").write_bytes(encode(noise(20, 16, 99), "PNG"))
    (then / "sub" / "02.png").write_bytes(encode(noise(20, 16, 98), "PNG"))
    (then / "sub" / "03.png").rename(then / "moved.png")
    (then / "sub" / "04.png").touch()
    shutil.copytree(bundle, work / "bundle")
    shutil.copytree(other_bundle, work / "other")
    recording = make_recording(work, "none")
    ends: dict[str, State | None] = {}
    for command in COMMANDS:  # the same commands without a power loss
        show(work, command.folder)
        assert run(command.name, disk, work) == 0
        ends[command.name] = contents(disk / (AGAIN if command.name == "reembed" else NAME))
    shutil.rmtree(disk)
    yield Recorded(work, recording, ends)
    shutil.rmtree(work)


def make_recording(work: Path, sabotage: str) -> Recording:
    """The commands on an empty disk, which is gone afterwards."""
    disk, markers = work / "disk", work / "markers"
    disk.mkdir()
    places = (str(disk), str(markers), str(work))
    recording = record([sys.executable, "-m", "tests.faults.build_workload", *places, sabotage], disk, markers)
    shutil.rmtree(disk)
    return recording


def losses(recording: Recording, count: int, seed: int) -> Iterator[Loss]:
    """A third of the points right after a command has said that it is done, the others anywhere."""
    rng = random.Random(seed)
    said = [None if marker is None else marker.text for _, marker in recording.replay()]
    acknowledged = [i for i, text in enumerate(said) if text is not None and "done" in text]
    safe = [acknowledged[i % len(acknowledged)] for i in range(count // 3)]
    chosen = safe + rng.choices(range(len(said)), k=count - len(safe))
    command, done = "build", False
    for i, (disk, _) in enumerate(recording.replay()):
        text = said[i]
        if text is not None:
            command, done = text.get("begin") or text["done"], "done" in text
        for again in range(chosen.count(i)):
            name = f"seed {seed}, call {i}, loss {again}, {'after' if done else 'in'} {command}"
            yield Loss(name, lose_power(disk, random.Random(f"{seed} {i} {again}")), command, done)


def problem(loss: Loss, recorded: Recorded) -> str | None:
    """What is wrong with what is left; None: nothing."""
    work, disk = recorded.work, recorded.work / "disk"
    write_tree(disk, loss.tree)
    try:
        number = next(i for i, command in enumerate(COMMANDS) if command.name == loss.command)
        folder = disk / (AGAIN if loss.command == "reembed" else NAME)
        try:
            found: State | None = contents(folder)
        except RefusalError as e:
            if loss.done or loss.command == "sync" or "is not a collection" not in str(e):
                return f"it does not open: {e}"
            found = None
        end = recorded.ends[loss.command]
        assert end is not None
        if loss.done and found != end:
            return f"it holds {sorted(found or {})}, and said that it has {sorted(end)}"
        before = recorded.ends["build"] if loss.command == "sync" else {}
        assert before is not None
        for key in before.keys() & end.keys():  # what is there before and after is there in between
            if found is None or found.get(key) not in (before[key], end[key]):
                return f"{key} is missing, or neither as before nor as after"
        strange = (found or {}).keys() - before.keys() - end.keys()
        if strange:
            return f"it holds {sorted(strange)}, which nothing has written"
        for command in COMMANDS[number:]:
            show(work, command.folder)
            if run(command.name, disk, work) != 0:
                return f"`{command.name}` does not go on"
            after = contents(disk / (AGAIN if command.name == "reembed" else NAME))
            if after != recorded.ends[command.name]:
                return f"`{command.name}`, run again, ends with {sorted(after)}, or other vectors"
        return None
    finally:
        shutil.rmtree(disk)


def problems(found: Sequence[Loss] | Iterator[Loss], recorded: Recorded) -> list[str]:
    """What is wrong after some losses."""
    return [f"{loss.name}: {wrong}" for loss in found if (wrong := problem(loss, recorded))]


def test_builds_survive_power_loss_and_go_on(recorded: Recorded) -> None:
    assert problems(losses(recorded.recording, LOSSES, 0), recorded) == []


@pytest.mark.slow
@pytest.mark.parametrize("sabotage", ["synchronous-off", "segment-files", "segment-folder", "manifest-file"])
def test_a_missing_sync_is_found(recorded: Recorded, sabotage: str) -> None:
    recording = make_recording(recorded.work, sabotage)
    assert any(problem(loss, recorded) for loss in losses(recording, 150, 0))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
def test_so_they_do_anywhere(recorded: Recorded, seed: int) -> None:
    assert problems(losses(recorded.recording, 120, seed), recorded) == []
