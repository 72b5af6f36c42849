"""Do the alarms speak on runs that fail, and keep silent on a run that works? Four short trainings, on drawn pictures.

    python -m benchmarks.alarms --out FOLDER [--steps 150] [--seed 0] [--threads 1]

healthy     drawn palettes, views `products`: the class is the pair of hues, which these views keep
shortcut    drawn textures, views `products`: both views carry the same two colours, and colour says nothing about the class
collapse    drawn palettes without stabiliser, from truncated normal 0.02, views `orientation-free`, which hide the class:
            the embeddings shrink to nearly one point
unlabelled  the shortcut run's pictures without folders: what is left are neighbours

About 40 CPU seconds each. A finished run in FOLDER is not trained again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.record import cpu_name, finish
from tests.palettes import write_palettes
from tests.textures import write_textures
from training.command import train
from training.config import Train
from training.monitor import Health, read_history

PICTURES = 1600
COMMON: dict[str, Any] = {"encoder": "vit_nano", "image_size": 32, "patch_size": 8, "device": "cpu"}
UNSTABLE: dict[str, Any] = {
    "preset": "paper", "mim_weight": 0.0, "koleo_weight": 0.0, "lr": 1e-3, "momentum": 0.99, "local_crops": 2,
    "head_dim": 128, "support": 4, "views": "orientation-free",
}  # fmt: skip
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "healthy": ("palettes", {"views": "products"}),
    "shortcut": ("textures", {"views": "products"}),
    "collapse": ("palettes", UNSTABLE),
    "unlabelled": ("textures-flat", {"views": "products"}),
}


def pictures(folder: Path, name: str) -> Path:
    """Draw a set once."""
    if not folder.is_dir():
        draw = write_palettes if name == "palettes" else write_textures
        temporary = draw(folder.with_suffix(".tmp"), PICTURES)
        if name.endswith("-flat"):
            for path in sorted(temporary.glob("*/*.png")):
                path.rename(temporary / path.name)
        temporary.rename(folder)
    return folder


def run(out: Path, name: str, steps: int, seed: int, threads: int | None) -> tuple[list[Health], list[dict[str, Any]]]:
    """Train one of `RUNS` (or read it, where it is finished); returns its measurements and alarms."""
    source, settings = RUNS[name]
    folder = pictures(out / "pictures" / source, source)
    asked = Train(
        pictures=folder, out=out / name, steps=steps, seed=seed, threads=threads, resume=True, **COMMON, **settings
    )
    if train(asked):
        raise SystemExit(130)
    metrics = out / name / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return read_history(metrics), [line for line in lines if "alarm" in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--quick", action="store_true", help="write no result")
    args = parser.parse_args()
    (args.out / "pictures").mkdir(parents=True, exist_ok=True)
    found = {name: run(args.out, name, args.steps, args.seed, args.threads) for name in RUNS}
    print(f"\n{cpu_name()}, seed {args.seed}, {args.steps} steps, {PICTURES} pictures a set")
    for name, (history, alarms) in found.items():
        last = history[-1]
        print(f"  {name:<11}kNN {last.knn:5.1f} %   over the baselines ", end="")
        print(", ".join(f"{points:+.1f} ± {error:.1f}" for points, error in last.lead.values()) or "no labels")
        print(f"{'':13}mean cosine {last.features.mean_cosine:.3f} (head {last.heads.mean_cosine:.3f})   ", end="")
        print(f"effective rank {last.features.effective_rank:.1f} (head {last.heads.effective_rank:.1f})   ", end="")
        print("shares of neighbours " + ", ".join(f"{name} {share:.2f}" for name, share in last.overlap.items()))
        for alarm in alarms[:1] + alarms[-1:]:
            print(f"{'':13}step {alarm['step']}: {alarm['alarm']}")
    kinds = {name: {alarm["kind"] for alarm in alarms} for name, (_, alarms) in found.items()}
    collapsed = found["collapse"][0][-1]
    goals = [
        ("healthy_no_alarms", -float(len(found["healthy"][1])), 0.0),
        ("healthy_knn_over_best_baseline_points", min(p for p, _ in found["healthy"][0][-1].lead.values()), 10.0),
        ("shortcut_alarm", float("shortcut" in kinds["shortcut"]), 1.0),
        ("shortcut_no_collapse_alarm", -float(len(kinds["shortcut"] - {"shortcut"})), 0.0),
        ("collapse_alarm", float(bool(kinds["collapse"] & {"point", "line", "clusters", "dimensional-collapse"})), 1.0),
        ("collapse_head_mean_cosine", collapsed.heads.mean_cosine, 0.95),
        ("unlabelled_shortcut_alarm", float("shortcut" in kinds["unlabelled"]), 1.0),
    ]
    figures = {
        name: {"last": history[-1].line(), "alarms": [f"step {a['step']}: {a['alarm']}" for a in alarms]}
        for name, (history, alarms) in found.items()
    }
    finish("alarms" if args.seed == 0 else f"alarms_seed{args.seed}", figures, goals, args.seed, args.quick)


if __name__ == "__main__":
    main()
