"""Two processes are one process with twice the batch; a batch in parts is a whole batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor

from likewise import main
from tests.conftest import TINY
from training.checkpoint import NAME as CHECKPOINT
from training.config import Hardware, Train
from training.distributed import gather_rows
from training.learner import Learner, Speed
from training.loader import Batch
from training.resolve import resolve
from training.sharding import local
from training.stabilisers import koleo, mean_entropy_gap, sigreg, sinkhorn, variance_hinge
from training.views import Views

# KoLeo couples the rows of all ranks, SOP-MIM adds the patch memory.
FLAGS = ["--steps", "20", "--batch-size", "16", "--precision", "float64", "--mim-weight", "1", *TINY]


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def torchrun(*arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "likewise"]
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, check=False, timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def alone(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    assert main(["train", str(pictures), "--out", str(out), *FLAGS]) == 0
    return out


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(alone: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "two"
    torchrun("train", str(pictures), "--out", str(out), *FLAGS)
    assert len(losses(out)) == 20
    assert losses(out) == pytest.approx(losses(alone), rel=1e-5)
    one, two = (torch.load(run / CHECKPOINT, weights_only=True)["state"] for run in (alone, out))
    for name, value in one["method"].items():
        assert torch.allclose(two["method"][name].double(), value.double(), atol=1e-6), name
    for name, value in one["student"].items():
        assert torch.allclose(two["student"][name], value, atol=1e-6), name


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(alone: Path, pictures: Path, tmp_path: Path) -> None:
    """Elastic restart: batch, data order and schedules belong to the run, not to its processes."""
    out = tmp_path / "elastic"
    flags = [str(pictures), "--out", str(out), "--resume", "--checkpoint-minutes", "1e-7", *FLAGS]
    command = [sys.executable, "-m", "likewise", "train", *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step      6"):
                process.terminate()
    assert process.returncode in (130, 0)
    torchrun("train", *flags)
    assert losses(out) == pytest.approx(losses(alone), rel=1e-5)


@pytest.mark.slow
def test_shards_are_the_whole_and_go_on_without(alone: Path, pictures: Path, tmp_path: Path) -> None:
    """FSDP2 with a frozen backbone at first, and gradients summed over two parts; its checkpoint is an ordinary one."""
    flags = [str(pictures), *FLAGS, "--init", str(alone), "--head-steps", "3", "--steps", "9"]
    plain, sharded = tmp_path / "plain", tmp_path / "sharded"
    assert main(["train", "--out", str(plain), *flags]) == 0
    torchrun("train", "--out", str(sharded), "--shard", "--accumulate", "2", *flags)
    assert losses(sharded) == pytest.approx(losses(plain), rel=1e-5)
    one, two = (torch.load(run / CHECKPOINT, weights_only=True)["state"] for run in (plain, sharded))
    assert one["optimizer"]["state"].keys() == two["optimizer"]["state"].keys()
    for i, moments in one["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.allclose(two["optimizer"]["state"][i][name], value, rtol=1e-4, atol=1e-9), (i, name)
    for part in ("student", "teacher"):
        for name, value in one[part].items():
            assert torch.allclose(two[part][name], value, atol=1e-6), (part, name)


def test_a_batch_in_parts_is_a_whole_batch(alone: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "parts"
    assert main(["train", str(pictures), "--out", str(out), "--accumulate", "3", *FLAGS]) == 0
    assert losses(out) == pytest.approx(losses(alone), rel=1e-9)


def test_recomputed_activations_change_nothing(alone: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    assert main(["train", str(pictures), "--out", str(out), "--checkpoint-activations", *FLAGS]) == 0
    assert losses(out) == pytest.approx(losses(alone), rel=1e-12)


# --- terms that couple the pictures of a batch ------------------------------------------------------------------


def coupled(z: torch.Tensor, groups: torch.Tensor) -> dict[str, torch.Tensor]:
    votes = (8 * z).softmax(1)
    return {
        "koleo": koleo(z),
        "koleo without near-duplicates": koleo(z, groups),
        "variance": variance_hinge(z),
        "sigreg": sigreg(z, torch.Generator().manual_seed(0), slices=16),
        "mean entropy": mean_entropy_gap(votes),
        "sinkhorn": (gather_rows(sinkhorn(votes.detach())) * gather_rows(votes)).sum(),
    }


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    z = torch.nn.functional.normalize(torch.randn(12, 6, dtype=torch.float64, generator=torch.manual_seed(1)), dim=1)
    return z, torch.tensor([0, 1, 2, 3, 4, 5, 0, 7, 7, 9, 10, 11])


def work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    z, groups = rows()
    mine = z[6 * rank : 6 * rank + 6].requires_grad_()
    found: dict[str, Any] = {}
    for name, value in coupled(mine, groups[6 * rank : 6 * rank + 6]).items():
        (gradient,) = torch.autograd.grad(value, mine, retain_graph=True)
        found[name] = (value.detach(), gradient)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_coupled_terms_and_their_gradients_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    z, groups = rows()
    z.requires_grad_()
    for name, value in coupled(z, groups).items():
        (gradient,) = torch.autograd.grad(value, z, retain_graph=True)
        assert torch.allclose(first[name][0], value) and torch.allclose(second[name][0], value), name
        # Gradients of ranks are averaged afterwards, so that each holds twice its rows' share.
        assert torch.allclose(torch.cat([first[name][1], second[name][1]]) / 2, gradient, atol=1e-12), name


# --- what ranks hold --------------------------------------------------------------------------------------------


def train_on_rank(rank: int, folder: str, name: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{name}", rank=rank, world_size=2)
    method, _, sharded = name.partition(" ")
    asked = {"encoder": "vit_nano", "image_size": 32, "patch_size": 8, "steps": 40, "batch_size": 8, "method": method}
    if method == "sop":
        asked["mim_weight"] = 1.0
    hardware = Hardware("cpu", "CPU", 1, False, 2)
    recipe, _ = resolve(Train(pictures="p", out=Path("o"), **asked), 200, hardware)
    views = Views("photographs", recipe.mean, recipe.std)
    learner = Learner(recipe, torch.device("cpu"), Speed(shard=bool(sharded)), views)
    pixels = torch.randint(0, 256, (8, 48, 48, 3), dtype=torch.uint8, generator=torch.manual_seed(3))
    mine = slice(4 * rank, 4 * rank + 4)
    batch = Batch(pixels[mine], torch.ones(4), torch.arange(8)[mine], torch.arange(8)[mine])
    for step in range(4):
        learner.step(batch, step)
        if step == 1:
            learner.load(learner.state())
    if sharded:
        weights = [x for x in learner.student.parameters() if isinstance(x, DTensor)]
        moments = [x.numel() for x in local([v["exp_avg"] for v in learner.optimizer.state.values()])]
        own = sum(p.numel() for p in learner.method.parameters())  # DINO's prototypes are whole on every rank
        assert len(weights) == len(list(learner.student.parameters()))
        assert sum(moments) - own < 0.6 * sum(x.numel() for x in weights)
    torch.save(learner.state(), Path(folder) / f"{name}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "name", ["sop sharded", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sop", "dino", "dino sharded"))]
)
def test_memories_and_weights_are_bit_equal_on_all_ranks(tmp_path: Path, name: str) -> None:  # 11
    mp.spawn(train_on_rank, (str(tmp_path), name), nprocs=2)
    first, second = (torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1))
    for part in ("method", "student", "teacher"):
        assert first[part].keys() == second[part].keys() and first[part]
        for name, value in first[part].items():
            assert torch.equal(value, second[part][name]), (part, name)
    if name.startswith("sop"):
        assert int(first["method"]["memory.head"]) == 32 % len(first["method"]["memory.rows"])
