"""The training loop: what happens around a step. The file to read first in this room; a step itself is training/learner.py.

`Trainer.fit` trains to the last step: logs, measures, saves, and stops cleanly when asked to.
"""

from __future__ import annotations

import copy
import json
import math
import platform
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import timm
import torch
from rich.console import Console
from safetensors.torch import save as save_safetensors
from torch import Tensor

from export.bundle import EncoderSpec, RefusalError, RunManifest, write_file
from export.edits import EDITS
from export.preprocess import PreprocessSpec
from training.cache import PictureCache
from training.checkpoint import load_checkpoint, save_checkpoint, save_offending_step
from training.config import Hardware, Recipe, Train
from training.device import free_bytes
from training.distributed import agree, mean_over_ranks, rank, world_size
from training.encoder import architecture, backbone_tensors, encode, tensors_digest, width
from training.learner import Learner, NotFiniteError, Speed
from training.loader import Batches
from training.monitor import SAMPLE
from training.observer import Observer
from training.progress import bar
from training.verdict import PICTURES, QUERIES
from training.views import Views

INTERRUPTED = 130
MEASUREMENTS = 10  # of health, over a run
TRAINED_BELOW = 20_000  # pictures (spec/sop.md section 8)
STOP_WITHIN = 5.0  # seconds until several processes heed a signal; torchrun kills 30 seconds after SIGTERM
_PRECISION = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}


