"""Batches: which pictures each step and each rank gets, and what is counted as waiting."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from export.bundle import RefusalError
from export.preprocess import find_pictures
from tests.shapes import write_shapes
from training.cache import PictureCache, build_cache
from training.loader import Batches
from training.seeds import derive

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("loader") / "p", 50, size=16)


@pytest.fixture
def cache(folder: Path) -> PictureCache:
    return build_cache(folder.parent / "cache", find_pictures(folder), "test", 16, 1, lambda _: None)


@pytest.fixture(params=[0, 2])
def batches(cache: PictureCache, request: pytest.FixtureRequest) -> Iterator[Batches]:
    """With and without a thread."""
    made = Batches(cache, 12, 3, CPU, prefetch=request.param)
    yield made
    made.close()


def test_an_epoch_sees_every_picture_at_most_once_in_the_seeds_order(cache: PictureCache, batches: Batches) -> None:
    per_epoch = 50 // 12
    for epoch in (0, 1, 5):
        expected = torch.randperm(50, generator=torch.Generator().manual_seed(derive(3, "epoch", epoch)))
        seen = torch.cat([batches.indices(epoch * per_epoch + i) for i in range(per_epoch)])
        assert torch.equal(seen, expected[:48])


def test_a_batch_holds_what_its_indices_name(cache: PictureCache, batches: Batches) -> None:
    for step in [*range(10), 3, 700, 701, 4]:  # in order, over the border of an epoch, and anywhere
        batch = batches.local(step)
        assert torch.equal(batch.indices, batches.indices(step))
        assert torch.equal(batch.pixels, cache.gather(batch.indices, CPU))
        assert torch.equal(batch.aspects, cache.aspects[batch.indices])
        assert torch.equal(batch.groups, cache.groups[batch.indices])


@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_ranks_together_have_the_global_batch(cache: PictureCache, world: int) -> None:
    one = Batches(cache, 12, 0, CPU)
    ranks = [Batches(cache, 12, 0, CPU, rank, world) for rank in range(world)]
    for step in (0, 1, 4, 9):
        whole, parts = one.local(step), [rank.local(step) for rank in ranks]
        for name in whole._fields:
            assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))
    for batches in (one, *ranks):
        batches.close()


def test_a_loaded_cache_gives_the_same_without_a_thread(cache: PictureCache) -> None:
    streamed = Batches(cache, 8, 0, CPU)
    expected = [streamed.local(step).pixels for step in range(4)]
    streamed.close()
    cache.load(CPU)
    before = threading.active_count()
    resident = Batches(cache, 8, 0, CPU)
    assert all(torch.equal(resident.local(step).pixels, expected[step]) for step in range(4))
    assert threading.active_count() == before
    resident.close()


def test_the_next_steps_are_gathered_while_this_one_is_used(
    cache: PictureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, ...]] = []
    gather = cache.gather
    monkeypatch.setattr(
        cache, "gather", lambda rows, device: (asked.append(tuple(rows.tolist())), gather(rows, device))[1]
    )
    batches = Batches(cache, 10, 0, CPU, prefetch=2)
    batches.local(0)
    batches.close()  # what was begun is finished or cancelled
    assert asked[0] == tuple(batches.indices(0).tolist()) and len(asked) <= 3
    asked.clear()
    batches = Batches(cache, 10, 0, CPU, prefetch=2)
    for step in range(8):
        batches.local(step)
    batches.close()
    wanted = [tuple(batches.indices(step).tolist()) for step in range(8)]
    assert asked[:8] == wanted  # each once, in order


def test_waiting_is_counted_until_it_is_read(cache: PictureCache, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    gather = cache.gather

    def slow(rows: torch.Tensor, device: torch.device) -> torch.Tensor:
        now[0] += 1.5
        return gather(rows, device)

    monkeypatch.setattr("training.loader.time.monotonic", lambda: now[0])
    monkeypatch.setattr(cache, "gather", slow)
    batches = Batches(cache, 10, 0, CPU, prefetch=0)
    batches.local(0)
    batches.local(1)
    assert batches.waited == 3.0 and batches.waited == 0.0
    batches.close()


def test_an_error_while_gathering_reaches_the_step(cache: PictureCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(rows: torch.Tensor, device: torch.device) -> torch.Tensor:
        raise OSError(5, "Input/output error", "pixels-00000.npy")

    monkeypatch.setattr(cache, "gather", broken)
    batches = Batches(cache, 10, 0, CPU)
    with pytest.raises(OSError, match="Input/output error"):
        batches.local(0)
    batches.close()


def test_batches_that_cannot_be_are_refused(cache: PictureCache) -> None:
    with pytest.raises(RefusalError, match="a batch of 51 exceeds the 50 readable pictures"):
        Batches(cache, 51, 0, CPU)
    with pytest.raises(RefusalError, match="a batch of 10 does not divide over 4 processes"):
        Batches(cache, 10, 0, CPU, 0, 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("resident", [False, True])
def test_batches_arrive_on_the_gpu(cache: PictureCache, resident: bool) -> None:
    cuda = torch.device("cuda")
    expected = cache.gather(torch.arange(50), CPU)
    if resident:
        cache.load(cuda)
    batches = Batches(cache, 10, 0, cuda)
    for step in range(6):
        batch = batches.local(step)
        assert batch.pixels.is_cuda and batch.groups.is_cuda and not batch.aspects.is_cuda
        assert torch.equal(batch.pixels.cpu(), expected[batch.indices])
    batches.close()
