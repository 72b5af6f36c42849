"""SOP, MaSSL and DINO as the loop sees them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from training.config import Hardware, Recipe, Train
from training.dino import DINO
from training.learner import Crops, Learner, Speed, join, parameter_groups, split
from training.loader import Batch
from training.method import Method, Moment, Outputs
from training.resolve import resolve
from training.sop import draw_prototypes, image_loss, patch_loss
from training.sop_method import SOP, MaSSL
from training.views import Views

B, V, D = 6, 4, 16
NOW = Moment(step=50, steps=100, lr=1e-3, weight_decay=0.04, momentum=0.99, teacher_temperature=0.04, koleo_weight=0.0)


def recipe(**asked: object) -> Recipe:
    base = {"encoder": "vit_nano", "image_size": 32, "patch_size": 8, "steps": 100, "head_dim": D, "batch_size": B}
    train = Train(pictures="p", out=Path("o"), **{**base, **asked})
    return resolve(train, 2000, Hardware("cpu", "CPU", 1, False))[0]


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64, generator=torch.manual_seed(seed)), dim=-1)


def outputs(mask: Tensor | None = None, grad: bool = False) -> Outputs:
    masked = 0 if mask is None else int(mask.sum())
    return Outputs(
        unit(V * B, D, seed=1).requires_grad_(grad), unit(2 * B, D, seed=2), unit(masked, D, seed=3),
        unit(masked, D, seed=4), unit(B, D, seed=5), mask, None,
    )  # fmt: skip


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def test_sop_is_its_equations_on_its_memories() -> None:
    mask = torch.zeros(2 * B, 16, dtype=torch.bool)
    mask[0, :4] = mask[5, 7] = mask[9, 3:9] = True
    r = recipe(mim_weight=1.0, koleo_weight=0.0)
    method, out = SOP(r).double(), outputs(mask)
    terms = method.terms(out, NOW, generator())
    same = generator()
    image = image_loss(
        out.student,
        out.teacher,
        V,
        draw_prototypes(method.memory.rows, r.anchors, r.support, same, r.smoothing),
        0.1,
        0.04,
    )
    patches = draw_prototypes(method.patch_memory.rows, r.patch_anchors, r.patch_support, same, r.smoothing)
    patch = patch_loss(out.student_masked, out.teacher_masked, mask, patches, 0.1, 0.04)
    assert torch.allclose(terms["loss_image"], image) and torch.allclose(terms["loss_patch"], patch)
    assert torch.allclose(terms["loss"], image + patch)


def test_several_draws_are_averaged() -> None:
    method = SOP(recipe(tasks=3, koleo_weight=0.0)).double()
    out, seeds = outputs(), generator()
    parts = [image_loss(out.student, out.teacher, V, p, 0.1, 0.04) for p in method.draw(seeds, NOW)]
    assert len(parts) == 3 and len({float(p) for p in parts}) == 3
    assert torch.allclose(method.terms(out, NOW, generator())["loss"], torch.stack(parts).mean())


@pytest.mark.parametrize("kind", [SOP, MaSSL])
def test_prototypes_come_from_written_rows_where_asked(kind: type[SOP]) -> None:
    r = recipe(anchors_from="written", memory=256, anchors=16, method="sop" if kind is SOP else "massl")
    method = kind(r)

    def found(step: int) -> set[int]:
        """Indices of the rows that were drawn."""
        rows = torch.cat([p.D.flatten(0, 1) for p in method.draw(generator(), NOW._replace(step=step))])
        return set((rows @ method.memory.rows.T).argmax(1).tolist())

    assert max(found(8)) < 8 * B < r.memory  # 48 rows are enough for 16 anchors and their support
    assert max(found(2)) >= 2 * B  # 12 are not: drawn from all
    assert max(found(60)) > r.memory // 2  # the memory has turned over


def test_local_support_embeddings_are_drawn_where_asked() -> None:  # spec 2.2 #3
    mask = torch.zeros(2 * B, 16, dtype=torch.bool)
    mask[0, :4] = mask[5, 7] = True
    r = recipe(mim_weight=1.0, koleo_weight=0.0, patch_support=1, patch_anchors=32)
    method, out, same = SOP(r).double(), outputs(mask), generator()
    draw_prototypes(method.memory.rows, r.anchors, r.support, same, r.smoothing)
    drawn = draw_prototypes(method.patch_memory.rows, 32, 1, same, r.smoothing)
    assert drawn.D.shape == (32, 2, D)
    expected = patch_loss(out.student_masked, out.teacher_masked, mask, drawn, 0.1, 0.04)
    assert torch.allclose(method.terms(out, NOW, generator())["loss_patch"], expected)


def test_a_batch_never_votes_on_itself(monkeypatch: pytest.MonkeyPatch) -> None:  # 9
    r = recipe(batch_size=8)
    learner = Learner(r, torch.device("cpu"), Speed(), Views("photographs", r.mean, r.std))
    before = learner.method.memory.rows.clone()
    seen: list[Tensor] = []
    terms = learner.method.terms

    def watched(*given: object) -> dict[str, Tensor]:
        seen.append(learner.method.memory.rows.clone())
        return terms(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(learner.method, "terms", watched)
    pixels = torch.randint(0, 256, (8, 48, 48, 3), dtype=torch.uint8, generator=generator())
    learner.step(Batch(pixels, torch.ones(8), torch.arange(8), torch.arange(8)), 0)
    assert torch.equal(seen[0], before)
    assert not torch.equal(learner.method.memory.rows[:8], before[:8])
    assert torch.equal(learner.method.memory.rows[8:], before[8:])


def test_massl_is_cross_entropy_over_the_rows_of_every_block() -> None:
    r = recipe(method="massl")
    method, out = MaSSL(r).double(), outputs()
    order = torch.randperm(r.memory, generator=generator())
    blocks = order.view(-1, r.anchors)
    assert len(blocks) == r.memory // r.anchors > 1
    losses = []
    for block in blocks:
        logits = out.student @ method.memory.rows[block].T / 0.1
        p = (out.teacher @ method.memory.rows[block].T / 0.04).softmax(1).chunk(2)
        q = logits.log_softmax(1).chunk(V)
        pairs = [-(p[j] * q[i]).sum(1).mean() for i in range(V) for j in range(2) if i != j]
        losses.append(torch.stack(pairs).mean())
    assert torch.allclose(method.terms(out, NOW, generator())["loss"], torch.stack(losses).mean())


def test_dino_is_its_equations() -> None:
    method, out = DINO(recipe(method="dino", prototypes=32)).double(), outputs(grad=True)
    method.centre.copy_(torch.randn(32, generator=generator()))
    teacher, student = F.normalize(method.teacher_prototypes), F.normalize(method.prototypes)
    p = ((out.teacher @ teacher.T - method.centre) / 0.04).softmax(1).chunk(2)
    q = (out.student @ student.T / 0.1).log_softmax(1).chunk(V)
    pairs = [-(p[j] * q[i]).sum(1).mean() for i in range(V) for j in range(2) if i != j]
    terms = method.terms(out, NOW, generator())
    assert torch.allclose(terms["loss"], torch.stack(pairs).mean())
    terms["loss"].backward()  # type: ignore[no-untyped-call]
    assert method.prototypes.grad is not None and method.prototypes.grad.norm() > 0
    before = method.teacher_prototypes.clone()
    centre = 0.9 * method.centre + 0.1 * (out.teacher @ teacher.T).mean(0)
    method.update(out, NOW)
    assert torch.allclose(method.centre, centre)
    assert torch.allclose(method.teacher_prototypes, 0.99 * before + 0.01 * method.prototypes)


def test_dinos_prototypes_rest_in_the_beginning() -> None:
    method, out = DINO(recipe(method="dino", prototypes=32)).double(), outputs(grad=True)
    method.terms(out, NOW._replace(step=0), generator())["loss"].backward()  # type: ignore[no-untyped-call]
    assert method.prototypes.grad is None and out.student.grad is not None


@pytest.mark.parametrize("method", [SOP, MaSSL])
def test_memories_take_the_second_global_view_and_one_patch_per_picture(method: type[SOP]) -> None:
    """A batch without any mask still pushes one row per picture into the patch memory."""
    unmasked = outputs(torch.zeros(2 * B, 16, dtype=torch.bool))
    kept = method(recipe(method="sop" if method is SOP else "massl", **({"mim_weight": 1.0} if method is SOP else {})))
    loss = kept.double().terms(unmasked, NOW, generator())["loss"]
    assert math.isfinite(float(loss))
    kept.update(unmasked, NOW)
    assert torch.allclose(kept.memory.rows[:B], unmasked.teacher[B:])
    assert int(kept.memory.head) == B
    if method is SOP:
        assert torch.allclose(kept.patch_memory.rows[:B], unmasked.teacher_drawn)
        assert int(kept.patch_memory.head) == B


@pytest.mark.parametrize("asked", [{}, {"method": "massl"}, {"method": "dino"}, {"support": 0}])
def test_diagnostics_are_entropies_within_their_limits(asked: dict[str, object]) -> None:
    r = recipe(**asked)
    method: Method = {"sop": SOP, "massl": MaSSL, "dino": DINO}[r.method](r)
    found = method.diagnostics(unit(50, D).float(), NOW)
    assert 0 <= found["vote_entropy"] <= found["mean_vote_entropy"] + 1e-6 <= found["max_entropy"] + 2e-6
    assert all(math.isfinite(value) for value in found.values())


# --- the learner ------------------------------------------------------------------------------------------------


def learner(asked: dict[str, object], speed: Speed | None = None) -> tuple[Learner, Batch]:
    r = recipe(**asked)
    views = Views(r.views, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    pixels = torch.randint(0, 256, (B, r.cache_size, r.cache_size, 3), dtype=torch.uint8, generator=generator())
    batch = Batch(pixels, torch.ones(B), torch.arange(B), torch.arange(B))
    return Learner(r, torch.device("cpu"), speed or Speed(), views), batch


def test_join_and_split_are_inverse() -> None:
    mask = torch.rand(2 * B, 16, generator=generator()) < 0.3
    whole = outputs(mask)
    parts, row = [], torch.arange(int(mask.sum()))
    number = torch.full(mask.shape, -1)
    number[mask] = row
    for low, high in ((0, 2), (2, 5), (5, B)):
        by_view = mask.view(2, B, -1)[:, low:high].flatten(0, 1)
        rows = number.view(2, B, -1)[:, low:high].flatten(0, 1)[by_view]
        parts.append(
            Outputs(
                whole.student.view(V, B, D)[:, low:high].flatten(0, 1),
                whole.teacher.view(2, B, D)[:, low:high].flatten(0, 1),
                whole.student_masked[rows], whole.teacher_masked[rows], whole.teacher_drawn[low:high], by_view, None,
                by_view.flatten().nonzero()[:, 0],
            )
        )  # fmt: skip
    joined = join(parts)
    for name in ("student", "teacher", "student_masked", "teacher_masked", "teacher_drawn", "mask"):
        assert torch.equal(getattr(joined, name), getattr(whole, name)), name
    assert joined.masked_at is not None and torch.equal(joined.masked_at, mask.flatten().nonzero()[:, 0])
    crops = [Crops(torch.zeros(len(p.teacher), 1), None, p.mask, None, p.masked_at) for p in parts]
    for part, (student, masked) in zip(parts, split(whole.student, whole.student_masked, crops), strict=True):
        assert student is not None and torch.equal(student, part.student)
        assert masked is not None and torch.equal(masked, part.student_masked)


SIZES = {"vit_small_patch14_reg4_dinov2": 56, "vit_small_patch16_224": 32, "vit_small_patch14_dinov2": 518}


@pytest.mark.parametrize("model", SIZES)
def test_timms_vits_train_at_any_size_registers_included(model: str) -> None:
    size = SIZES[model]
    thin = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    asked = {"encoder": model, "image_size": size, "patch_size": None, "mim_weight": 1.0, "local_crops": 1}
    r = recipe(**asked)
    r = r.model_copy(update={"model_kwargs": {**r.model_kwargs, **thin}, "batch_size": 2, "head_hidden": 16})
    views = Views(r.views, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    small = Learner(r, torch.device("cpu"), Speed(), views)
    pixels = torch.randint(0, 256, (2, r.cache_size, r.cache_size, 3), dtype=torch.uint8, generator=generator())
    terms = small.step(Batch(pixels, torch.ones(2), torch.arange(2), torch.arange(2)), 0)
    assert all(bool(value.isfinite()) for value in terms.values()) and "loss_patch" in terms


def test_teacher_and_memories_get_no_gradient_and_the_student_moves() -> None:
    it, batch = learner({"mim_weight": 1.0})
    before = {name: value.clone() for name, value in it.student.state_dict().items()}
    it.step(batch, 0)
    assert not any(p.requires_grad for p in it.teacher.parameters()) and not list(it.method.parameters())
    moved = [name for name, value in it.student.state_dict().items() if not torch.equal(value, before[name])]
    assert "mask_token" in moved and "backbone.pos_embed" in moved and "head.mlp.0.weight" in moved


def test_a_step_is_a_function_of_state_and_step() -> None:  # 15
    first, batch = learner({})
    second, _ = learner({})
    for step in range(3):
        a, b = first.step(batch, step), second.step(batch, step)
        assert torch.equal(a["loss"], b["loss"])


def test_initial_weights_start_with_the_head_alone(tmp_path: Path) -> None:
    source, batch = learner({})
    torch.save(source.student.backbone.state_dict(), tmp_path / "w.pth")
    it, _ = learner({"init": tmp_path / "w.pth", "head_steps": 2, "steps": 30})
    start = {name: value.clone() for name, value in it.student.state_dict().items()}
    for step in range(2):
        it.step(batch, step)
    vit = {k: v for k, v in it.student.state_dict().items() if k.startswith("backbone.")}
    assert all(torch.equal(value, start[name]) for name, value in vit.items())
    assert not torch.equal(it.student.head.mlp[0].weight, start["head.mlp.0.weight"])
    it.step(batch, 2)
    assert not torch.equal(it.student.backbone.blocks[0].attn.qkv.weight, start["backbone.blocks.0.attn.qkv.weight"])


def test_layer_decay_slows_early_blocks() -> None:
    it, _ = learner({})
    r = it.recipe.model_copy(update={"backbone_lr": 0.1, "layer_decay": 0.5})
    groups = parameter_groups(it.student, it.method, r)
    scale = {id(p): g["scale"] for g in groups for p in g["params"]}
    vit, depth = it.student.backbone, len(it.student.backbone.blocks)
    assert scale[id(it.student.head.mlp[0].weight)] == 1.0
    assert scale[id(vit.norm.weight)] == 0.1
    assert scale[id(vit.blocks[depth - 1].mlp.fc1.weight)] == 0.05
    assert scale[id(vit.patch_embed.proj.weight)] == pytest.approx(0.1 * 0.5 ** (depth + 1))
    decays = {id(p): g["decays"] for g in groups for p in g["params"]}
    assert decays[id(vit.pos_embed)] and not decays[id(vit.norm.weight)]
    assert sum(len(g["params"]) for g in groups) == len(list(it.student.parameters()))


def test_baselines_refuse_what_is_not_theirs() -> None:
    from export.bundle import RefusalError

    for asked in ({"method": "dino", "support": 4}, {"method": "massl", "mim_weight": 1.0}, {"head_steps": 5},
                  {"mask_ratio": (0.5, 0.1)}, {"patch_memory": 8, "batch_size": 16}):  # fmt: skip
        with pytest.raises(RefusalError, match=r"--[a-z-]+"):
            recipe(**asked)


def test_presets_by_encoder() -> None:
    cases = [
        ("vit_tiny_patch16_224", 5e-4, 0.25, 800), ("vit_small_patch16_224", 5e-4, 0.25, 800),
        ("vit_base_patch16_224", 7.5e-4, 0.32, 400), ("vit_large_patch16_224", 7.5e-4, 0.32, 250),
    ]  # fmt: skip
    for model, lr, low, epochs in cases:
        train = Train(pictures="p", out=Path("o"), encoder=model, preset="paper")
        r, why = resolve(train, 1_281_167, Hardware("cuda", "H200", 16, True))
        assert r.lr == pytest.approx(lr * 1024 / 256) and r.global_scale[0] == low and r.local_crops == 10
        assert r.steps == epochs * (1_281_167 // 1024) and str(epochs) in why["steps"]
        assert (r.anchors, r.support, r.smoothing, r.koleo_weight, r.teacher_votes) == (4096, 8, 0.1, (0, 0), "softmax")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "fields", [{}, {"mim_weight": 1.0, "sigreg_weight": 1.0}, {"method": "massl"}, {"method": "dino"}]
)
def test_a_step_on_a_gpu_waits_for_nothing(fields: dict[str, object]) -> None:
    r, device = recipe(batch_size=32, **fields), torch.device("cuda")
    learner = Learner(r, device, Speed(bf16=True), Views("photographs", r.mean, r.std))
    pixels = torch.randint(0, 256, (32, 48, 48, 3), dtype=torch.uint8, generator=generator()).to(device)
    batch = Batch(pixels, torch.ones(32), torch.arange(32, device=device), torch.arange(32))
    for step in range(3):
        learner.step(batch, step)
    torch.cuda.set_sync_debug_mode("error")
    try:
        learner.step(batch, 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_states_with_the_backbones_old_name_are_loaded() -> None:
    it, batch = learner({})
    it.step(batch, 0)
    state = it.state()
    for part in ("student", "teacher"):
        state[part] = {name.replace("backbone.", "vit."): value.clone() for name, value in state[part].items()}
        assert any(name.startswith("vit.") for name in state[part])
    other, _ = learner({})
    other.load(state)
    for part in ("student", "teacher"):
        mine, theirs = it.state()[part], other.state()[part]
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
