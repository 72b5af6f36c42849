"""What watches a run: measurements, alarms, snapshots, logs, report and verdict. The first process alone has one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as save_safetensors
from torch import Tensor

from export.bundle import Best, RefusalError, read_best, write_file
from export.preprocess import UnreadablePictureError, preprocess
from export.sources.picture import Picture
from training.alarms import alarms
from training.encoder import backbone_tensors, build_backbone, tensors_digest
from training.metrics_log import MetricsLog
from training.monitor import SAMPLE, Monitor, read_history
from training.snapshots import Snapshots
from training.tensorboard import TensorBoardWriter
from training.verdict import judge

if TYPE_CHECKING:
    from training.loop import Trainer

NOTABLE_POINTS = 2.0  # of kNN: about twice the standard error on a sample of 2,000 pictures


class Observer:
    """Measures a trainer's teacher on a fixed sample of its pictures, and writes down what it sees.

    `start` is the step that the run begins or continues with. Raises `RefusalError` when no picture can be read.
    """

    def __init__(self, trainer: Trainer, start: int, resumed: bool) -> None:
        self.trainer, self.run, self.console = trainer, trainer.run, trainer.console
        self._pictures = self._sample()
        self.monitor = self._monitor(resumed)
        board = [TensorBoardWriter(self.run, start).write] if trainer.asked.tensorboard else []
        self.log = MetricsLog(self.run / "metrics.jsonl", start, board)
        self.snapshots = Snapshots(self.run, self.monitor.pictures, self.monitor.labels, start)
        self.history = read_history(self.run / "metrics.jsonl", start)
        self._alarmed: set[str] = set()
        self._best = self._stored_best() if resumed else None
        if self._best is None:
            for name in ("best.json", "best.safetensors"):
                (self.run / name).unlink(missing_ok=True)

    def measure(self, step: int) -> None:
        """Measure, log, print, and alarm."""
        learner = self.trainer.learner
        moment = learner.moment(step)
        health = self.monitor.measure(learner.teacher, lambda heads: learner.method.diagnostics(heads, moment), step)
        self.history.append(health)
        self.log.write(**health.line())
        assert self.monitor.latest is not None
        maps = self.monitor.maps(learner.teacher, self.snapshots.mapped)
        self.snapshots.write(step, self.monitor.latest, maps)
        self._keep_best(step, health.knn)
        knn = "" if math.isnan(health.knn) else f"   kNN {health.knn:.1f} %"
        self.console.print(
            f"step {step:>6,}   mean cosine {health.features.mean_cosine:.3f} (head {health.heads.mean_cosine:.3f})   "
            f"effective rank {health.features.effective_rank:.1f}   H(mean vote) "
            f"{health.diagnostics['mean_vote_entropy']:.2f} of {health.diagnostics['max_entropy']:.2f}{knn}"
        )
        found = alarms(self.history, step / max(1, self.trainer.recipe.steps))
        for alarm in found:
            # A sentence is said once; while it holds, its name is enough.
            said = f"{alarm.kind}, still" if alarm.kind in self._alarmed else str(alarm)
            self.console.print(f"ALARM {said}", style="bold red")
            self.log.write(step=step, alarm=str(alarm), kind=alarm.kind)
        self._alarmed = {alarm.kind for alarm in found}

    def _stored_best(self) -> Best | None:
        """What an earlier part of the run kept; None where there is nothing, or a kill left two files that differ."""
        try:
            best = read_best(self.run)
            whole = best is not None and tensors_digest(load_file(self.run / "best.safetensors")) == best.weights_sha256
        except (RefusalError, OSError, SafetensorError):
            return None
        return best if whole else None

    def _keep_best(self, step: int, knn: float) -> None:
        """best.safetensors is the encoder of the highest kNN so far, after step 0; json last: it is what vouches."""
        if (
            step == 0
            or math.isnan(knn)
            or (self._best is not None and self._best.step != step and knn <= self._best.knn)
        ):
            return
        tensors = backbone_tensors(self.trainer.learner.teacher.backbone)
        self._best = Best(step=step, knn=knn, weights_sha256=tensors_digest(tensors))
        write_file(self.run / "best.safetensors", save_safetensors(tensors))
        write_file(self.run / "best.json", self._best.model_dump_json(indent=2))

    def finish(self, done: bool = True) -> None:
        """Report of a run that ends or stops, after the verdict where it is done."""
        if done and self.trainer.recipe.init is not None:
            self._judge()
        # A run from trained weights has its verdict, which goes by more than kNN.
        of_its_own = done and self.trainer.recipe.init is None
        if of_its_own and self._best is not None and self._best.knn - self.history[-1].knn > NOTABLE_POINTS:
            self.console.print(
                f"kNN was {self._best.knn:.1f} % at step {self._best.step:,} and is {self.history[-1].knn:.1f} % now: "
                f"likewise export {self.run} --weights best exports the encoder of then"
            )
        from training.report import write_report  # matplotlib: not at start-up

        self.console.print(f"report: {write_report(self.run)}")

    def _judge(self) -> None:
        """Runs that started from trained weights end with a verdict."""
        self.console.print("comparing the adapted encoder with the initial one")
        trainer, r = self.trainer, self.trainer.recipe
        initial = build_backbone(r.model, r.model_kwargs, r.image_size)
        initial.load_state_dict(load_file(self.run / "initial.safetensors"))
        initial.to(trainer.device, trainer.learner.speed.dtype)
        verdict = judge(
            initial, trainer.learner.teacher.backbone, self._pictures, trainer.preprocess_spec(), trainer.views.normalise,
            trainer.device, self.monitor.pictures.numpy(),
            None if self.monitor.labels is None else self.monitor.labels.numpy(), r.seed, r.views,
        )  # fmt: skip
        write_file(self.run / "verdict.json", verdict.model_dump_json(indent=2))
        self.console.print(f"verdict: export the {verdict.export} encoder: {verdict.sentence}")

    def _sample(self) -> list[Picture]:
        trainer = self.trainer
        order = np.random.default_rng(trainer.recipe.seed).permutation(len(trainer.cache))[:SAMPLE]
        return [trainer.cache.pictures[i] for i in sorted(order)]

    def _monitor(self, resumed: bool) -> Monitor:
        """The sample prepared as at inference, with folder names as labels where there are several."""
        trainer = self.trainer
        spec = trainer.preprocess_spec()
        rows, names = [], []
        for picture in self._pictures:
            try:
                rows.append(preprocess(picture.read(), spec).pixels)
            except UnreadablePictureError:
                continue  # changed since it was decoded; the sample does without it
            names.append(picture.folder)
        if not rows:
            raise RefusalError(
                f"none of the pictures in {' '.join(trainer.asked.pictures)} can be read any more: restore them"
            )
        if 0 < names.count("") < len(names) // 2:  # a few pictures outside the class folders: the sample does without
            rows = [row for row, name in zip(rows, names, strict=True) if name]
            names = [name for name in names if name]
        classes = sorted(set(names))
        labels: Tensor | None = None
        if 1 < len(classes) <= len(names) // 2 and "" not in classes:
            labels = torch.tensor([classes.index(name) for name in names])
        elif len(classes) > 1:
            self.console.print(
                f"folder names are not used as labels: {names.count('')} of {len(names)} sampled pictures lie in no folder, "
                f"the others in {len(set(classes) - {''})}"
            )
        monitor = Monitor(
            torch.from_numpy(np.stack(rows)), labels, trainer.views.normalise, trainer.device,
            trainer.recipe.init is not None,
        )  # fmt: skip
        stored = self.run / "monitor.safetensors"
        if stored.is_file() and resumed:
            monitor.load(load_file(stored))
        else:
            monitor.start(monitor.features(trainer.learner.teacher)[0])
            write_file(stored, save_safetensors(monitor.state()))
        for line in monitor.lines():
            self.console.print(line)
        return monitor
