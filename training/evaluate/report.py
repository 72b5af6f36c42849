"""Results as tables on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

# Column → (key in results.json, whether it is a percentage).
COLUMNS: dict[str, dict[str, str]] = {
    "knn": {"top-1 %": "top1"},
    "linear": {"top-1 %": "top1"},
    "retrieval": {"mAP %": "map", "R@1 %": "recall_at_1", "R@5 %": "recall_at_5", "R@10 %": "recall_at_10"},
    "copies": {
        "µAP %": "micro_ap",
        "µAP best %": "micro_ap_best",
        "R@P90 %": "recall_at_precision_90",
        "R@1 %": "recall_at_1",
        "mAP %": "map",
    },
    "label-free": {"R@1 %": "recall_at_1", "± %": "recall_at_1_error", "MRR %": "mrr", "±  %": "mrr_error"},
    "revisited": {
        "E mAP %": "easy_map",
        "M mAP %": "medium_map",
        "H mAP %": "hard_map",
        "M mP@10 %": "medium_mp_at_10",
        "H mP@10 %": "hard_mp_at_10",
    },
    "agreement": {"shared neighbours %": "agreement"},
}
TITLES = {
    "knn": "kNN",
    "linear": "linear probe",
    "retrieval": "retrieval",
    "copies": "copy detection",
    "label-free": "label-free self-retrieval",
    "revisited": "revisited Oxford / Paris",
    "agreement": "neighbour agreement",
}
_COUNTS = ("queries", "negatives", "bank", "gallery", "classes", "pictures")


def print_tables(console: Console, results: dict[str, Any]) -> None:
    """One table per task, the encoders first, what needs no learning below them."""
    for task, found in results.items():
        counts = ", ".join(f"{found[name]:,} {name}" for name in _COUNTS if name in found)
        console.print(f"\n{TITLES[task]}: {counts}\n{found['protocol']}")
        table = Table(show_edge=False)
        table.add_column("features")
        for title in COLUMNS[task]:
            table.add_column(title, justify="right")
        for name, values in found["results"].items():
            cells = [f"{100 * values[key]:.1f}" if key in values else "–" for key in COLUMNS[task].values()]
            table.add_row(name, *cells)
        console.print(table)
        for parts in ("recall_at_1_by_transform", "recall_at_1_by_edit"):
            _print_parts(console, found["results"], parts)


def _print_parts(console: Console, results: dict[str, Any], key: str) -> None:
    """Recall at 1 per transform or edit, a row each."""
    having = {name: values[key] for name, values in results.items() if values.get(key)}
    if not having or set(next(iter(having.values()))) == {""}:
        return
    table = Table(show_edge=False)
    table.add_column("R@1 % of")
    for name in having:
        table.add_column(name, justify="right", no_wrap=False, max_width=14)
    for part in next(iter(having.values())):
        table.add_row(part, *(f"{100 * values[part]:.1f}" for values in having.values()))
    console.print(table)
