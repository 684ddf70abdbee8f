"""What `python kernels/bench report` prints and draws, from the committed results."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from goals import goal_table, judge_all
from model_tables import families_table, layout_table, model_table
from registry import SPEED
from table import (
    decode_table,
    linear_table,
    onnx_encoder_table,
    onnx_linear_table,
    onnx_presets_table,
    onnx_routed_table,
    onnx_selected_table,
    onnx_sparse_table,
    routed_table,
    sparse_table,
    table,
)

RESULTS = Path(__file__).parent / "results"
EXIT_NO_RESULTS = 2


def device_tables(results: dict[str, Any]) -> str:
    """Speed of every problem, then the goals."""
    verdicts = judge_all([(case.name, case.goals) for case in SPEED], results["speed"])
    return f"{table(results)}\n\n{goal_table(verdicts)}"


def print_tables(device: str) -> None:
    """Every table as Markdown."""
    made: dict[str, Callable[[dict[str, Any]], str]] = {
        device: device_tables,
        f"model-{device}": model_table,
        f"families-{device}": families_table,
        "onnx_decode": decode_table,
        "sparse_cpu": sparse_table,
        "layout_cpu": layout_table,
        "onnx_sparse": onnx_sparse_table,
        "onnx_encoder": onnx_encoder_table,
        "onnx_selected": onnx_selected_table,
        "onnx_routed": onnx_routed_table,
        "routed_cpu": routed_table,
        "linear_cpu": linear_table,
        "onnx_linear": onnx_linear_table,
        "onnx_presets": onnx_presets_table,
    }
    for name, shown in made.items():
        path = RESULTS / f"{name}.json"
        if path.exists():  # not everything was measured on every device
            sys.stdout.write(shown(json.loads(path.read_text("utf-8"))) + "\n\n")


def write_plots(device: str, folder: Path) -> int:
    """One SVG per family that the results of a device tell enough about; the exit status."""
    source = RESULTS / f"{device}.json"
    if not source.exists():
        known = sorted(path.stem.removeprefix("sweep-") for path in RESULTS.glob("sweep-*.json"))
        sys.stderr.write(
            f"no results of {device!r}: {source} does not exist\n  next: --device with one of"
            f" {', '.join(known)}, or measure: `python kernels/bench` on such a device\n"
        )
        return EXIT_NO_RESULTS
    import plots  # needs packages that a machine for measuring may not have

    results = json.loads(source.read_text("utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    for name, drawn in plots.all_plots(results["speed"], results["device"]).items():
        path = folder / f"{device}-{name}.svg"
        path.write_text(drawn + "\n", encoding="utf-8")
        sys.stdout.write(f"wrote {path}\n")
    return 0
