"""The loop: mechanics, resume, refusals. Quality is measured by benchmarks/pretrain_small.py, never here."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.bundle import Bundle, RefusalError, read_best, read_run, read_verdict, tensors_sha256
from likewise import main
from tests.conftest import TINY
from tests.shapes import write_shapes
from training.checkpoint import NAME as CHECKPOINT
from training.command import as_started
from training.config import Hardware, Recipe, Train
from training.encoder import Student, Teacher, build_backbone, reset_linear_layers, tensors_digest
from training.head import Head
from training.learner import Learner, Speed, clip_each
from training.masks import block_masks
from training.observer import NOTABLE_POINTS
from training.resolve import resolve
from training.seeds import derive
from training.verdict import decide
from training.views import Views

CPU = Hardware("cpu", "2 CPU threads", 2, False)


def checkpoint(run: Path) -> dict[str, Any]:
    return torch.load(run / CHECKPOINT, weights_only=True)


def steps_done(run: Path) -> int:
    """As run.json tells it, 0 where there is none yet."""
    return read_run(run).steps_done if (run / "run.json").is_file() else 0


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def test_a_run_leaves_what_it_promises(run: Path, pictures: Path) -> None:
    manifest = read_run(run)
    assert manifest.steps_done == manifest.steps_total == 3
    assert manifest.data.pictures == 64 and manifest.encoder.embedding_dim == 64
    assert set(manifest.reasons) >= {"preset", "memory", "anchors", "precision"}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 3 and all(math.isfinite(loss) for loss in losses)
    health = [line for line in lines if "health" in line]
    assert health[0]["step"] == 0 and health[-1]["step"] == 3
    assert all(-1 <= line["mean_cosine"] <= 1 and line["effective_rank"] > 1 for line in health)


KINDS = {
    "sop": [],
    "sop-mim": ["--mim-weight", "1"],
    "dino": ["--method", "dino"],
    "massl": ["--method", "massl"],
    "centred": ["--teacher-votes", "centred", "--accumulate", "2"],
}


@pytest.mark.parametrize(
    "kind", [kind if kind == "sop-mim" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_a_stopped_run_continues_bit_identically(pictures: Path, tmp_path: Path, kind: str) -> None:
    flags = ["--steps", "6", *KINDS[kind], "--checkpoint-minutes", "0.00001", *TINY]
    assert main(["train", str(pictures), "--out", str(tmp_path / "whole"), *flags]) == 0
    # The second run is killed by a signal after its first checkpoint past the start.
    out = tmp_path / "cut"
    command = [sys.executable, "-m", "likewise", "train", str(pictures), "--out", str(out), *flags]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if steps_done(out) >= 1:
            process.send_signal(signal.SIGUSR1 if kind == "dino" else signal.SIGTERM)
            break
        time.sleep(0.002)
    assert process.wait(60) in (130, 0)
    assert main(["train", str(pictures), "--out", str(out), "--resume", *flags]) == 0
    assert same(checkpoint(tmp_path / "whole"), checkpoint(out))
    a, b = ((r / "metrics.jsonl").read_text().splitlines() for r in (tmp_path / "whole", out))
    steps = [[json.loads(line)["step"] for line in lines if "images_per_second" in line] for lines in (a, b)]
    assert steps[0] == steps[1] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_three_sigkills_lose_nothing(pictures: Path, tmp_path: Path) -> None:
    flags = ["--steps", "40", "--checkpoint-minutes", "0.00001", *TINY]
    assert main(["train", str(pictures), "--out", str(tmp_path / "whole"), *flags]) == 0
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "likewise", "train", str(pictures), "--out", str(out), "--resume", *flags]
    rng = random.Random(0)
    before = 0
    for _ in range(3):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if steps_done(out) >= before + 2:
                time.sleep(rng.uniform(0, 0.05))
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
        assert before + 2 <= checkpoint(out)["step"] < 40  # killed midway, with whole checkpoints only
        before = checkpoint(out)["step"]
    assert main([*command[3:]]) == 0
    assert same(checkpoint(tmp_path / "whole"), checkpoint(out))


def test_zero_steps_write_the_untrained_network(pictures: Path, tmp_path: Path) -> None:
    assert main(["train", str(pictures), "--out", str(tmp_path / "run"), "--steps", "0", *TINY]) == 0
    torch.manual_seed(0)
    vit = build_backbone("vit_tiny_patch16_224", {"embed_dim": 64, "depth": 2, "num_heads": 4, "patch_size": 8}, 32)
    reset_linear_layers(vit)
    assert same(load_file(tmp_path / "run" / "encoder.safetensors"), vit.state_dict())


def test_init_starts_from_a_timm_state_dict_or_a_run(run: Path, pictures: Path, tmp_path: Path) -> None:
    state = load_file(run / "encoder.safetensors")
    save_file({**state, "head.weight": torch.zeros(3, 64)}, tmp_path / "timm.safetensors")
    for source in (run, tmp_path / "timm.safetensors"):
        out = tmp_path / f"from-{source.name}"
        assert main(["train", str(pictures), "--out", str(out), "--init", str(source), "--steps", "0", *TINY]) == 0
        assert same(load_file(out / "encoder.safetensors"), state)


def test_init_resizes_position_embeddings(run: Path, pictures: Path, tmp_path: Path) -> None:
    flags = [*TINY, "--steps", "0"]
    flags[flags.index("--image-size") + 1] = "64"
    assert main(["train", str(pictures), "--out", str(tmp_path / "r"), "--init", str(run), *flags]) == 0
    assert load_file(tmp_path / "r" / "encoder.safetensors")["pos_embed"].shape == (1, 65, 64)


def test_refusals(run: Path, pictures: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    out = tmp_path / "out"
    assert "does not exist" in refused("train", tmp_path / "nope", "--out", out)
    (tmp_path / "empty").mkdir()
    assert "holds no pictures" in refused("train", tmp_path / "empty", "--out", out)
    few = write_shapes(tmp_path / "few", 9)
    assert "9 readable pictures, at least 32" in refused("train", few, "--out", out, *TINY)
    assert "--resume" in refused("train", pictures, "--out", run, *TINY)
    assert "another configuration (" in refused("train", pictures, "--out", run, "--resume", "--steps", "9", *TINY)
    assert "start with torchrun" in refused("train", pictures, "--out", out, "--shard", *TINY)
    assert "choose one" in refused("train", pictures, "--out", out, "--steps", "1", "--epochs", "1", *TINY)
    o = tmp_path / "o"
    assert "exceeds the 64" in refused("train", pictures, "--out", o, "--batch-size", "65", "--resume", *TINY)
    assert "exceeds the 64" in refused("train", pictures, "--out", o, "--memory", "65", "--resume", *TINY)
    sentence = refused("train", pictures, "--out", o, "--encoder", "vit_smal_patch16_224", "--resume")
    assert "vit_small_patch16_224" in sentence
    assert "can be adapted but not pretrained" in refused(
        "train", pictures, "--out", o, "--encoder", "resnet18", "--resume"
    )
    tagged = refused("train", pictures, "--out", o, "--encoder", "vit_small_patch16_224.nonsense", "--resume")
    assert "timm has no weights 'nonsense' of vit_small_patch16_224: choose one of vit_small_patch16_224." in tagged
    assert "within 0 … 1" in refused("train", pictures, "--out", o, "--local-scale", "[0.4, 0.1]", "--resume", *TINY)
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    bad = ["train", pictures, "--out", o, "--resume", "--init", tmp_path / "bad.safetensors", *TINY]
    assert "cannot be read as weights" in refused(*bad)
    wide = [*TINY]
    wide[wide.index("vit_nano")] = "vit_micro"
    sentence = refused("train", pictures, "--out", o, "--resume", "--init", run, *wide)
    assert "another architecture" in sentence and "blocks." in sentence
    damaged = tmp_path / "damaged"
    (damaged / "checkpoints").mkdir(parents=True)
    (damaged / CHECKPOINT).write_bytes(b"torn")
    assert "is damaged" in refused("train", pictures, "--out", damaged, "--resume", "--steps", "1", *TINY)


def test_a_loss_that_is_not_finite_is_never_saved(pictures: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    # 2,000 steps: the loss is logged every 20, but a checkpoint is due at each.
    flags = ["--steps", "2000", "--lr", "1e30", "--checkpoint-minutes", "1e-7", *TINY]
    assert "lower --lr" in refused("train", pictures, "--out", tmp_path / "r", *flags)
    state = checkpoint(tmp_path / "r")["state"]["student"]
    assert all(torch.isfinite(value).all() for value in state.values())


def test_the_offending_step_is_kept(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the sixth step the loss is made infinite: what that step began with is saved, and none of it was updated."""
    out = tmp_path / "r"
    flags = ["--steps", "2000", *TINY]
    seen: dict[int, Any] = {}
    from training.learner import Learner

    backward = Learner._backward

    def poisoned(self: Learner, parts: Any, groups: Any, now: Any, generator: Any) -> Any:
        terms, outputs = backward(self, parts, groups, now, generator)
        seen[now.step] = {name: value.clone() for name, value in self.student.state_dict().items()}
        if now.step == 5:
            terms["loss"] = terms["loss"] * math.inf
        return terms, outputs

    monkeypatch.setattr(Learner, "_backward", poisoned)
    assert main(["train", str(pictures), "--out", str(out), *flags]) == 1
    kept = torch.load(out / "offending-step.pt", weights_only=True)
    assert kept["step"] == 5 and not math.isfinite(kept["terms"]["loss"])
    assert same(kept["state"]["student"], seen[5]) and not same(seen[5], seen[4])
    assert len(kept["pictures"]) == len(set(kept["pictures"])) == 16
    assert checkpoint(out)["step"] == 0  # logged every 20 steps only, and yet what the sixth began with is kept


