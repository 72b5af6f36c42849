"""What the benchmarks of a running server share: a bundle, a server process, and what the kernel says of it."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from likewise import main as likewise
from tests.shapes import write_shapes


def made_bundle(out: Path, *flags: str) -> Path:
    """An untrained bundle: how fast it is does not depend on its weights."""
    bundle = out / "bundle"
    if not bundle.is_dir():
        run = ["train", str(write_shapes(out / "shapes", 64)), "--out", str(out / "run"), "--steps", "0"]
        assert likewise([*run, "--encoder", "vit_micro", "--resume", *flags]) == 0
        assert likewise(["export", str(out / "run"), "--out", str(bundle)]) == 0
    return bundle


class Sample(NamedTuple):
    """A process at a moment."""

    at: float
    """Seconds since the first."""
    rss: float
    """MiB."""
    own: float
    """The same without mapped files: pages of an index are the kernel's to drop."""
    files: float
    """Open ones."""
    threads: float
    cpu: float
    """Seconds, since its start."""


class ServerProcess:
    """`likewise serve` on free ports; its standard error goes to a file."""

    def __init__(self, bundle: Path, collections: Path, log: Path, *flags: str, metrics_port: int = 0) -> None:
        self.log = log
        self._sampling = threading.Event()
        self.samples: list[Sample] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "likewise", "serve", "--bundle", str(bundle), "--collections", str(collections),
             "--port", "0", "--metrics-port", str(metrics_port), "--log-format", "json", "--no-log-calls", *flags],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.address = self._address()
        self._copying = threading.Thread(target=self._copy, daemon=True)
        self._copying.start()

    def _address(self) -> str:
        assert self.process.stderr is not None
        said = ""
        for line in self.process.stderr:  # it ends with the process
            said += line
            if line.startswith("{") and json.loads(line)["event"] == "serving":
                return f"127.0.0.1:{json.loads(line)['port']}"
        raise AssertionError(said)

    def events(self) -> Counter[str]:
        """What it has logged since, by event."""
        lines = self.log.read_text().splitlines()
        return Counter(json.loads(line)["event"] if line.startswith("{") else "text" for line in lines)

    def _copy(self) -> None:
        assert self.process.stderr is not None
        with self.log.open("a") as file:
            for line in self.process.stderr:
                file.write(line)
                file.flush()
        self.process.stderr.close()

    def sample_each(self, seconds: float) -> None:
        """From here on `samples` grows, until the process ends."""
        self._sampler = threading.Thread(target=self._sample, args=(seconds,), daemon=True)
        self._sampler.start()

    def _sample(self, seconds: float) -> None:
        start = time.monotonic()
        while not self._sampling.wait(seconds):
            try:
                self.samples.append(self.now(time.monotonic() - start))
            except (FileNotFoundError, ProcessLookupError):
                return

    def now(self, at: float = 0.0) -> Sample:
        """What the kernel says of it. Raises `FileNotFoundError` once it is gone."""
        proc = Path(f"/proc/{self.process.pid}")
        said = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines() if ":" in line)
        used = (proc / "stat").read_text().rpartition(")")[2].split()
        files = len(list((proc / "fd").iterdir()))
        rss, own = (int(said[name].split()[0]) / 1024 for name in ("VmRSS", "RssAnon"))
        cpu = (int(used[11]) + int(used[12])) / os.sysconf("SC_CLK_TCK")
        return Sample(at, rss, own, files, int(said["Threads"]), cpu)

    def kill(self) -> None:
        """SIGKILL."""
        self._sampling.set()
        self.process.kill()
        self.process.wait()
        self._copying.join(10)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self._sampling.set()
        self.process.terminate()
        code = self.process.wait(60)
        self._copying.join(10)
        return code


def slope(times: Sequence[float], values: Sequence[float]) -> float:
    """Median of the slopes between points half the time apart (Theil and Sen, on some of the pairs): single outliers do
    not matter."""
    half = len(times) // 2
    return statistics.median(
        (values[i + half] - values[i]) / (times[i + half] - times[i]) for i in range(len(times) - half)
    )


def flatness(times: Sequence[float], values: Sequence[float], per: float = 3600.0) -> float:
    """1 where it does not grow; 0.95 where it grows by 5 % of its median in `per` seconds."""
    return 1 - max(0.0, slope(times, values)) * per / max(statistics.median(values), 1e-9)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99."""
    if not values:
        return {}
    ordered = sorted(values)
    return {f"p{p}": ordered[min(len(ordered) - 1, int(len(ordered) * p / 100))] for p in (50, 95, 99)}
