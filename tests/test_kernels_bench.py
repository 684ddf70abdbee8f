"""`python kernels/bench`: its refusal without a GPU, and its arithmetic on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[1] / "kernels" / "bench"


def test_without_a_gpu_it_says_so_and_exits_5(tmp_path: Path) -> None:
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(BENCH), "--out", str(tmp_path)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 5
    assert run.stderr.startswith("no GPU:")
    assert list(tmp_path.iterdir()) == []


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from cases import Case, OPTIONS, error_of, ours, tensors, torchs
for case in (
    Case("a", "attention", 2, 4, 2, 20, 50, 16),
    Case("b", "attention", 2, 4, 2, 1, 50, 16),
    Case("c", "latent_attention", 2, 3, 1, 30, 30, 16, 8),
    Case("d", "latent_attention", 2, 3, 1, 1, 30, 16, 8),
):
    inputs = tensors(case, torch.float32, "cpu")
    rows = (torch.zeros(case.b, dtype=torch.int64), torch.full((case.b,), case.m))
    got, want = ours(case, inputs, rows, 0.2)(), torchs(case, inputs, 0.2)()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for options in OPTIONS:
        for dtype in (torch.float32, torch.bfloat16):
            error = error_of(case, dtype, "cpu", options)
            assert 0 < error <= 1, (case, options, error)
    assert case.flops > 0 and case.cache_bytes > 0
"""


def test_ours_and_sdpa_time_the_same_problem() -> None:
    command = [sys.executable, "-c", SCRIPT, str(BENCH)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_are_right_on_this_gpu(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH), "--check-only", "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
