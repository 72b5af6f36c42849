"""What a process does to a folder, system call by system call, as strace sees it.

strace and not a preloaded library: the C library's own fwrite and fflush, by which NumPy and FAISS write, call nothing
that a library could stand before. A call that the model of the disk knows nothing of is an error, never skipped.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults.disk import SHARED_MEMORY, File, Folder, Node, Tree, Write, disk_of, tree_of

# `?`: not on every processor. `read` is missing on purpose: it would bring every imported library into the recording.
_TRACED = (
    "?open,openat,?openat2,?creat,close,close_range,dup,?dup2,dup3,fcntl,lseek,write,writev,pwrite64,pwritev,pwritev2,"
    "truncate,ftruncate,fallocate,fsync,fdatasync,sync,syncfs,?rename,renameat,?renameat2,?link,linkat,?symlink,symlinkat,"
    "?unlink,unlinkat,?rmdir,?mkdir,mkdirat,mmap,sendfile,copy_file_range,splice,?io_uring_setup,?io_setup,?fork,?vfork,"
    "clone,?clone3,chdir,fchdir"
)
_LINE = re.compile(r"(\d+) +(?:(\w+)\((.*)|<\.\.\. (\w+) resumed>(.*))$", re.DOTALL)
_END = re.compile(r"\) += (-?\d+|0x[0-9a-f]+|\?)(?: .*)?$")
_TOKEN = re.compile(r'"[^"]*"(?:\.\.\.)?|[\[\]{}(),]|[^"\[\]{}(),]+')


class NotModelledError(Exception):
    """The process did something to the folder that the model of the disk does not cover."""


class Call(NamedTuple):
    """A system call that succeeded."""

    thread: int
    name: str
    arguments: list[str]
    result: int
    entered: bool = False
    """Its beginning alone, where another thread's calls came between it and its end."""


class Marker(NamedTuple):
    """What the process said of itself."""

    text: dict[str, Any]


_STRACE = (
    "strace",
    "-f",
    "-qq",
    "-xx",
    "-s",
    "100000000",
    "-e",
    "signal=none",
    "-e",
    f"trace={_TRACED}",
    "--seccomp-bpf",
)


def why_not() -> str | None:
    """Why nothing can be recorded here; None where it can."""
    if not sys.platform.startswith("linux"):
        return "power loss is replayed from a recording by strace, which is of Linux"
    if shutil.which("strace") is None:
        return "strace is not installed (apt-get install strace): without it no power loss can be replayed"
    tried = subprocess.run([*_STRACE, "-o", os.devnull, "true"], capture_output=True, text=True)
    if tried.returncode:
        return f"strace may not trace here ({tried.stderr.strip()[:200]}): without it no power loss can be replayed"
    return None


def strace(command: Sequence[str], log: Path) -> None:
    """Run a command to its end and record it. Raises `CalledProcessError`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*_STRACE, "-o", str(log), *command], check=True, env=environment, timeout=300)


def _split(text: str) -> list[str]:
    """Arguments of a call."""
    arguments, depth = [""], 0
    for token in _TOKEN.findall(text):
        depth += (token in ("[", "{", "(")) - (token in ("]", "}", ")"))
        if token == "," and not depth:
            arguments.append("")
        else:
            arguments[-1] += token
    return [argument.strip() for argument in arguments]


def _calls(log: Path) -> Iterator[Call]:
    """The calls that succeeded, in the order of their ends; the beginning of one that was interrupted as well."""
    begun: dict[int, str] = {}
    with log.open() as lines:
        for line in lines:
            match = _LINE.match(line.rstrip("\n"))
            if match is None:
                raise NotModelledError(f"strace wrote a line that cannot be read: {line[:200]}")
            thread, name, rest = int(match[1]), match[2] or match[4], match[3] if match[2] else match[5]
            if rest.endswith("<unfinished ...>"):
                begun[thread] = rest.removesuffix("<unfinished ...>").rstrip()
                yield Call(thread, name, _split(begun[thread]), 0, entered=True)
                continue
            if match[4]:
                rest = begun.pop(thread) + rest
            end = _END.search(rest)
            if end is None:
                raise NotModelledError(f"strace wrote a line that cannot be read: {line[:200]}")
            if end[1] != "?" and (result := int(end[1], 0)) >= 0:
                yield Call(thread, name, _split(rest[: end.start()]), result)


def _bytes(text: str) -> bytes:
    """A string of strace's."""
    if not (text.startswith('"') and text.endswith('"')):
        raise NotModelledError(f"strace cut a string short: {text[:80]}")
    return bytes.fromhex(text[1:-1].replace("\\x", ""))


@dataclass
class _Open:
    """An open file or folder; copies of a descriptor share it."""

    node: Node | None
    """None: the markers."""
    name: str
    flags: frozenset[str]
    offset: int = 0


