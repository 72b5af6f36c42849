"""The objective against the equations of the specification: the numbers are its invariants (section 7)."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from training.memory import RingMemory
from training.monitor import effective_rank, mean_cosine
from training.sop import (
    Prototypes,
    cross_entropy,
    draw_prototypes,
    image_loss,
    patch_loss,
    vote,
    vote_statistics,
)


def rows(count: int, dim: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, dim, generator=g, dtype=dtype), dim=1)


def prototypes(
    P: int = 12, k: int = 3, d: int = 16, smoothing: float = 0.1, dtype: torch.dtype = torch.float32
) -> Prototypes:
    bank = rows(200, d, 1, dtype)
    return draw_prototypes(bank, P, k, torch.Generator().manual_seed(2), smoothing)


def dense_vote(u: Tensor, D: Tensor, w: Tensor, temperature: float) -> Tensor:
    """P(u) = softmax(u Dᵀ / τ) · Y with Y written out row by row (1.4 and 1.5)."""
    P, voters, _ = D.shape
    Y = torch.empty(P * voters, P, dtype=u.dtype)
    for i in range(P):
        for v in range(voters):
            Y[i * voters + v] = (1 - w[i, v]) / (P - 1)
            Y[i * voters + v, i] = w[i, v]
    return (u @ D.flatten(0, 1).T / temperature).softmax(-1) @ Y


def test_votes_are_distributions() -> None:  # 1
    p = vote(rows(50, 16), prototypes(), 0.04)
    assert torch.allclose(p.sum(-1), torch.ones(50), atol=1e-6)
    assert (p >= 0).all()


@pytest.mark.parametrize("k", [0, 1, 4])
def test_closed_form_equals_the_dense_matrix(k: int) -> None:  # 2
    D, w = prototypes(k=k, dtype=torch.float64)
    u = rows(20, 16, 3, torch.float64)
    a, b = u.clone().requires_grad_(), u.clone().requires_grad_()
    closed, dense = vote(a, Prototypes(D, w), 0.07), dense_vote(b, D, w, 0.07)
    assert torch.allclose(closed, dense, atol=1e-12)
    (closed.log() * torch.arange(12)).sum().backward()
    (dense.log() * torch.arange(12)).sum().backward()
    assert torch.allclose(a.grad, b.grad, atol=1e-8)


def test_without_support_it_is_a_smoothed_softmax_and_without_smoothing_a_massl_block() -> None:  # 3
    u = rows(20, 16, 3, torch.float64)
    for smoothing in (0.1, 0.0):
        D, w = prototypes(k=0, smoothing=smoothing, dtype=torch.float64)
        q = (u @ D[:, 0].T / 0.1).softmax(-1)
        expected = (1 - smoothing) * q + smoothing * (1 - q) / 11
        assert torch.allclose(vote(u, Prototypes(D, w), 0.1), expected, atol=1e-12)


def test_total_collapse_is_stationary_at_ln_p() -> None:  # 4
    P, point = 64, rows(1, 16)
    same = Prototypes(point.expand(P, 5, 16).contiguous(), torch.full((P, 5), 0.9))
    z = point.repeat(24, 1).requires_grad_()
    p = vote(z, same, 0.1)
    assert torch.allclose(p, torch.full_like(p, 1 / P), atol=1e-6)
    loss = image_loss(z, point.repeat(8, 1), 6, same, 0.1, 0.04)
    assert loss.item() == pytest.approx(math.log(P), abs=1e-5)
    loss.backward()
    assert z.grad.abs().max() < 1e-5
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[:3, :2] = True  # three of four crops have a mask
    masked = patch_loss(point.repeat(6, 1), point.repeat(6, 1), mask, same, 0.1, 0.04)
    assert masked.item() == pytest.approx(0.75 * math.log(P), abs=1e-5)


@pytest.mark.parametrize(("P", "floor", "ceiling"), [(64, 0.739, 6.45), (512, 0.949, 8.54), (4096, 1.157, 10.62)])
def test_floor_and_ceiling_of_the_smoothed_cross_entropy(P: int, floor: float, ceiling: float) -> None:  # 5
    one_hot = torch.eye(P)[:2]
    smoothed = 0.9 * one_hot + 0.1 * (1 - one_hot) / (P - 1)
    assert cross_entropy(smoothed, smoothed)[0].item() == pytest.approx(floor, abs=2e-3)
    # The farthest a student can be: all its mass on another prototype.
    assert cross_entropy(smoothed[1], one_hot[0]).item() == pytest.approx(ceiling, abs=5e-3)


def test_the_losses_reach_floor_and_ceiling_and_the_patches_their_share_of_them() -> None:  # 5
    P = 64
    anchors = torch.eye(P)  # far apart: at this temperature each row votes for its own alone
    apart = Prototypes(anchors[:, None], torch.full((P, 1), 0.9))
    right, wrong = anchors[:8], anchors[8:16]
    floor = -0.9 * math.log(0.9) - 0.1 * math.log(0.1 / 63)
    # A student on another prototype: 0.9 of the vote at the smallest probability, 0.1/63 of it at the largest.
    small, large = math.log(0.1 / 63), math.log(0.9)
    away = -(0.9 * small + 0.1 / 63 * large + 62 * 0.1 / 63 * small)
    for student, expected in ((right, floor), (wrong, away)):
        found = image_loss(student.repeat(2, 1), right.repeat(2, 1), 2, apart, 0.005, 0.005)
        assert found.item() == pytest.approx(expected, abs=1e-4)
        assert found.item() <= math.log(63 / 0.1)
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[:2, :4] = True  # two of four crops have a mask
    for student, expected in ((right, floor), (wrong, away)):
        masked = patch_loss(student, right, mask, apart, 0.005, 0.005)
        assert masked.item() == pytest.approx(expected / 2, abs=1e-4)


def test_first_step_on_random_memory_is_just_below_ln_p() -> None:  # 6
    bank = rows(65536, 256)
    drawn = draw_prototypes(bank, 256, 8, torch.Generator().manual_seed(0))
    support = drawn.w[:, :-1]
    assert 0.23 < support.mean().item() < 0.25
    assert support.min().item() > 0.2 and support.max().item() < 0.36
    entropy = vote_statistics(rows(64, 256, 5), drawn, 0.04).entropy
    assert 0.96 * math.log(256) < entropy < math.log(256)


@pytest.mark.slow
def test_first_loss_at_published_size_is_just_below_ln_p() -> None:  # 6
    drawn = draw_prototypes(rows(65536, 256), 4096, 8, torch.Generator().manual_seed(0))
    for temperature, entropy in ((0.1, 8.31), (0.07, 8.30), (0.04, 8.26)):
        assert vote_statistics(rows(64, 256, 5), drawn, temperature).entropy == pytest.approx(entropy, abs=0.01)
    # Student and teacher begin alike: their embeddings of one picture's crops are close.
    crops = [F.normalize(rows(32, 256, 6) + 0.5 * rows(32, 256, seed), dim=1) for seed in range(7, 11)]
    loss = image_loss(torch.cat(crops), torch.cat(crops[:2]), 4, drawn, 0.1, 0.04).item()
    assert math.log(4096) - 0.05 < loss < math.log(4096)


def test_anchors_are_distinct_and_never_support() -> None:  # 7
    bank = rows(300, 16)
    drawn = draw_prototypes(bank, 40, 5, torch.Generator().manual_seed(3), 0.1)
    assert drawn.D.shape == (40, 6, 16) and drawn.w.shape == (40, 6)
    where = (drawn.D.flatten(0, 1) @ bank.T).argmax(1).view(40, 6)
    anchors, support = where[:, -1], where[:, :-1]
    assert len(anchors.unique()) == 40
    assert not torch.isin(support, anchors).any()
    assert (drawn.w[:, :-2] >= drawn.w[:, 1:-1]).all()
    assert torch.allclose(drawn.w[:, -1], torch.tensor(0.9))


@pytest.mark.parametrize("block", [16, 100, 1000])
def test_running_top_k_equals_brute_force(block: int) -> None:  # 7
    bank = rows(300, 16)
    drawn = draw_prototypes(bank, 40, 5, torch.Generator().manual_seed(3), 0.1, block=block)
    chosen = torch.randperm(300, generator=torch.Generator().manual_seed(3))[:40]
    similarity = bank[chosen] @ bank.T
    similarity[:, chosen] = -2
    score, index = similarity.topk(5, dim=1)
    assert torch.equal(drawn.D[:, :-1], bank[index])
    assert torch.allclose(drawn.w[:, :-1], score)


def test_gradients_reach_the_student_only() -> None:  # 8
    drawn = prototypes()
    zs, zt = rows(20, 16, 4).requires_grad_(), rows(8, 16, 5).requires_grad_()
    image_loss(zs, zt, 5, drawn, 0.1, 0.04).backward()
    assert zs.grad.abs().sum() > 0 and zt.grad is None and not drawn.D.requires_grad


def test_patch_loss_counts_masked_tokens_only() -> None:  # 8, 13
    drawn = prototypes()
    mask = torch.rand(6, 10, generator=torch.Generator().manual_seed(0)) < 0.4
    mask[2] = False
    tokens = F.normalize(torch.randn(6, 10, 16, generator=torch.Generator().manual_seed(1)), dim=-1)
    student = tokens.clone().requires_grad_()
    teacher = F.normalize(tokens + 0.3, dim=-1)
    loss = patch_loss(student[mask], teacher[mask], mask, drawn, 0.1, 0.04)
    ce = cross_entropy(vote(student, drawn, 0.1), vote(teacher, drawn, 0.04))
    dense = ((ce * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()
    assert loss.item() == pytest.approx(dense.item(), rel=1e-5)
    loss.backward()
    assert torch.equal(student.grad.abs().sum(-1) > 0, mask)
    none = torch.zeros(6, 10, dtype=torch.bool)
    assert patch_loss(student[none], teacher[none], none, drawn, 0.1, 0.04).item() == 0.0


def test_memory_is_a_ring() -> None:  # 9, 10
    memory = RingMemory(10, 4, seed=0)
    assert torch.allclose(memory.rows.norm(dim=1), torch.ones(10))
    for step in range(4):
        memory.push(torch.full((3, 4), float(step)))
    assert memory.rows[:, 0].tolist() == [3, 3, 0, 1, 1, 1, 2, 2, 2, 3]
    assert memory.head.item() == 2
    with pytest.raises(ValueError, match="11 rows do not fit a memory of 10"):
        memory.push(torch.zeros(11, 4))


def test_equal_generators_draw_equal_prototypes() -> None:  # 11
    bank = rows(300, 16)
    first = draw_prototypes(bank, 40, 5, torch.Generator().manual_seed(9))
    torch.manual_seed(123)  # another global seed, as on another rank
    second = draw_prototypes(bank, 40, 5, torch.Generator().manual_seed(9))
    assert torch.equal(first.D, second.D) and torch.equal(first.w, second.w)


@pytest.mark.parametrize("views", [2, 5])
def test_image_loss_averages_the_pairs_of_different_views(views: int) -> None:  # 12
    drawn, B = prototypes(), 4
    zs, zt = rows(views * B, 16, 4), rows(2 * B, 16, 5)
    ps, pt = vote(zs, drawn, 0.1).split(B), vote(zt, drawn, 0.04).split(B)
    total, pairs = 0.0, 0
    for j in range(2):
        for i in range(views):
            if i != j:
                total += float(-(pt[j] * ps[i].log()).sum(-1).mean())
                pairs += 1
    assert pairs == 2 * views - 2
    assert image_loss(zs, zt, views, drawn, 0.1, 0.04).item() == pytest.approx(total / pairs, rel=1e-5)


def test_order_of_the_anchors_does_not_matter() -> None:  # 13
    D, w = prototypes()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    shuffled = Prototypes(D[order], w[order])
    u, t = rows(20, 16, 4), rows(8, 16, 5)
    assert torch.allclose(vote(u, Prototypes(D, w), 0.1)[:, order], vote(u, shuffled, 0.1), atol=1e-6)
    a = image_loss(u, t, 5, Prototypes(D, w), 0.1, 0.04)
    assert a.item() == pytest.approx(image_loss(u, t, 5, shuffled, 0.1, 0.04).item(), rel=1e-5)


@pytest.mark.slow
def test_random_anchors_keep_a_toy_from_collapsing_and_fixed_ones_do_not() -> None:  # 16
    def run(fixed: bool, support: int = 4) -> tuple[float, float, float]:
        torch.manual_seed(0)
        centres = torch.randn(20, 64)
        net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 32))
        memory = RingMemory(2048, 32, 0)
        frozen = draw_prototypes(memory.rows.clone(), 64, 0, torch.Generator().manual_seed(0))
        teacher = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 32))
        teacher.load_state_dict(net.state_dict())
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        generator = torch.Generator().manual_seed(1)
        for _ in range(600):
            x = centres[torch.randint(20, (128,), generator=generator)]
            a, b = (x + 0.3 * torch.randn(128, 64, generator=generator) for _ in range(2))
            zs = F.normalize(net(torch.cat([a, b])), dim=1)
            with torch.no_grad():
                zt = F.normalize(teacher(torch.cat([a, b])), dim=1)
            drawn = frozen if fixed else draw_prototypes(memory.rows, 64, support, generator)
            loss = image_loss(zs, zt, 2, drawn, 0.1, 0.04)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(list(teacher.parameters()), list(net.parameters()), 0.01)
            memory.push(zt[128:])
        return mean_cosine(zt), effective_rank(zt), vote_statistics(zt, drawn, 0.04).entropy_of_mean

    fixed_cosine, fixed_rank, fixed_entropy = run(fixed=True)
    for support in (0, 4, 8):
        cosine, rank, entropy = run(fixed=False, support=support)
        assert abs(cosine) < 0.05 and rank > 15 and entropy > 3.7  # of ln 64 = 4.16
        assert fixed_cosine > cosine + 0.05 and fixed_rank < rank and fixed_entropy < entropy - 0.5


def dense_prototypes(bank: Tensor, P: int, k: int, seed: int, smoothing: float) -> tuple[Tensor, Tensor]:
    """1.4 row by row: anchors from a permutation, the k most similar of all other rows, voters' weights."""
    order = torch.randperm(len(bank), generator=torch.Generator().manual_seed(seed)).tolist()
    anchors, rest = order[:P], order[P:]
    D, w = [], []
    for anchor in anchors:
        ranked = sorted(rest, key=lambda r: -float(bank[anchor] @ bank[r]))[:k]
        D.append(torch.stack([bank[r] for r in [*ranked, anchor]]))
        w.append([float(bank[anchor] @ bank[r]) for r in ranked] + [1 - smoothing])
    return torch.stack(D), torch.tensor(w, dtype=bank.dtype).clamp(0, 1)