def poison_gradient(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Make a gradient of one step infinite; its loss stays finite."""
    backward = Learner._backward

    def poisoned(self: Learner, parts: Any, groups: Any, now: Any, generator: Any) -> Any:
        found = backward(self, parts, groups, now, generator)
        if now.step == step:
            grad = self.student.head.mlp[0].weight.grad
            assert grad is not None
            grad[0, 0] = math.inf
        return found

    monkeypatch.setattr(Learner, "_backward", poisoned)


def test_a_bad_gradient_ends_a_run_that_does_not_wait_for_its_device(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    """As on a GPU: nothing is looked at in the step; no later step updates the student, and the next log line says so."""
    seen: dict[int, Any] = {}
    step = Learner.step

    def watched(self: Learner, batch: Any, number: int) -> Any:
        self.checks_at_once = False
        terms = step(self, batch, number)
        seen[number] = {name: value.clone() for name, value in self.student.state_dict().items()}
        return terms

    monkeypatch.setattr(Learner, "step", watched)
    poison_gradient(monkeypatch, 2)
    sentence = refused("train", pictures, "--out", tmp_path / "r", "--steps", "2000", *TINY)
    assert "a gradient is not finite at step 2" in sentence
    assert not same(seen[0], seen[1]) and same(seen[1], seen[2]) and same(seen[2], seen[max(seen)])
    assert len(seen) == 20  # until the first log line


@pytest.mark.parametrize("flags", [["--plan"], ["--minutes", "0.02"]])
def test_a_diverging_start_is_refused_while_it_is_measured(
    flags: list[str], pictures: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    sentence = refused("train", pictures, "--out", tmp_path / "r", *flags, "--lr", "1e30", *TINY)
    assert "while their time was measured: lower --lr" in sentence


def test_out_of_memory_on_a_cpu_names_the_flags(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    from training.learner import Learner

    def greedy(*_: Any) -> Any:
        return torch.empty(2**48, dtype=torch.uint8)  # torch's own words for what does not fit

    monkeypatch.setattr(Learner, "step", greedy)
    sentence = refused("train", pictures, "--out", tmp_path / "r", "--steps", "5", *TINY)
    assert "out of memory" in sentence and "--accumulate 2" in sentence


def test_a_resume_between_measurements_makes_none(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alarms compare measurements at equal distances."""
    from training.learner import Learner

    out, step, stops = tmp_path / "r", Learner.step, {5, 8}

    def interrupted(self: Learner, batch: Any, number: int) -> Any:
        if number in stops:
            stops.remove(number)
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, number)

    monkeypatch.setattr(Learner, "step", interrupted)
    flags = ["train", str(pictures), "--out", str(out), "--steps", "20", "--resume", *TINY]
    assert [main(flags), main(flags), main(flags)] == [130, 130, 0]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "health" in line] == list(range(0, 21, 2))