@dataclass
class Replay:
    """A recording, played into a disk from its beginning."""

    root: Path
    """Where the disk was mounted."""
    markers: Path
    """The file that takes the process's markers."""
    disk: Folder
    _open: dict[int, _Open] = field(default_factory=dict)
    _begun: dict[tuple[int, str], int] = field(default_factory=dict)
    _started: bool = False

    def step(self, call: Call) -> Marker | bool:
        """Take the next call: what the process said by it, or whether it changed what a power loss may leave."""
        handler = getattr(self, f"_{_SAME.get(call.name, call.name)}", None)
        if call.entered:
            # A descriptor is free as soon as its close begins; a sync is of what was there when it began.
            if call.name == "close":
                self._open.pop(int(call.arguments[0]), None)
            elif call.name in ("fsync", "fdatasync") and (node := self._node(call.arguments[0])) is not None:
                self._begun[call.thread, call.name] = len(node.pending)
            return False
        if handler is not None:
            outcome = handler(call)
            assert isinstance(outcome, (bool, Marker))
            return outcome
        if self._started and self._concerns(call):
            raise NotModelledError(f"{call.name}({', '.join(a[:200] for a in call.arguments)})")
        return False

    def _concerns(self, call: Call) -> bool:
        """Whether a call that is not modelled could change the disk."""
        if call.name in ("clone", "clone3"):
            return not any("CLONE_THREAD" in argument for argument in call.arguments)
        if any(a.startswith('"') and self._below(os.fsdecode(_bytes(a))) is not None for a in call.arguments):
            return True
        process = ("fork", "vfork", "sync", "io_uring_setup", "io_setup", "close_range", "chdir", "fchdir")
        return call.name in process or any(a.isdigit() and int(a) in self._open for a in call.arguments)

    # --- names --------------------------------------------------------------------------------------------------

    def _below(self, path: str) -> list[str] | None:
        """The parts of an absolute path below the root, None where it is elsewhere."""
        normal = os.path.normpath(path)
        return normal[len(str(self.root)) :].split("/")[1:] if f"{normal}/".startswith(f"{self.root}/") else None

    def _find(self, at: str, path: str) -> tuple[Folder, str] | None:
        """The folder and name that a path means; None: not on the disk."""
        name = os.fsdecode(_bytes(path))
        if name.startswith("/"):
            parts, folder = self._below(name), self.disk
        elif at == "AT_FDCWD":
            return None  # the process neither starts there nor goes there
        else:
            node = self._node(at)
            if node is None:
                return None
            assert isinstance(node, Folder), name
            parts, folder = name.split("/"), node
        if parts is None:
            return None
        if ".." in parts:
            raise NotModelledError(name)
        for part in parts[:-1]:
            below = folder.live[part]
            assert isinstance(below, Folder), name
            folder = below
        return (folder, parts[-1]) if parts else (Folder({"": folder}), "")

    def _node(self, descriptor: str) -> Node | None:
        opened = self._open.get(int(descriptor)) if descriptor.isdigit() else None
        return None if opened is None else opened.node

    def _openat(self, call: Call) -> bool:
        at, path, flags = call.arguments[:3] if call.name == "openat" else ("AT_FDCWD", *call.arguments[:2])
        if os.fsdecode(_bytes(path)) == str(self.markers):
            self._started = True
            self._open[call.result] = _Open(None, "", frozenset(("O_WRONLY",)))
            return False
        found = self._find(at, path)
        self._open.pop(call.result, None)
        if found is None:
            return False
        folder, name = found
        how = frozenset(flags.split("|"))
        if how & {"O_TMPFILE", "O_SYNC", "O_DSYNC"}:
            raise NotModelledError(f"{name} was opened with {flags}")
        made = name not in folder.live
        if made:
            if "O_CREAT" not in how:
                raise NotModelledError(f"{name} was opened, but nothing recorded has made it")
            folder.change({name: File()})
        node = folder.live[name]
        if emptied := "O_TRUNC" in how and isinstance(node, File) and len(node.live) > 0:
            node.change(0)
        self._open[call.result] = _Open(node, name, how)
        return made or emptied

    def _mkdirat(self, call: Call) -> bool:
        found = self._find(*(call.arguments if call.name == "mkdirat" else ("AT_FDCWD", *call.arguments))[:2])
        if found is not None:
            found[0].change({found[1]: Folder()})
        return found is not None

    def _unlinkat(self, call: Call) -> bool:
        found = self._find(*(call.arguments if call.name == "unlinkat" else ("AT_FDCWD", *call.arguments))[:2])
        if found is not None:
            found[0].change({found[1]: None})
        return found is not None

    def _renameat(self, call: Call) -> bool:
        short = call.name == "rename"
        a = call.arguments
        old, new = (self._find("AT_FDCWD", p) for p in a[:2]) if short else (self._find(*a[:2]), self._find(*a[2:4]))
        if old is None and new is None:
            return False
        if old is None or new is None or old[0] is not new[0] or a[4:] not in ([], ["0"]):
            raise NotModelledError(f"a rename from one folder to another: {a}")
        old[0].change({old[1]: None, new[1]: old[0].live[old[1]]})
        return True

    # --- descriptors --------------------------------------------------------------------------------------------

    def _close(self, call: Call) -> bool:
        self._open.pop(int(call.arguments[0]), None)
        return False

    def _dup(self, call: Call) -> bool:
        self._open.pop(call.result, None)
        if (opened := self._open.get(int(call.arguments[0]))) is not None:
            self._open[call.result] = opened
        return False

    def _fcntl(self, call: Call) -> bool:
        return self._dup(call) if call.arguments[1].startswith("F_DUPFD") else False

    def _lseek(self, call: Call) -> bool:
        if (opened := self._open.get(int(call.arguments[0]))) is not None:
            opened.offset = call.result
        return False

    # --- contents -----------------------------------------------------------------------------------------------

    def _write(self, call: Call) -> Marker | bool:
        opened = self._open.get(int(call.arguments[0]))
        if opened is None:
            return False
        data = b"".join(_bytes(text) for text in re.findall(r'"[^"]*"(?:\.\.\.)?', call.arguments[1]))[: call.result]
        if opened.node is None:
            return Marker(json.loads(data))
        assert isinstance(opened.node, File)
        if call.name.startswith("pw"):
            at = int(call.arguments[3])
            if call.arguments[4:] not in ([], ["0"]):
                raise NotModelledError(f"{call.name} to {opened.name} with {call.arguments[4]}")
        elif "O_APPEND" in opened.flags:
            at = len(opened.node.live)
        elif "O_RDWR" in opened.flags:
            raise NotModelledError(f"{opened.name} is read and written by one descriptor: reads are not recorded")
        else:
            at = opened.offset
            opened.offset += len(data)
        opened.node.change(Write(at, data))
        return True

    def _ftruncate(self, call: Call) -> bool:
        node = self._node(call.arguments[0])
        if node is None:
            return False
        assert isinstance(node, File)
        node.change(int(call.arguments[1]))
        return True

    def _fallocate(self, call: Call) -> bool:
        node = self._node(call.arguments[0])
        if node is None:
            return False
        assert isinstance(node, File)
        end = int(call.arguments[2]) + int(call.arguments[3])
        if call.arguments[1] != "0":
            raise NotModelledError(f"fallocate with {call.arguments[1]}")
        node.change(max(len(node.live), end))
        return True

    def _fsync(self, call: Call) -> bool:
        node = self._node(call.arguments[0])
        begun = self._begun.pop((call.thread, call.name), None)
        if node is not None:
            node.sync(len(node.pending) if begun is None else begun)
        return node is not None

    def _mmap(self, call: Call) -> bool:
        _, _, protection, how, descriptor, _ = call.arguments
        opened = self._open.get(int(descriptor))
        shared = opened is not None and "MAP_SHARED" in how and not opened.name.endswith(SHARED_MEMORY)
        # A descriptor that may write could make the mapping writable later.
        if opened is not None and shared and ("PROT_WRITE" in protection or "O_RDWR" in opened.flags):
            raise NotModelledError(f"{opened.name} is mapped for writing: such writes are not recorded")
        return False


