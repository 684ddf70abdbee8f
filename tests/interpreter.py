"""Kernels in Triton's interpreter: a test file run as a program of its own prints its results.

The interpreter replaces the decorator of every kernel in its process, which no other test may see.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import triton


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that is allocated inside holds NaN until it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def interpreted(file: str) -> dict[str, dict[str, Any]]:
    """What `file` prints in its last line when it is run, as JSON."""
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, file], env=env, capture_output=True, text=True, check=False
    )
    if "only 0-dimensional arrays can be converted to Python scalars" in run.stderr:
        old = tuple(int(x) for x in triton.__version__.split(".")[:2]) < (3, 7)
        assert old, run.stderr[-3000:]
        pytest.skip("the interpreter of this older Triton does not work with numpy >= 2.4")
    assert run.returncode == 0, run.stderr[-3000:]
    found: dict[str, dict[str, Any]] = json.loads(run.stdout.splitlines()[-1])
    return found
