"""`python kernels/bench`: its refusal without a GPU, and its arithmetic on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reattend.kernels.configs import MEASURED

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
import peers, problems
from cases import Case, bytes_of
from checking import listed, listed_huge, poison
from correct_families import TRIALS, trial_error
from correctness import OPTIONS, error_of
from problems import Problem, work_of
from proofs import keys_of
from registry import SPEED
from torch.nn.attention import SDPBackend
problems.DEVICE = "cpu"
peers.BACKENDS = {"flash": SDPBackend.MATH}  # the CPU has no other that takes every case
close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
for case in (
    Case("a", "attention", 2, 4, 2, 20, 50, 16, dtype="float32"),
    Case("b", "attention", 2, 4, 2, 1, 50, 16, dtype="float32"),
    Case("c", "attention", 2, 4, 2, 30, 30, 16, dtype="float32"),
):
    problem = Problem(case)
    close(problem.forward()[0], peers.sdpa(case, "flash")(problem)())
for pattern in ("sinks and window of 1k", "s2", "40 % of blocks"):
    for n in (1, 700):
        case = Case("d", "sparse_attention", 1, 16, 8, n, 700, 16, dtype="float32", pattern=pattern)
        problem = Problem(case)
        close(problem.forward()[0], peers.masked(problem)())
case = Case("e", "routed_attention", 2, 4, 2, 20, 20, 16, dtype="float32", share=0.5)
problem = Problem(case)
want = peers.sdpa(case, "flash")(problem)() * problem.rest[0].repeat_interleave(2, 1)[..., None]
close(problem.forward()[0], want)
assert problem.rest[0].sum(1).eq(1).all()
for page, n in ((0, 1), (16, 1)):
    case = Case("f", "latent_attention", 2, 4, 1, n, 64, 32, 16, dtype="float32", page=page)
    problem = Problem(case)
    found = [*found, problem.forward()[0]] if page else [problem.forward()[0]]
assert problem.rest[2].shape == (2, 4)
close(*found)  # the same rows, in pages
for decay in ("", "head", "feature"):
    case = Case("g", "linear_attention", 1, 2, 2, 70, 70, 16, dtype="float32", decay=decay)
    problem = Problem(case)
    first, again = problem.backward(), problem.backward()
    assert len(first) == 5
    for one, other in zip(first, again, strict=True):  # what is kept is not used up
        assert one is other is None or close(one, other) is None
poison()
for case in (
    Case("a", "attention", 2, 4, 2, 20, 50, 16),
    Case("b", "attention", 3, 4, 2, 1, 50, 16),
    Case("c", "latent_attention", 2, 3, 1, 30, 30, 16, 8),
    Case("d", "latent_attention", 3, 3, 1, 1, 30, 16, 8),
):
    for options in OPTIONS:
        for dtype in (torch.float32, torch.bfloat16):
            error = error_of(case, dtype, "cpu", options)
            assert 0 < error <= 1, (case, options, error)
for trial in [t for t in TRIALS if t.n * t.d < 11_000]:
    error = trial_error(trial, torch.float32, "cpu")
    assert 0 < error <= 1, (trial, error)
for case in SPEED:
    if not case.pattern and case.op != "linear_attention":
        visible = sum(case.m - case.n + i + 1 for i in range(case.n))
        wide = (2 * case.d + case.rope) * case.share
        assert case.flops == 2 * case.b * case.h * visible * wide, case
        assert case.cache_bytes < bytes_of(case) < 40e9, case
    if case.op == "latent_attention" and not case.decodes:
        assert peers.equal_flops(case).flops == case.flops
    if case.op == "latent_attention" and case.decodes:
        assert peers.original(case, case.h).cache_bytes == 4 * case.b * case.m * case.h * 128
ops = {case.op for case in SPEED}
checked = {one.key for one in (*listed(ops), *listed_huge(ops))}
assert {key for case in SPEED for key in keys_of(case)} <= checked
"""


def test_the_peers_compute_the_same_and_the_arithmetic_is_right() -> None:
    command = [sys.executable, "-c", SCRIPT, str(BENCH)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


HUGE = """
import sys
sys.path.insert(0, sys.argv[1])
from dataclasses import replace
import huge
from cases import bytes_of
from checking import poison
poison()
huge.SEEN = 150
for case in huge.HUGE:
    numbers = max(case.m * case.g * case.d, case.n * case.h * case.d)
    assert numbers > 1 << 31 and bytes_of(case) < 60e9, case
    state = case.op == "linear_attention"
    short = 300 if state else 400
    n = short if state else min(case.n, 40)
    less = replace(case, m=short, n=n, d=32, h=4, g=min(case.g, 2))
    if case.rope:
        less = replace(less, rope=16)
    if state:
        less = replace(less, g=4)
    error = huge.huge_error(less, "cpu")
    assert 0 < error <= 1, (case, error)
"""


def test_large_tensors_are_compared_where_they_are_read() -> None:
    command = [sys.executable, "-c", HUGE, str(BENCH)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


BROKEN = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import correctness
from cases import Case
right = correctness.attention
for wrong in (
    lambda *a, **k: (right(*a, **k)[0] * 1.1, right(*a, **k)[1]),
    lambda *a, **k: (right(*a, **k)[0], right(*a, **k)[1] + 0.01),
    lambda *a, **k: (right(*a, **k)[0].index_fill(0, torch.tensor([0]), float("nan")),) * 2,
):
    correctness.attention = wrong
    case = Case("a", "attention", 2, 4, 2, 20, 50, 16)
    assert correctness.error_of(case, torch.float32, "cpu", {}) > 1
"""


def test_a_wrong_kernel_is_noticed() -> None:
    command = [sys.executable, "-c", BROKEN, str(BENCH)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_the_committed_tables_are_those_of_the_json() -> None:
    run = subprocess.run(
        [sys.executable, str(BENCH), "report"], capture_output=True, text=True, check=True
    )
    page = (BENCH.parent / "README.md").read_text("utf-8")
    begin, end = "<!-- bench:begin -->\n", "<!-- bench:end -->"
    assert page.count(begin) == page.count(end) == 1
    shown = page.partition(begin)[2].partition(end)[0].strip()
    assert shown == run.stdout.strip(), "paste what `python kernels/bench report` prints"
    results = json.loads((BENCH / "results" / "nvidia-h200.json").read_text("utf-8"))
    assert all(row["ok"] for row in results["checks"])
    assert len(results["checks"]) > 200
    assert results["device"] in shown


def test_measured_configurations_are_of_the_committed_sweep() -> None:
    """Every shipped configuration that claims to be measured was swept, and nearly the fastest."""
    sweep = json.loads((BENCH / "results" / "sweep-nvidia-h200.json").read_text("utf-8"))
    tile = ("rows", "keys", "warps", "stages")
    swept = {tuple(row["config"][key] for key in tile) for row in sweep["rows"] if "ms" in row}
    shipped = [c for classes in MEASURED["sm_90"].values() for c in classes.values()]
    assert shipped
    assert {tuple(getattr(c, key) for key in tile) for c in shipped} <= swept


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_are_right_on_this_gpu(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH), "--check-only", "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