def test_a_damaged_note_of_the_best_encoder_heals(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "r"
    flags = ["train", str(pictures), "--out", str(out), "--steps", "4", *TINY]
    assert main(flags) == 0
    (out / "best.json").write_text("{}")
    assert main([*flags, "--resume"]) == 0  # measured again where it ended
    assert read_best(out) is not None


def test_a_run_keeps_the_batch_that_was_chosen_for_it(run: Path, pictures: Path) -> None:
    """The automatic batch depends on the number of processes; a run may continue with another one."""
    asked = Train(pictures=str(pictures), out=run, resume=True)
    assert as_started(asked, Hardware("cpu", "CPU", 1, False, 2)).batch_size == read_run(run).config["batch_size"] == 16
    with pytest.raises(RefusalError, match="do not divide over 3 processes"):
        as_started(asked, Hardware("cpu", "CPU", 1, False, 3))
    assert (
        as_started(asked.model_copy(update={"resume": False}), Hardware("cpu", "CPU", 1, False, 3)).batch_size is None
    )


@pytest.mark.parametrize(
    ("method", "flag"),
    [("massl", {"support_weight": "constant"}), ("massl", {"halved_anchors": True}), ("dino", {"memory": 64}),
     ("dino", {"anchors_from": "written"}), ("sop", {"prototypes": 8}), ("dino", {"teacher_votes": "sinkhorn"})],
)  # fmt: skip
def test_flags_of_another_method_are_refused(method: str, flag: dict[str, Any]) -> None:
    with pytest.raises(RefusalError, match=f"--{next(iter(flag)).replace('_', '-')} is not part of --method {method}"):
        recipe(2000, Hardware("cpu", "CPU", 1, False), method=method, **flag)


def test_small_sets_may_ask_for_the_memory_that_they_get() -> None:
    cpu = Hardware("cpu", "CPU", 1, False)
    assert recipe(40, cpu, memory=64)[0].memory == recipe(40, cpu)[0].memory == 64


def test_schedules_of_the_paper() -> None:  # 14
    r, _ = recipe(1_281_167, Hardware("cuda", "H200", 16, True), encoder="vit_nano", patch_size=8, image_size=32)
    learner = Learner(
        r.model_copy(update={"steps": 1000}), torch.device("cpu"), Speed(), Views("photographs", r.mean, r.std)
    )
    first, last = learner.moment(0), learner.moment(999)
    assert first.momentum == pytest.approx(0.996) and last.momentum == pytest.approx(1.0)
    assert (first.weight_decay, last.weight_decay) == pytest.approx((0.04, 0.4))
    assert first.teacher_temperature == pytest.approx(0.04) and last.teacher_temperature == pytest.approx(0.07)
    rising = round(1000 * r.lr_warmup)
    rates = [learner.moment(step).lr for step in range(1000)]
    assert max(rates) == pytest.approx(r.lr) and rates.index(max(rates)) in (rising - 1, rising)
    assert rates[0] == pytest.approx(r.lr / rising) and rates[-1] == pytest.approx(r.min_lr)
    ramp = round(1000 * r.temperature_warmup)
    assert learner.moment(ramp // 2).teacher_temperature == pytest.approx(0.055, abs=1e-3)


@pytest.mark.parametrize("method", ["sop", "massl", "dino"])
def test_koleo_fades_in_the_recipe(method: str) -> None:
    r, _ = recipe(2000, Hardware("cpu", "CPU", 1, False), method=method, koleo_weight=0.2, koleo_final_weight=0.0)
    assert r.koleo_weight == (0.2, 0.0)


@pytest.mark.parametrize("method", ["sop", "dino"])
def test_koleo_may_fade_to_nothing(pictures: Path, tmp_path: Path, method: str) -> None:
    flags = ["--method", method, "--koleo-weight", "0.1", "--koleo-final-weight", "0", "--precision", "float64", *TINY]
    assert main(["train", str(pictures), "--out", str(tmp_path / "r"), "--steps", "10", *flags]) == 0
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert all("koleo" in line for line in lines if "loss" in line)


def test_a_gradient_that_is_not_finite_updates_nothing(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    """The loss is finite, a gradient is not: the weights would be lost with the update."""
    poison_gradient(monkeypatch, 2)
    sentence = refused("train", pictures, "--out", tmp_path / "r", "--steps", "5", *TINY)
    assert "a gradient is not finite at step 2" in sentence
    kept = torch.load(tmp_path / "r" / "offending-step.pt", weights_only=True)
    assert all(value.isfinite().all() for value in kept["state"]["student"].values())


def test_a_run_from_trained_weights_goes_on_without_their_file(
    run: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[..., str],
    stop_at: Callable[[int], None],
) -> None:
    weights, out = tmp_path / "w.safetensors", tmp_path / "r"
    weights.write_bytes((run / "encoder.safetensors").read_bytes())
    flags = ["train", str(pictures), "--out", str(out), "--steps", "4", "--resume", *TINY]
    stop_at(2)
    assert main([*flags, "--init", str(weights)]) == 130
    # No verdict yet: which of both to export is not known.
    assert "has no verdict yet" in refused("export", out, "--out", tmp_path / "b")
    other = tmp_path / "other.safetensors"
    save_file({k: v + 1 for k, v in load_file(weights).items()}, other)
    assert "another configuration (init" in refused(*flags, "--init", other)
    monkeypatch.chdir(tmp_path)
    assert main([*flags, "--init", "w.safetensors", "--steps", "4"]) == 0  # another spelling of the same file
    weights.unlink()
    assert main([*flags, "--init", str(weights)]) == 0
    assert steps_done(out) == 4 and read_verdict(out) is not None


def test_a_run_from_a_run_that_is_gone_keeps_its_normalization(run: Path, pictures: Path, tmp_path: Path) -> None:
    first, out = shutil.copytree(run, tmp_path / "first"), tmp_path / "r"
    fields = json.loads((first / "run.json").read_text())
    fields["encoder"] |= {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    (first / "run.json").write_text(json.dumps(fields))
    flags = ["train", str(pictures), "--out", str(out), "--steps", "2", "--resume", "--init", str(first), *TINY]
    assert main(flags) == 0 and read_run(out).encoder.mean == (0.5, 0.5, 0.5)
    shutil.rmtree(first)
    assert main(flags) == 0


def test_the_batch_divides_over_the_processes() -> None:
    assert recipe(200, Hardware("cpu", "CPU", 1, False, 3))[0].batch_size % 3 == 0
    with pytest.raises(RefusalError, match="multiple of 3"):
        recipe(200, Hardware("cpu", "CPU", 1, False, 3), batch_size=16)


def test_published_warm_ups_are_counted_in_epochs() -> None:
    gpu = Hardware("cuda", "H200", 16, True)
    for encoder, epochs, share in (("vit_small_patch16_224", 800, 30 / 800), ("vit_base_patch16_224", 400, 50 / 400)):
        r, _ = recipe(1_281_167, gpu, encoder=encoder)
        assert r.lr_warmup == pytest.approx(10 / epochs) and r.temperature_warmup == pytest.approx(share)


def test_initial_weights_of_odd_kinds_are_refused_in_a_sentence(
    run: Path, pictures: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    torch.save([1, 2], tmp_path / "list.pth")
    state = load_file(run / "encoder.safetensors")
    save_file({**state, "pos_embed": torch.zeros(1, 9, 64)}, tmp_path / "odd.safetensors")
    flags = ["train", pictures, "--out", tmp_path / "r", "--steps", "0", *TINY]
    assert "no state dict" in refused(*flags, "--init", tmp_path / "list.pth")
    sentence = refused(*flags, "--init", tmp_path / "odd.safetensors")
    assert "1 of another shape (pos_embed)" in sentence
    save_file({**state, "mask_token": torch.zeros(1, 64)}, tmp_path / "ibot.safetensors")
    assert main([*map(str, flags), "--init", str(tmp_path / "ibot.safetensors")]) == 0


def test_weights_may_bring_their_own_normalization(run: Path, pictures: Path, tmp_path: Path) -> None:
    flags = ["--init", str(run / "encoder.safetensors"), "--normalization", "model", "--steps", "0", *TINY]
    assert main(["train", str(pictures), "--out", str(tmp_path / "r"), *flags]) == 0
    spec = read_run(tmp_path / "r").encoder
    assert spec.mean == (0.5, 0.5, 0.5) and spec.std == (0.5, 0.5, 0.5)
    again = ["--init", str(tmp_path / "r"), "--steps", "0", *TINY]
    assert main(["train", str(pictures), "--out", str(tmp_path / "again"), *again]) == 0
    assert read_run(tmp_path / "again").encoder.mean == (0.5, 0.5, 0.5)


def test_out_of_memory_names_the_flags_that_help(
    pictures: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from training.learner import Learner

    step = Learner.step

    def full(self: Learner, batch: Any, number: int) -> Any:
        if number >= 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nDetails")
        return step(self, batch, number)

    monkeypatch.setattr(Learner, "step", full)
    assert "2.00 GiB" in refused("train", pictures, "--out", tmp_path / "p", "--steps", "5", "--plan", *TINY)
    sentence = refused("train", pictures, "--out", tmp_path / "r", "--steps", "5", *TINY)
    assert "2.00 GiB" in sentence and "Details" not in sentence
    for flag in ("--accumulate 2", "--checkpoint-activations", "--local-crops", "--batch-size", "--resume"):
        assert flag in sentence


def test_a_full_disk_leaves_the_old_checkpoint(
    pictures: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import training.checkpoint

    write = training.checkpoint.write_file
    count = 0

    def full(path: Path, data: bytes) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, data)

    flags = ["train", pictures, "--out", tmp_path / "r", "--steps", "5", "--checkpoint-minutes", "1e-7", *TINY]
    with monkeypatch.context() as patch:
        patch.setattr(training.checkpoint, "write_file", full)
        sentence = refused(*flags)
    assert "No space left" in sentence and "--resume" in sentence
    assert checkpoint(tmp_path / "r")["step"] == 1
    assert main([str(flag) for flag in flags] + ["--resume"]) == 0 and steps_done(tmp_path / "r") == 5


def test_a_plan_trains_nothing(pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r"
    flags = ["train", str(pictures), "--out", str(out), "--steps", "300", *TINY]
    assert main([*flags, "--plan"]) == 0
    said = capfd.readouterr().err
    assert "plan: preset small, 300 steps of 16 pictures" in said
    assert "minutes" in said and "memory" in said and "disk" in said
    assert not (out / CHECKPOINT).exists() and not (out / "run.json").exists()
    assert main([*flags, "--steps", "1"]) == 0  # the folder is not spoilt for the run


def test_pictures_come_from_several_sources(pictures: Path, tmp_path: Path) -> None:
    listed = tmp_path / "list.csv"
    rows = [f"{path},{path.parent.name}" for path in sorted((pictures / "star").iterdir())]
    listed.write_text("path,label\n" + "\n".join(rows) + "\n")
    sources = [str(pictures / "circle"), str(pictures / "*" / "*[0-4].png"), str(listed)]
    assert main(["train", *sources, "--out", str(tmp_path / "r"), "--steps", "1", *TINY]) == 0
    found = len(list((pictures / "circle").iterdir())) + len(list(pictures.glob("*/*[0-4].png"))) + len(rows)
    assert read_run(tmp_path / "r").data.pictures == found


def test_a_resume_needs_the_same_pictures_and_precision(
    run: Path, pictures: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    data = write_shapes(tmp_path / "data", 40)
    out = tmp_path / "r"
    flags = ["train", data, "--out", out, "--resume", "--steps", "2", *TINY]
    assert main([str(f) for f in flags]) == 0
    assert "precision float32 → bfloat16" in refused(*flags, "--precision", "bfloat16")
    write_shapes(data, 41)
    assert "the pictures are not those" in refused(*flags)


def test_files_lost_after_the_checkpoint_are_written_again(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "r"
    flags = ["train", str(pictures), "--out", str(out), "--resume", "--minutes", "0.02", *TINY]
    assert main(flags) == 0
    before = (out / "encoder.safetensors").read_bytes()
    for name in ("encoder.safetensors", "run.json"):
        (out / name).unlink()  # as after a kill between the checkpoint and them
    assert main(flags) == 0
    assert (out / "encoder.safetensors").read_bytes() == before and steps_done(out) == read_run(out).steps_total


def test_a_refused_start_can_be_corrected_in_place(pictures: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    flags = ["train", pictures, "--out", tmp_path / "r", "--steps", "0", *TINY]
    assert "is not a file" in refused(*flags, "--init", tmp_path / "none.pth")
    assert main([str(f) for f in flags]) == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("x")
    assert "not empty and holds no run" in refused("train", pictures, "--out", tmp_path / "mine", *TINY)


def test_names_of_every_kind_train(tmp_path: Path) -> None:
    folder = tmp_path / unicodedata.normalize("NFD", "größe")
    write_shapes(folder, 32)
    (folder / "star").rename(folder / unicodedata.normalize("NFD", "étoile"))
    raw = os.fsencode(tmp_path) + b"/bad\xff"
    folder.rename(os.fsdecode(raw))
    assert main(["train", os.fsdecode(raw), "--out", str(tmp_path / "r"), "--steps", "1", *TINY]) == 0
    assert read_run(tmp_path / "r").data.pictures == 32
    health = [line for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines() if "health" in line]
    assert "knn" in json.loads(health[-1])  # every picture of the sample was found again


def test_unreadable_pictures_are_listed_and_skipped(pictures: Path, tmp_path: Path) -> None:
    folder = write_shapes(tmp_path / "some", 40)
    (folder / "notes.jpg").write_text("not a picture")
    (folder / "cut.png").write_bytes((folder / "star" / "00003.png").read_bytes()[:200])
    assert main(["train", str(folder), "--out", str(tmp_path / "r"), "--steps", "1", *TINY]) == 0
    listed = (tmp_path / "r" / "unreadable.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == ["cut.png", "notes.jpg"]
    assert read_run(tmp_path / "r").data.unreadable == 2


def recipe(pictures: int, hardware: Hardware = CPU, **asked: object) -> tuple[Recipe, dict[str, str]]:
    return resolve(Train(pictures=Path("p"), out=Path("o"), **asked), pictures, hardware)


def test_the_preset_follows_pictures_and_hardware() -> None:
    small, why = recipe(4000)
    assert (small.support, small.head_dim, small.smoothing, small.koleo_weight, small.mim_weight) == (
        4,
        128,
        0,
        (0.1, 0.1),
        0,
    )
    assert small.memory <= 2000 and "half" in why["memory"] and small.weight_init == "default"
    large, _ = recipe(1_000_000, Hardware("cuda", "H200", 16, True))
    assert (large.memory, large.anchors, large.support, large.head_dim) == (65536, 4096, 8, 256)
    assert (large.smoothing, large.koleo_weight, large.mim_weight, large.batch_size) == (0.1, (0, 0), 1, 1024)
    assert recipe(1_000_000)[0].preset == "small"  # no GPU
    for pictures in (32, 33, 100, 1000, 49_999):
        r, _ = recipe(pictures)
        assert r.batch_size <= pictures and r.anchors + r.support <= r.memory and r.batch_size <= r.memory


def test_student_and_teacher_compute_what_the_loss_needs() -> None:
    vit = build_backbone("vit_tiny_patch16_224", {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 8}, 32)
    student, teacher = Student(vit, Head(32, 16, 8)), Teacher(vit, Head(32, 16, 8))
    images = torch.randn(4, 3, 32, 32)
    mask = torch.zeros(4, 16, dtype=torch.bool)
    mask[0, :5] = mask[3, 2] = True
    cls, patches = student(images, mask)
    assert cls.shape == (4, 8) and patches.shape == (6, 8)
    assert torch.allclose(patches.norm(dim=1), torch.ones(6), atol=1e-5)
    # The mask token hides the picture: what lies under a mask changes nothing.
    changed = images.clone()
    changed[0, :, :8] = 7.0  # patches 0…3, all masked
    assert torch.allclose(student(changed, mask)[0], cls, atol=1e-5)
    assert not torch.allclose(student(changed)[0], student(images)[0], atol=1e-3)
    # A batch without any mask still gives one drawn patch per picture to the patch memory.
    none = torch.zeros(4, 16, dtype=torch.bool)
    _, masked, drawn = teacher(images, none, torch.tensor([3, 9]))
    assert masked.shape == (0, 8) and drawn.shape == (2, 8)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not any("mask_token" in name for name, _ in teacher.named_parameters())


def test_ema() -> None:  # 14
    kwargs = {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 8}
    student = Student(build_backbone("vit_tiny_patch16_224", kwargs, 32), Head(32, 16, 8))
    teacher = Teacher(build_backbone("vit_tiny_patch16_224", kwargs, 32), Head(32, 16, 8))
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    teacher.follow(student, 1.0)
    assert same(dict(teacher.state_dict()), before)
    teacher.follow(student, 0.75)
    name = "head.mlp.0.weight"
    expected = 0.75 * before[name] + 0.25 * student.state_dict()[name]
    assert torch.allclose(teacher.state_dict()[name], expected)
    teacher.follow(student, 0.0)
    assert torch.allclose(teacher.state_dict()[name], student.state_dict()[name])


def test_each_gradient_is_clipped_on_its_own() -> None:
    module = torch.nn.Linear(2, 2)
    module.weight.grad, module.bias.grad = torch.full((2, 2), 10.0), torch.full((2,), 0.1)
    clip_each(module.parameters(), 3.0)
    assert module.weight.grad.norm().item() == pytest.approx(3.0, rel=1e-4)
    assert torch.allclose(module.bias.grad, torch.full((2,), 0.1))


def test_block_masks_stay_below_their_ratio() -> None:
    masks = block_masks(200, 14, 14, 0.5, (0.1, 0.5), torch.Generator().manual_seed(0))
    share = masks.float().mean(1)
    assert 0.35 < (share > 0).float().mean().item() < 0.65
    assert share.max().item() <= 0.5
    assert share[share > 0].mean().item() > 0.15
    again = block_masks(200, 14, 14, 0.5, (0.1, 0.5), torch.Generator().manual_seed(0))
    assert torch.equal(masks, again)


def test_seeds_of_different_steps_differ() -> None:
    seeds = {derive(seed, purpose, n) for seed in (0, 1) for purpose in ("step", "epoch") for n in range(50)}
    assert len(seeds) == 200 and all(0 <= s < 2**63 for s in seeds)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_trains_on_a_gpu(pictures: Path, tmp_path: Path) -> None:
    flags = [
        "--encoder",
        "vit_nano",
        "--image-size",
        "32",
        "--patch-size",
        "8",
        "--device",
        "cuda",
        "--mim-weight",
        "1",
    ]
    assert main(["train", str(pictures), "--out", str(tmp_path / "r"), "--steps", "5", *flags]) == 0
    assert "bfloat16" in read_run(tmp_path / "r").reasons["precision"]


@pytest.mark.slow
def test_a_run_from_trained_weights_ends_with_a_verdict_that_export_follows(
    run: Path, pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "adapted"
    flags = ["--steps", "6", "--init", str(run), "--lr", "1e-9", *TINY]
    assert main(["train", str(pictures), "--out", str(out), *flags]) == 0
    verdict = read_verdict(out)
    # With a learning rate of nothing there is no difference, and the initial encoder stays.
    assert verdict is not None and verdict.export == "initial"
    assert "mean average precision with folder names as labels" in verdict.sentence
    assert "mean_average_precision_adapted" in verdict.scores
    assert verdict.sentence in (out / "report.html").read_text()
    assert same(load_file(out / "initial.safetensors"), load_file(run / "encoder.safetensors"))
    for weights, file in (("auto", "initial"), ("adapted", "encoder")):
        bundle = tmp_path / f"bundle-{weights}"
        capfd.readouterr()
        assert main(["export", str(out), "--out", str(bundle), "--weights", weights]) == 0
        assert ("as the run's verdict says" in capfd.readouterr().err) == (weights == "auto")
        tensors = {name: value.numpy() for name, value in load_file(out / f"{file}.safetensors").items()}
        assert Bundle.open(bundle).manifest.weights_sha256 == tensors_sha256(tensors)


def test_the_encoder_of_the_best_measurement_is_kept_and_exported(
    pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    flags = ["train", str(pictures), "--out", str(out), "--steps", "12", "--lr", "0.05", *TINY]  # too fast to last
    assert main(flags) == 0
    best = read_best(out)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    measured = {line["step"]: line["knn"] for line in lines if "knn" in line and line["step"] > 0}
    assert best is not None and best.knn == max(measured.values()) == measured[best.step]
    assert best.step < 12, "the last one is the best one: this shows nothing"
    stored = load_file(out / "best.safetensors")
    assert tensors_digest(stored) == best.weights_sha256
    assert not same(stored, load_file(out / "encoder.safetensors"))
    said = "--weights best" in capfd.readouterr().err
    assert said == (best.knn - measured[12] > NOTABLE_POINTS)
    assert main(["export", str(out), "--out", str(tmp_path / "b"), "--weights", "best"]) == 0
    manifest = Bundle.open(tmp_path / "b").manifest
    assert (manifest.weights_sha256, manifest.provenance["steps_done"]) == (best.weights_sha256, best.step)


def test_without_labels_there_is_no_best_encoder(pictures: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted(pictures.rglob("*.png"))):
        (flat / f"{i}.png").write_bytes(path.read_bytes())
    out = tmp_path / "run"
    assert main(["train", str(flat), "--out", str(out), "--steps", "2", *TINY]) == 0
    assert not (out / "best.safetensors").exists()
    said = refused("export", out, "--out", tmp_path / "b", "--weights", "best")
    assert "no best encoder" in said and "leave --weights out" in said


@pytest.mark.parametrize(
    ("label_free", "labelled", "expected"),
    [
        ("better", "no difference", "adapted"),
        ("worse", "no difference", "initial"),
        ("no difference", "no difference", "initial"),
        ("better", "better", "adapted"),
        ("worse", "better", "adapted"),
        ("no difference", "better", "adapted"),
        ("better", "worse", "initial"),
    ],
)
def test_labels_decide_where_they_show_a_difference(label_free: str, labelled: str, expected: str) -> None:
    assert decide(label_free, labelled) == expected


def test_only_runs_from_trained_weights_have_an_initial_encoder(
    run: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    sentence = refused("export", run, "--out", tmp_path / "b", "--weights", "initial")
    assert "did not start from trained weights" in sentence