@pytest.mark.parametrize("views", [2, 3, 6])
@pytest.mark.parametrize("k", [0, 3])
def test_image_loss_from_the_equations(views: int, k: int) -> None:  # golden: 1.4 to 1.6, float64, dense Y
    bank = rows(60, 16, 1, torch.float64)
    D, w = dense_prototypes(bank, 12, k, 2, 0.1)
    drawn = draw_prototypes(bank, 12, k, torch.Generator().manual_seed(2), 0.1)
    torch.testing.assert_close(drawn.D, D)
    torch.testing.assert_close(drawn.w, w)
    B = 5
    a, zt = rows(views * B, 16, 4, torch.float64).requires_grad_(), rows(2 * B, 16, 5, torch.float64)
    b = a.detach().clone().requires_grad_()
    ps, pt = dense_vote(a, D, w, 0.1), dense_vote(zt, D, w, 0.04)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(views):
        for j in range(2):
            if j != i:
                for picture in range(B):
                    for c in range(12):
                        total = total - pt[j * B + picture, c] * ps[i * B + picture, c].log() / B
    expected = total / (2 * views - 2)
    loss = image_loss(b, zt, views, drawn, 0.1, 0.04)
    expected.backward()
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(b.grad, a.grad, rtol=1e-7, atol=1e-12)