class Trainer:
    """One run in its folder. Under torchrun every process has one; the first process alone writes and prints."""

    def __init__(
        self, recipe: Recipe, reasons: dict[str, str], cache: PictureCache, asked: Train, hardware: Hardware,
        console: Console,
    ) -> None:  # fmt: skip
        self.asked, self.cache, self.console, self.hardware = asked, cache, console, hardware
        self.run = asked.out
        self.reasons = reasons
        self.recipe = recipe
        self.device = torch.device(hardware.device)
        if hardware.device == "cuda":  # this process's own
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.precision = asked.precision
        if asked.precision == "auto":
            self.precision = "bfloat16" if hardware.fast_bf16 else "float32"
        reasons["precision"] = f"{self.precision} backbone on {hardware.name}"
        self.views = Views(recipe.views, recipe.mean, recipe.std, _PRECISION[self.precision])
        speed = Speed(
            _PRECISION[self.precision], self.precision == "bfloat16", asked.accumulate, asked.compile,
            asked.checkpoint_activations, asked.shard,
        )  # fmt: skip
        self.learner = Learner(recipe, self.device, speed, self.views, self._initial_weights())
        # What the run started from, apart from where it lay then.
        self.initial = backbone_tensors(self.learner.teacher.backbone) if recipe.init is not None else None
        self.initial_sha256 = None if self.initial is None else tensors_digest(self.initial)
        self.stopped = False
        self._batches: Batches | None = None
        self._waited = 0.0

    def _initial_weights(self) -> Path | None:
        """What --init names; its copy in the run folder where that is gone since."""
        given, kept = self.asked.init, self.run / "initial.safetensors"
        return kept if given is not None and not given.exists() and kept.is_file() else given

    def step(self, step: int) -> dict[str, Tensor]:
        """One optimiser step; returns its loss terms (on the device, detached)."""
        batches = self.batches()
        batch = batches.local(step)
        self._waited += batches.waited
        return self.learner.step(batch, step)

    def batches(self) -> Batches:
        """Made when first asked for; a set that leaves three quarters of the device's memory free is kept there."""
        if self._batches is None:
            if self.cache.bytes < 0.25 * free_bytes(self.device):
                self.cache.load(self.device)
            r = self.recipe
            self._batches = Batches(self.cache, r.batch_size, r.seed, self.device, rank(), world_size())
        return self._batches

    # --- the run ------------------------------------------------------------------------------------------------

    def fit(self) -> int:
        """Train to the last step; returns 0, or 130 after saving when interrupted."""
        loaded = load_checkpoint(self.run)
        self._settle_steps(None if loaded is None else int(loaded.identity["steps"]))
        start = 0
        if loaded is not None:
            loaded.require(self.identity(), self.run)
            start = loaded.step
            self.learner.load(loaded.state)
        self._announce()
        observer = Observer(self, start, resumed=loaded is not None) if rank() == 0 else None
        if loaded is not None:
            self.console.print(f"continuing at step {start:,} of {self.recipe.steps:,}")
        self._save_initial(loaded is not None)
        self.save(start)  # also after a resume: a kill may have come between the checkpoint and the encoder
        # At a resume between two measurements none is made: alarms compare measurements at equal distances.
        if observer is not None and (start % self._measure_every == 0 or not observer.history):
            observer.measure(start)
        try:
            return self._train(start, observer)
        finally:
            if self._batches is not None:
                self._batches.close()

    def _train(self, start: int, observer: Observer | None) -> int:
        r = self.recipe
        every = max(1, min(20, r.steps // 50))
        decide = start + 1  # the next step at which processes agree whether to stop or save: it costs a message
        pending: list[dict[str, Tensor]] = []
        since = saved = began = time.monotonic()
        with self._signals(), bar(self.console, "training", r.steps, start) as advance:
            for step in range(start, r.steps):
                try:
                    pending.append(self.step(step))
                except NotFiniteError as e:
                    self._refuse_offending(step, e.terms)
                done = step + 1
                advance(1)
                stop = due = done == r.steps
                if world_size() == 1 or done == decide or stop:
                    now = time.monotonic()
                    overdue = now - saved > 60 * self.asked.checkpoint_minutes
                    pace = (now - began) / (done - start)
                    flags = agree(self.stopped or stop, overdue or due, pace)
                    stop, due = flags[0] > 0, flags[1] > 0
                    decide = done + max(1, min(every, int(STOP_WITHIN / flags[2])))
                if done % every == 0 or stop or due:  # before every checkpoint too: what is saved was seen to be finite
                    self._log(observer, done, pending, time.monotonic() - since)
                    pending, since = [], time.monotonic()
                if observer is not None and (done % self._measure_every == 0 or done == r.steps):
                    before = time.monotonic()
                    observer.measure(done)
                    since += time.monotonic() - before  # steps are timed, not what watches them
                if stop or due:
                    self.save(done)
                    saved = time.monotonic()
                if stop and done < r.steps:
                    if observer is not None:
                        observer.finish(done=False)
                    self.console.print(
                        f"stopped and saved at step {done:,} of {r.steps:,}: the same command with --resume continues"
                    )
                    return INTERRUPTED
        if observer is not None:
            observer.finish()
        self.console.print(f"done: {self.run}   next: likewise export {self.run} --out BUNDLE")
        return 0

    @property
    def _measure_every(self) -> int:
        return max(1, -(-self.recipe.steps // MEASUREMENTS))

    def _settle_steps(self, stored: int | None) -> None:
        """With --minutes: the steps that fit, measured once and kept by a resume."""
        if self.asked.minutes is None:
            return
        steps = self._steps_that_fit(self.asked.minutes) if stored is None else stored
        self.learner.recipe = self.recipe = self.recipe.model_copy(update={"steps": steps})
        self.reasons["steps"] = f"what fits {self.asked.minutes:g} minutes, measured " + (
            "here" if stored is None else "at the start"
        )

    def seconds_per_step(self, least: float) -> float:
        """Measured over at least two steps and `least` seconds; leaves the state as it was."""
        before = _on_cpu(self.learner.state())
        recipe = self.recipe
        self.learner.recipe = recipe.model_copy(update={"steps": max(recipe.steps, 1000), "head_steps": 0})
        try:
            self.step(0)  # allocations and caches
            start = time.monotonic()
            count = 0
            while count < 2 or agree(time.monotonic() - start)[0] < least:
                count += 1
                self.step(count)
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
        except NotFiniteError as e:
            raise RefusalError(f"{e} in the first steps, while their time was measured: lower --lr") from e
        seconds = agree(time.monotonic() - start)[0] / count
        self.learner.recipe = recipe
        self.learner.load(before)
        self._waited = 0.0
        return seconds

    def _steps_that_fit(self, minutes: float) -> int:
        step = self.seconds_per_step(min(5.0, 6 * minutes))
        # Measurements take what they take, checkpoints about a twentieth; at least half of the time is for steps.
        left = max(0.5 * 60 * minutes, 0.95 * 60 * minutes - agree(self.watching_seconds())[0])
        return max(1, int(left / step))

    def watching_seconds(self) -> float:
        """Expected time of a run's measurements and report: a forward pass of the sample each, and statistics."""
        r, count = self.recipe, min(SAMPLE, len(self.cache))
        size = min(64, count)
        noise = torch.zeros(size, r.image_size, r.image_size, 3, dtype=torch.uint8, device=self.device)
        times = []
        for _ in range(2):  # the first one allocates
            start = time.monotonic()
            with torch.no_grad():
                encode(self.learner.teacher.backbone, self.views.normalise(noise))[0].sum().item()
            times.append(time.monotonic() - start)
        # The verdict embeds its queries, their edits and its sample with both encoders.
        judged = 2 * (QUERIES * (1 + len(EDITS)) + min(PICTURES, count) + count) if r.init is not None else 0
        return (MEASUREMENTS + 1) * (times[1] * count / size + 1.0 * count / SAMPLE) + judged * times[1] / size + 3.0

    def _log(self, observer: Observer | None, done: int, pending: list[dict[str, Tensor]], seconds: float) -> None:
        names = list(pending[0])
        rows = torch.stack([torch.stack([terms[name].double() for name in names]) for terms in pending])
        rows = mean_over_ranks(rows).cpu()
        bad = (~rows.isfinite().all(1)).nonzero()
        if len(bad):
            self._refuse_offending(done - len(pending) + int(bad[0]), dict(zip(names, rows[bad[0, 0]], strict=True)))
        means = dict(zip(names, rows.mean(0).tolist(), strict=True))
        waited, self._waited = self._waited, 0.0
        if observer is not None:
            observer.log.write(
                step=done, **means, **self._scheduled(done - 1),
                images_per_second=len(pending) * self.recipe.batch_size / seconds, data_wait=min(1.0, waited / seconds),
            )  # fmt: skip

    def _scheduled(self, step: int) -> dict[str, float]:
        """The scheduled values of a step, for the log."""
        values = self.learner.moment(step)._asdict()
        return {name: value for name, value in values.items() if name not in ("step", "steps")}

    def _refuse_offending(self, step: int, terms: dict[str, Tensor]) -> NoReturn:
        """No update was made by the step, so that the weights are still those which it began with."""
        indices = self.batches().indices(step).tolist()
        keys = [self.cache.pictures[i].key for i in indices]
        state = self.learner.state(keep=rank() == 0)
        kept = f"weights and pictures of that step are in {self.run}/offending-step.pt"
        if rank() == 0:
            try:
                save_offending_step(self.run, self.identity(), step, state, keys, terms)
            except OSError as e:
                kept = f"weights and pictures of that step could not be kept ({e.strerror})"
        # On a GPU the loss reads nan where a gradient is not finite, too; its terms are what they were.
        found = [f"{n} is {float(v)}" for n, v in terms.items() if not math.isfinite(v) and n != "loss"]
        alone = self.learner.checks_at_once and not math.isfinite(terms["loss"])
        what = found[0] if found else f"loss is {float(terms['loss'])}" if alone else "a gradient is not finite"
        raise RefusalError(
            f"{what} at step {step}; the last checkpoint is intact, and {kept}: lower --lr, or use --precision float32, "
            "with another --out"
        )

    # --- what a run leaves --------------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """What a checkpoint belongs to, and a resume must match. The number of processes is not part of it, nor where the
        initial weights lay."""
        fields = json.loads(self.recipe.model_dump_json())
        return {
            **fields,
            "init": self.initial_sha256,
            "data": self.cache.fingerprint.sha256,
            "precision": self.precision,
        }

    def _save_initial(self, resumed: bool) -> None:
        """Keep what --init gave, for the verdict."""
        if rank() == 0 and self.initial is not None and not resumed:
            write_file(self.run / "initial.safetensors", save_safetensors(self.initial))
        self.initial = None  # it is on disk now

    def save(self, step: int) -> None:
        """Write checkpoint, encoder and run.json, each atomically. Raises `RefusalError` rather than keep broken weights."""
        state = self.learner.state(keep=rank() == 0)
        if rank() > 0:
            return
        teacher = self.learner.teacher
        if not all(bool(torch.isfinite(value).all()) for value in state["student"].values()):
            raise RefusalError(
                f"the weights are not finite at step {step}; the last checkpoint is intact: lower --lr, or use "
                "--precision float32, with another --out"
            )
        save_checkpoint(self.run, self.identity(), step, state)
        encoder = backbone_tensors(teacher.backbone)
        write_file(self.run / "encoder.safetensors", save_safetensors(encoder))
        manifest = RunManifest(
            method=self.recipe.method,
            config=json.loads(self.recipe.model_dump_json()),
            reasons=self.reasons,
            encoder=self._encoder_spec(width(teacher.backbone)),
            preprocess=self.preprocess_spec(),
            data=self.cache.fingerprint,
            versions={"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
            git_revision=_git_revision(),
            seed=self.recipe.seed,
            steps_done=step,
            steps_total=self.recipe.steps,
            weights_sha256=tensors_digest(encoder),
            initial_sha256=self.initial_sha256,
        )
        write_file(self.run / "run.json", manifest.model_dump_json(indent=2))

    def _encoder_spec(self, embedding_dim: int) -> EncoderSpec:
        r = self.recipe
        return EncoderSpec(
            model=r.model, kwargs=r.model_kwargs, image_size=r.image_size, embedding_dim=embedding_dim,
            pooling="model" if architecture(r.model).convolutional else "cls", mean=r.mean, std=r.std,
        )  # fmt: skip

    def preprocess_spec(self) -> PreprocessSpec:
        """How whole pictures are prepared for the encoder."""
        return PreprocessSpec(size=self.recipe.image_size, fit=self.recipe.fit)

    # --- speech -------------------------------------------------------------------------------------------------

    def _announce(self) -> None:
        parameters = sum(p.numel() for p in self.learner.teacher.backbone.parameters()) / 1e6
        processes = f" × {world_size()} processes" if world_size() > 1 else ""
        self.console.print(
            f"{len(self.cache):,} pictures, {self.recipe.method.upper()}, {self.recipe.model} with {parameters:.1f} M "
            f"parameters at {self.recipe.image_size} px, on {self.hardware.name}{processes}"
        )
        if self.recipe.init is None and len(self.cache) < TRAINED_BELOW:
            self.console.print(
                f"  fewer than {TRAINED_BELOW:,} pictures: trained weights are the better start (--init default, or yours)"
            )
        for name, reason in self.reasons.items():
            value = getattr(self.recipe, name, "")
            self.console.print(f"  {name} = {value}  ({reason})" if value != "" else f"  {name}: {reason}")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT, SIGTERM and SIGUSR1 (what Slurm sends before its time limit) save and stop."""

        def stop(number: int, frame: FrameType | None) -> None:
            if self.stopped and number == signal.SIGINT:  # the second time at once
                raise KeyboardInterrupt
            self.stopped = True

        before: dict[signal.Signals, Any] = {}
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            before[number] = signal.signal(number, stop)
        try:
            yield
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler)


def out_of_memory(recipe: Recipe, accumulate: int, message: str) -> str:
    """The sentence for a run that does not fit."""
    found = message.splitlines()[0][:200] if message else "the system refused"
    return (
        f"out of memory with {recipe.batch_size} pictures of {2 + recipe.local_crops} crops per step ({found}): use "
        f"--accumulate {2 * accumulate} or --checkpoint-activations (neither changes the objective), fewer --local-crops, "
        "or a smaller --batch-size or --image-size; a run that has begun continues with --resume and the first two"
    )


def _on_cpu(state: Any) -> Any:
    """A copy of a state, tensors on the CPU."""
    if isinstance(state, Tensor):
        return state.detach().cpu().clone()
    if isinstance(state, dict):
        return {key: _on_cpu(value) for key, value in state.items()}
    return [_on_cpu(value) for value in state] if isinstance(state, list) else copy.deepcopy(state)


def _git_revision() -> str | None:
    here = Path(__file__).parent
    done = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
