"""Shared fixtures: one torch thread per worker, the shipped trained model, tiny models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "examples" / "models" / "pycode-gqa"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shipped_path() -> Path:
    """Folder of the trained model in the repository."""
    return SHIPPED


@pytest.fixture
def shipped(shipped_path: Path) -> Any:
    """The trained model, float32, fresh for every test."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(shipped_path, dtype=torch.float32).eval()