def test_patch_loss_from_the_equations() -> None:  # golden: 1.7, float64, dense Y, a crop without mask
    bank = rows(60, 16, 1, torch.float64)
    D, w = dense_prototypes(bank, 12, 2, 2, 0.1)
    drawn = draw_prototypes(bank, 12, 2, torch.Generator().manual_seed(2), 0.1)
    B, L = 3, 7
    mask = torch.rand(2 * B, L, generator=torch.Generator().manual_seed(0)) < 0.4
    mask[1], mask[4], mask[5] = False, True, False
    a = F.normalize(torch.randn(2 * B, L, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64), dim=-1)
    zt = F.normalize(a + 0.4 * a.roll(1, 0), dim=-1)
    b = a.clone().requires_grad_()
    a.requires_grad_()
    ps, pt = (dense_vote(z.flatten(0, 1), D, w, t).view(2 * B, L, 12) for z, t in ((a, 0.1), (zt, 0.04)))
    sides = []
    for v in range(2):
        total = torch.zeros((), dtype=torch.float64)
        for crop in range(v * B, (v + 1) * B):
            inner = torch.zeros((), dtype=torch.float64)
            for token in range(L):
                inner = inner + float(mask[crop, token]) * -(pt[crop, token] * ps[crop, token].log()).sum()
            total = total + inner / max(1, int(mask[crop].sum()))
        sides.append(total / B)
    expected = (sides[0] + sides[1]) / 2
    loss = patch_loss(b[mask], zt[mask], mask, drawn, 0.1, 0.04)
    expected.backward()
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(b.grad, a.grad, rtol=1e-7, atol=1e-12)


