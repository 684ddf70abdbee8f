"""What every result file of this folder begins with, and how it is written."""

from __future__ import annotations

import json
import platform
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

EXIT_NO_DEVICE = 5  # status of a run that found no GPU


def no_gpu(next_step: str) -> int:
    """Say that there is no device and what to do; returns the exit status of such a run."""
    sys.stderr.write(f"no GPU: this runs kernels on a CUDA or ROCm device\n  next: {next_step}\n")
    return EXIT_NO_DEVICE


def head(command: str, *packages: str) -> dict[str, Any]:
    """Command, date, device (a GPU, or "cpu") and versions; `packages` beside torch and triton."""
    names = ("torch", "triton", *packages)
    found = {name: torch.__version__ if name == "torch" else version(name) for name in names}
    return {
        "command": command,
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {"python": platform.python_version(), **found},
    }


def place(report: dict[str, Any], folder: Path, prefix: str = "") -> Path:
    """The file of a report: named after its device."""
    return folder / f"{prefix}{report['device'].lower().replace(' ', '-')}.json"


def write(report: dict[str, Any], path: Path) -> None:
    """As JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
