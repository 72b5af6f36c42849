"""The training loop: `setup` (find, choose, announce), then `Trainer.fit`. The file to read first in this room."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import timm
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file
from safetensors.torch import save as save_safetensors
from torch import Tensor

from export.bundle import (
    EncoderSpec,
    RefusalError,
    RunManifest,
    list_pictures,
    make_folder,
    printable,
    tensors_sha256,
    write_file,
    write_unreadable,
)
from export.preprocess import PreprocessSpec, UnreadablePictureError, preprocess
from export.runtime import cpu_quota
from training.alarms import alarms
from training.cache import PictureCache, build_cache
from training.checkpoint import NAME as CHECKPOINT
from training.checkpoint import load_checkpoint, save_checkpoint
from training.config import Hardware, Recipe, Train, resolve
from training.encoder import Student, Teacher, build_vit, load_initial, reset_linear_layers
from training.head import Head
from training.masks import block_masks
from training.memory import RingMemory
from training.monitor import SAMPLE, Health, Monitor, read_history
from training.schedules import cosine, linear_warmup, warmup_cosine
from training.snapshots import Snapshots
from training.sop import draw_prototypes, image_loss, koleo, patch_loss, vote_statistics
from training.tensorboard import TensorBoardWriter
from training.views import Views

INTERRUPTED = 130
MEASUREMENTS = 10  # of health, over a run


def train(asked: Train) -> int:
    """Run `likewise train`; returns the exit code. Raises `RefusalError`."""
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    unreadable: list[tuple[str, str]] = []
    found = list_pictures(asked.pictures, unreadable)
    if (asked.out / CHECKPOINT).is_file() and not asked.resume:
        raise RefusalError(f"{asked.out} already holds a run: pass --resume to continue it, or choose another --out")
    foreign = asked.out.is_dir() and any(p.name not in ("cache", "unreadable.tsv") for p in asked.out.iterdir())
    if foreign and not asked.resume:
        raise RefusalError(f"{asked.out} is not empty and holds no run: choose another --out")
    hardware = _hardware(asked)
    torch.set_num_threads(hardware.threads)
    make_folder(asked.out)
    # The number of readable pictures decides the sizes that do not depend on the cache's; decode first.
    draft, _ = resolve(asked, max(len(found), 1), hardware)
    spec = PreprocessSpec(size=draft.cache_size, fit=draft.fit)
    with _bar(console, "decoding", len(found)) as advance:
        cache = build_cache(asked.out / "cache", found, asked.pictures, spec, hardware.threads, advance)
    unreadable += cache.unreadable
    write_unreadable(asked.out / "unreadable.tsv", unreadable)
    if unreadable:
        console.print(
            f"{len(unreadable)} of {len(found)} files are skipped, for example {printable(unreadable[0][0])}: "
            f"{unreadable[0][1]} (all in {asked.out / 'unreadable.tsv'})"
        )
    recipe, reasons = resolve(asked, len(cache), hardware)
    trainer = Trainer(recipe, reasons, cache, asked, hardware, console)
    return trainer.fit()


def _hardware(asked: Train) -> Hardware:
    threads = asked.threads or cpu_quota()
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise RefusalError("--device cuda was asked for, but torch sees no CUDA device: check nvidia-smi, or use cpu")
    if asked.device != "cpu" and torch.cuda.is_available():
        return Hardware("cuda", torch.cuda.get_device_name(), threads, torch.cuda.is_bf16_supported())
    # bfloat16 is faster on CPUs with tile instructions only; elsewhere it is emulated, 10 times slower (measured).
    fast = bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())
    return Hardware("cpu", f"{threads} CPU threads", threads, fast)


class Trainer:
    """One run: networks, memories, optimiser and the step that moves them."""

    def __init__(
        self, recipe: Recipe, reasons: dict[str, str], cache: PictureCache, asked: Train, hardware: Hardware,
        console: Console,
    ) -> None:  # fmt: skip
        self.asked, self.cache, self.console, self.hardware = asked, cache, console, hardware
        self.run = asked.out
        self.reasons = reasons
        self.device = torch.device(hardware.device)
        self.bf16 = asked.precision == "bfloat16" or (asked.precision == "auto" and hardware.fast_bf16)
        reasons["precision"] = f"{'bfloat16' if self.bf16 else 'float32'} backbone on {hardware.name}"
        self.recipe = recipe
        self._build()
        spec = self._encoder_spec()
        self.views = Views(recipe.views, spec.mean, spec.std)
        self.stopped = False
        self._order: tuple[int, Tensor] | None = None  # epoch and its permutation

    def _build(self) -> None:
        r = self.recipe
        torch.manual_seed(r.seed)
        vit = build_vit(r.model, r.model_kwargs, r.image_size, r.drop_path)
        if r.weight_init == "default":
            reset_linear_layers(vit)
        if r.init:
            load_initial(Path(r.init), vit)
        head = Head(vit.embed_dim, r.head_hidden, r.head_dim, r.weight_init)
        still = build_vit(r.model, r.model_kwargs, r.image_size)  # the teacher has no stochastic depth
        still.load_state_dict(vit.state_dict())
        self.student = Student(vit, head).to(self.device)
        self.teacher = Teacher(still, copy.deepcopy(head)).to(self.device)
        self.memory = RingMemory(r.memory, r.head_dim, r.seed).to(self.device)
        self.patch_memory = RingMemory(r.patch_memory, r.head_dim, r.seed + 1).to(self.device)
        weights = [p for p in self.student.parameters() if p.ndim > 1]
        rest = [p for p in self.student.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": weights, "decays": True}, {"params": rest, "weight_decay": 0.0, "decays": False}],
            lr=r.lr, fused=True,
        )  # fmt: skip

    # --- the step -----------------------------------------------------------------------------------------------

    def step(self, step: int) -> dict[str, Tensor]:
        """One optimiser step; returns its loss terms (on the device, detached)."""
        r = self.recipe
        generator = torch.Generator().manual_seed(derive(r.seed, "step", step))
        torch.manual_seed(derive(r.seed, "drop path", step))
        at = {"step": step, "steps": r.steps}
        lr = warmup_cosine(**at, peak=r.lr, end=r.min_lr, warmup=r.lr_warmup)
        decay = cosine(**at, start=r.weight_decay[0], end=r.weight_decay[1])
        momentum = cosine(**at, start=r.momentum, end=1.0)
        teacher_temperature = linear_warmup(
            **at, start=r.teacher_temperature[0], end=r.teacher_temperature[1], warmup=r.temperature_warmup
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = decay if group["decays"] else 0.0

        pictures = self.cache.gather(self._indices(step), self.device)
        B = len(pictures)
        globals_ = torch.cat(
            [self.views(pictures, r.image_size, r.global_scale, kind, generator) for kind in ("first", "second")]
        )
        locals_ = [self.views(pictures, r.local_size, r.local_scale, "local", generator) for _ in range(r.local_crops)]
        mask = drawn = None
        if r.mim_weight:
            side = r.image_size // r.patch_size
            mask = block_masks(2 * B, side, side, r.mask_probability, r.mask_ratio, generator).to(self.device)
            drawn = torch.randint(side * side, (B,), generator=generator).to(self.device)

        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            teacher_cls, teacher_masked, teacher_drawn = self.teacher(globals_, mask, drawn)
            student_cls, student_masked = self.student(globals_, mask)
            parts = [student_cls]
            if locals_:
                parts.append(self.student(torch.cat(locals_))[0])

        # Similarities, votes and losses: float32, outside autocast.
        prototypes = draw_prototypes(self.memory.rows, r.anchors, r.support, generator, r.smoothing)
        temperatures = (r.student_temperature, teacher_temperature)
        terms = {"loss_image": image_loss(torch.cat(parts), teacher_cls, 2 + r.local_crops, prototypes, *temperatures)}
        total = terms["loss_image"]
        if r.koleo_weight:
            terms["koleo"] = (koleo(student_cls[:B]) + koleo(student_cls[B:])) / 2
            total = total + r.koleo_weight * terms["koleo"]
        if mask is not None:
            patches = draw_prototypes(self.patch_memory.rows, r.patch_anchors, r.patch_support, generator, r.smoothing)
            terms["loss_patch"] = patch_loss(student_masked, teacher_masked, mask, patches, *temperatures)
            total = total + r.mim_weight * terms["loss_patch"]
        terms["loss"] = total

        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        clip_each(self.student, r.clip)
        self.optimizer.step()
        self.teacher.follow(self.student, momentum)
        self.memory.push(teacher_cls[B:])
        if mask is not None:
            self.patch_memory.push(teacher_drawn)
        return {name: value.detach() for name, value in terms.items()}

    def _indices(self, step: int) -> Tensor:
        """The pictures of a step: epochs are permutations drawn from the seed, so that a resume sees the same."""
        per_epoch = len(self.cache) // self.recipe.batch_size
        epoch, within = divmod(step, per_epoch)
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(derive(self.recipe.seed, "epoch", epoch))
            self._order = epoch, torch.randperm(len(self.cache), generator=generator)
        return self._order[1][within * self.recipe.batch_size : (within + 1) * self.recipe.batch_size]

    # --- the run ------------------------------------------------------------------------------------------------

    def fit(self) -> int:
        """Train to the last step; returns 0, or 130 after saving when interrupted."""
        loaded = load_checkpoint(self.run)
        if self.cache.bytes < 0.25 * _free_bytes(self.device):
            self.cache.load(self.device)
        if self.asked.minutes is not None:
            steps = self._steps_that_fit(self.asked.minutes) if loaded is None else int(loaded.identity["steps"])
            self.recipe = self.recipe.model_copy(update={"steps": steps})
            self.reasons["steps"] = f"what fits {self.asked.minutes:g} minutes, measured " + (
                "here" if loaded is None else "at the start"
            )
        r = self.recipe
        start = 0
        if loaded is not None:
            loaded.require(self.identity(), self.run)
            start = loaded.step
            self.load(loaded.state)
        self._announce()
        monitor = self._monitor(resumed=loaded is not None)
        if loaded is not None:
            self.console.print(f"continuing at step {start:,} of {r.steps:,}")
        self.save(start)  # also after a resume: a kill may have come between the checkpoint and the encoder
        board = TensorBoardWriter(self.run, start) if self.asked.tensorboard else None
        log = MetricsLog(self.run / "metrics.jsonl", start, [board.write] if board else [])
        snapshots = Snapshots(self.run, monitor.pictures, monitor.labels, start)
        history = read_history(self.run / "metrics.jsonl")
        self._measure(start, monitor, snapshots, log, history)

        every = max(1, min(20, r.steps // 50))
        measure_every = max(1, -(-r.steps // MEASUREMENTS))
        pending: list[dict[str, Tensor]] = []
        since, saved = time.monotonic(), time.monotonic()
        with self._signals(), _bar(self.console, "training", r.steps, start) as advance:
            for step in range(start, r.steps):
                pending.append(self.step(step))
                done = step + 1
                advance(1)
                due = time.monotonic() - saved > 60 * self.asked.checkpoint_minutes
                last = self.stopped or done == r.steps
                if done % every == 0 or last or due:  # before every checkpoint too: what is saved was seen to be finite
                    self._log(log, done, pending, time.monotonic() - since)
                    pending, since = [], time.monotonic()
                if done % measure_every == 0 or done == r.steps:
                    self._measure(done, monitor, snapshots, log, history)
                    since = time.monotonic()
                if self.stopped and done < r.steps:
                    self.save(done)
                    self.console.print(
                        f"stopped and saved at step {done:,} of {r.steps:,}: the same command with --resume continues"
                    )
                    return INTERRUPTED
                if done == r.steps or due:
                    self.save(done)
                    saved = time.monotonic()
        from training.report import write_report  # matplotlib: not at start-up

        write_report(self.run)
        self.console.print(f"report: {self.run / 'report.html'}")
        self.console.print(f"done: {self.run}   next: likewise export {self.run} --out BUNDLE")
        return 0

    def _log(self, log: MetricsLog, done: int, pending: list[dict[str, Tensor]], seconds: float) -> None:
        means = {name: float(torch.stack([p[name] for p in pending]).mean()) for name in pending[0]}
        if not math.isfinite(means["loss"]):
            raise RefusalError(
                f"the loss is {means['loss']} at step {done}; the last checkpoint is intact: lower --lr, or use "
                "--precision float32, with another --out"
            )
        log.write(
            step=done, **means, lr=self.optimizer.param_groups[0]["lr"],
            images_per_second=len(pending) * self.recipe.batch_size / seconds,
        )  # fmt: skip

    def _measure(
        self, step: int, monitor: Monitor, snapshots: Snapshots, log: MetricsLog, history: list[Health]
    ) -> None:
        health = monitor.measure(self.teacher, lambda heads: self._diagnostics(heads, step), step)
        history.append(health)
        log.write(**health.line())
        assert monitor.latest is not None
        snapshots.write(step, monitor.latest, monitor.maps(self.teacher, snapshots.mapped))
        knn = "" if math.isnan(health.knn) else f"   kNN {health.knn:.1f} %"
        self.console.print(
            f"step {step:>6,}   mean cosine {health.features.mean_cosine:.3f} (head {health.heads.mean_cosine:.3f})   "
            f"effective rank {health.features.effective_rank:.1f}   H(mean vote) "
            f"{health.diagnostics['mean_vote_entropy']:.2f} of {health.diagnostics['max_entropy']:.2f}{knn}"
        )
        for alarm in alarms(history, step / max(1, self.recipe.steps)):
            self.console.print(f"ALARM {alarm}", style="bold red")
            log.write(step=step, alarm=str(alarm), kind=alarm.kind)

    def _diagnostics(self, heads: Tensor, step: int) -> dict[str, float]:
        """The votes of the sample's head outputs [M, d]."""
        r = self.recipe
        temperature = linear_warmup(
            step, r.steps, r.teacher_temperature[0], r.teacher_temperature[1], r.temperature_warmup
        )
        generator = torch.Generator().manual_seed(derive(r.seed, "health", 0))
        prototypes = draw_prototypes(self.memory.rows.cpu().float(), r.anchors, r.support, generator, r.smoothing)
        votes = vote_statistics(heads, prototypes, temperature)
        q = (heads @ prototypes.D.flatten(0, 1).T / temperature).softmax(-1)
        values = {
            "vote_entropy": votes.entropy, "mean_vote_entropy": votes.entropy_of_mean,
            "max_entropy": math.log(r.anchors), "leak": votes.leak, "support_cosine": votes.support_cosine,
            "voter_entropy": float(-(q * q.clamp_min(1e-12).log()).sum(-1).mean()),
            "voter_max_entropy": math.log(q.shape[1]),
        }  # fmt: skip
        return {name: value for name, value in values.items() if not math.isnan(value)}

    def _monitor(self, resumed: bool) -> Monitor:
        """A sample of the pictures, prepared as at inference, with folder names as labels where there are several."""
        order = np.random.default_rng(self.recipe.seed).permutation(len(self.cache))[:SAMPLE]
        sample = [self.cache.pictures[i] for i in sorted(order)]
        spec = self._preprocess_spec()
        rows, names = [], []
        for picture in sample:
            try:
                rows.append(preprocess(picture.read(), spec).pixels)
            except UnreadablePictureError:
                continue  # changed since it was decoded; the sample does without it
            names.append(picture.folder)
        if not rows:
            raise RefusalError(
                f"none of the pictures in {self.asked.pictures} can be read any more: restore the folder"
            )
        classes = sorted(set(names))
        labels = None
        if 1 < len(classes) <= len(names) // 2 and "" not in classes:
            labels = torch.tensor([classes.index(name) for name in names])
        monitor = Monitor(
            torch.from_numpy(np.stack(rows)), labels, self.views.normalise, self.device, bool(self.recipe.init)
        )
        stored = self.run / "monitor.safetensors"
        if stored.is_file() and resumed:
            monitor.load(load_file(stored))
        else:
            monitor.start(monitor.features(self.teacher)[0])
            write_file(stored, save_safetensors(monitor.state()))
        for line in monitor.lines():
            self.console.print(line)
        return monitor

    def _steps_that_fit(self, minutes: float) -> int:
        before = copy.deepcopy(self.state())
        self.recipe = self.recipe.model_copy(update={"steps": 1000})
        self.step(0)  # allocations and caches
        start = time.monotonic()
        count = 0
        while time.monotonic() - start < min(5.0, 6 * minutes) or count < 2:
            count += 1
            self.step(count)
        seconds = (time.monotonic() - start) / count
        self.load(before)
        # A tenth goes to measurements and checkpoints.
        return max(1, int(0.9 * 60 * minutes / seconds))

    # --- state --------------------------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """What a checkpoint belongs to, and a resume must match."""
        precision = "bfloat16" if self.bf16 else "float32"
        fields = json.loads(self.recipe.model_dump_json())
        return {**fields, "data": self.cache.fingerprint.sha256, "precision": precision}

    def state(self) -> dict[str, Any]:
        """Everything that a step changes."""
        return {
            "student": self.student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "memory": self.memory.state_dict(),
            "patch_memory": self.patch_memory.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        for name in ("student", "teacher", "memory", "patch_memory", "optimizer"):
            getattr(self, name).load_state_dict(state[name])

    def save(self, step: int) -> None:
        """Write checkpoint, encoder and run.json, each atomically. Raises `RefusalError` rather than keep broken weights."""
        if not all(bool(torch.isfinite(p).all()) for p in self.student.parameters()):
            raise RefusalError(
                f"the weights are not finite at step {step}; the last checkpoint is intact: lower --lr, or use "
                "--precision float32, with another --out"
            )
        save_checkpoint(self.run, self.identity(), step, self.state())
        encoder = {name: value.detach().cpu().contiguous() for name, value in self.teacher.vit.state_dict().items()}
        write_file(self.run / "encoder.safetensors", save_safetensors(encoder))
        manifest = RunManifest(
            method="sop",
            config=json.loads(self.recipe.model_dump_json()),
            reasons=self.reasons,
            encoder=self._encoder_spec(),
            preprocess=self._preprocess_spec(),
            data=self.cache.fingerprint,
            versions={"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
            git_revision=_git_revision(),
            seed=self.recipe.seed,
            steps_done=step,
            steps_total=self.recipe.steps,
            weights_sha256=tensors_sha256({name: value.numpy() for name, value in encoder.items()}),
        )
        write_file(self.run / "run.json", manifest.model_dump_json(indent=2))

    def _encoder_spec(self) -> EncoderSpec:
        r = self.recipe
        return EncoderSpec(
            model=r.model, kwargs=r.model_kwargs, image_size=r.image_size, embedding_dim=self.teacher.vit.embed_dim
        )

    def _preprocess_spec(self) -> PreprocessSpec:
        return PreprocessSpec(size=self.recipe.image_size, fit=self.recipe.fit)

    # --- speech -------------------------------------------------------------------------------------------------

    def _announce(self) -> None:
        parameters = sum(p.numel() for p in self.teacher.vit.parameters()) / 1e6
        self.console.print(
            f"{len(self.cache):,} pictures, {self.recipe.model} with {parameters:.1f} M parameters at "
            f"{self.recipe.image_size} px, on {self.hardware.name}"
        )
        for name, reason in self.reasons.items():
            value = getattr(self.recipe, name, "")
            self.console.print(f"  {name} = {value}  ({reason})" if value != "" else f"  {name}: {reason}")

    @contextmanager
    def _signals(self) -> Any:
        def stop(number: int, frame: FrameType | None) -> None:
            if self.stopped:  # the second time at once
                raise KeyboardInterrupt
            self.stopped = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class MetricsLog:
    """metrics.jsonl: one JSON object per line; a resume drops the lines after its checkpoint."""

    def __init__(self, path: Path, resumed_at: int, observers: Sequence[Callable[..., None]] = ()) -> None:
        self._path = path
        self._observers = observers
        kept = []
        for line in path.read_text().splitlines() if path.is_file() else ():
            try:
                values = json.loads(line)
            except ValueError:
                continue  # the line that a kill cut short
            # The measurement at the checkpoint is made again.
            if values["step"] < resumed_at or (values["step"] == resumed_at and "loss" in values):
                kept.append(line)
        write_file(path, "".join(line + "\n" for line in kept))

    def write(self, **values: Any) -> None:
        """Append one line."""
        with self._path.open("a") as file:
            file.write(json.dumps(values) + "\n")
        for observe in self._observers:
            observe(**values)


def clip_each(module: torch.nn.Module, limit: float) -> None:
    """Scale down each parameter's own gradient to norm `limit` (1.8: per tensor, not over all)."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    norms = torch._foreach_norm(gradients)
    scale = (limit / (torch.stack(norms) + 1e-6)).clamp_(max=1.0)
    torch._foreach_mul_(gradients, list(scale.unbind()))


def derive(seed: int, purpose: str, number: int) -> int:
    """A seed for one purpose at one step: independent streams, the same after a resume."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _git_revision() -> str | None:
    here = Path(__file__).parent
    done = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


@contextmanager
def _bar(console: Console, title: str, total: int, start: int = 0) -> Any:
    """A progress bar on a terminal, nothing elsewhere (the measurements are printed as lines)."""
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(title, total=total, completed=start)
        yield lambda count: progress.advance(task, count)