def test_two_halves_of_a_batch_average_to_the_whole() -> None:  # 11: W ranks × B equal one rank × W·B
    drawn = prototypes(dtype=torch.float64)
    zs, zt = rows(4 * 6, 16, 4, torch.float64).view(4, 6, 16), rows(2 * 6, 16, 5, torch.float64).view(2, 6, 16)
    whole = image_loss(zs.flatten(0, 1), zt.flatten(0, 1), 4, drawn, 0.1, 0.04)
    halves = [
        image_loss(zs[:, part].flatten(0, 1), zt[:, part].flatten(0, 1), 4, drawn, 0.1, 0.04)
        for part in (slice(3), slice(3, 6))
    ]
    torch.testing.assert_close(sum(halves) / 2, whole)


def test_a_batch_is_not_among_its_own_voters_and_rows_stay_unit() -> None:  # 9, 10
    memory = RingMemory(64, 16, seed=0)
    for step in range(30):
        drawn = draw_prototypes(memory.rows, 16, 3, torch.Generator().manual_seed(step))
        batch = rows(7, 16, 100 + step)  # the second view's teacher rows
        assert (drawn.D.flatten(0, 1) @ batch.T).max() < 0.999
        memory.push(batch)
        assert (memory.rows @ batch.T).max(0).values.min() > 0.999
        assert torch.allclose(memory.rows.norm(dim=1), torch.ones(64), atol=1e-5)
    # Rank order: what two ranks push one after the other is what they push together.
    apart, together = RingMemory(10, 4, 0), RingMemory(10, 4, 0)
    first, second = rows(3, 4, 1), rows(3, 4, 2)
    apart.push(first)
    apart.push(second)
    together.push(torch.cat([first, second]))
    assert torch.equal(apart.rows, together.rows) and torch.equal(apart.head, together.head)


def test_statistics_count_leaks_voters_and_cosines() -> None:
    bank = rows(200, 16, 1)
    u = rows(30, 16, 3)
    found = {
        kind: vote_statistics(
            u, draw_prototypes(bank, 12, 3, torch.Generator().manual_seed(2), support_weight=kind), 0.1
        )
        for kind in ("cosine", "constant")
    }
    D, w = prototypes()
    q = (u @ D.flatten(0, 1).T / 0.1).softmax(-1)
    assert found["cosine"].leak == pytest.approx(float((q @ (1 - w.flatten())).mean()), rel=1e-4)
    assert found["cosine"].support_cosine == pytest.approx(float(w[:, :-1].mean()), rel=1e-4)
    assert found["constant"].support_cosine == found["cosine"].support_cosine  # a cosine, whatever it weighs
    assert found["constant"].leak < found["cosine"].leak
    assert found["cosine"].voter_entropy == pytest.approx(float(-(q * q.log()).sum(-1).mean()), rel=1e-4)
    point = Prototypes(u[:1].expand(8, 4, 16), torch.full((8, 4), 0.9))
    assert vote_statistics(u[:1], point, 0.1).voter_entropy == pytest.approx(math.log(32), rel=1e-5)