_SAME = {
    "open": "openat",
    "mkdir": "mkdirat",
    "unlink": "unlinkat",
    "rmdir": "unlinkat",
    "rename": "renameat",
    "renameat2": "renameat",
    "fdatasync": "fsync",
    "writev": "write",
    "pwrite64": "write",
    "pwritev": "write",
    "pwritev2": "write",
    "dup2": "dup",
    "dup3": "dup",
}


@dataclass
class Recording:
    """Calls of one process, and the disk that it began with."""

    root: Path
    markers: Path
    before: Tree
    calls: list[Call]

    def replay(self) -> Iterator[tuple[Folder, Marker | None]]:
        """The disk after each call that changed it or was a marker. It goes on changing."""
        replay = Replay(self.root, self.markers, disk_of(self.before))
        for call in self.calls:
            outcome = replay.step(call)
            if outcome:
                yield replay.disk, outcome if isinstance(outcome, Marker) else None


def read_tree(root: Path) -> Tree:
    """What lies below a folder."""
    return {path.relative_to(root).as_posix(): None if path.is_dir() else path.read_bytes() for path in root.rglob("*")}


def write_tree(root: Path, tree: Tree) -> None:
    """Lay a tree down, in a folder that is new."""
    root.mkdir()
    for path, contents in sorted(tree.items()):
        if contents is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(contents)


def record(command: Sequence[str], root: Path, markers: Path) -> Recording:
    """Run a command and record what it does below `root`. Played to its end, the recording gives the same files."""
    before = read_tree(root)
    log = markers.with_suffix(".strace")
    strace(command, log)
    recording = Recording(root, markers, before, list(_calls(log)))
    log.unlink()
    disk = disk_of(before)
    for disk, _ in recording.replay():  # noqa: B007 - the last one
        pass
    seen, real = tree_of(disk), read_tree(root)
    assert {p: c for p, c in seen.items() if not p.endswith(SHARED_MEMORY)} == {
        p: c for p, c in real.items() if not p.endswith(SHARED_MEMORY)
    }, "the recording misses something: played to its end it gives other files than the process left"
    return recording
