"""The gradient of latent attention in Triton's interpreter: in slices of the rank, in fp32, and
with probabilities that are kept.

Slices are in the shipped tiles; the other dtypes and tiles are in `test_triton_interpreter.py`,
where it is told why one child process runs every case (this file run as a script).
"""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import pytest
import torch
from interpreter import interpreted, poisoned

from reattend.kernels.configs import find_config
from reattend.kernels.targets import TARGETS, Target

# rank, rope, heads, queries, capacity; rows (start, length), parts that share a tile of the cache
CASES: dict[str, dict[str, Any]] = {
    "one-slice": {"widths": (24, 16), "n": 40, "m": 40},
    "two-slices": {"widths": (64, 32), "n": 40, "m": 40, "h": 1},
    "odd-window-softcap": {
        "widths": (97, 24), "n": 33, "m": 33, "window": 9, "softcap": 2.0, "start": [3, 0]
    },
    "wide-window": {"widths": (72, 20), "n": 90, "m": 90, "window": 61, "h": 2, "parts": 2},
    "on-past-left-padding": {
        "widths": (200, 48), "n": 21, "m": 50, "start": [0, 7], "length": [45, 41], "parts": 2
    },
    "no-rope-two-way": {
        "widths": (320, 0), "n": 19, "m": 43, "causal": False, "length": [43, 17]
    },
    "widest-strided": {"widths": (512, 64), "n": 35, "m": 40, "h": 2, "apart": 8},
    "widest-sees-nothing": {"widths": (511, 63), "n": 17, "m": 20, "start": [0, 9],
                            "length": [20, 9], "h": 2},
    # with room for all pairs, or in chunks of queries
    "kept": {"widths": (40, 12), "n": 37, "m": 37, "room": 1 << 20, "dtype": "float16"},
    "kept-in-chunks": {
        "widths": (40, 12), "n": 37, "m": 50, "softcap": 2.0, "start": [0, 7], "length": [45, 41],
        "room": 1 << 14
    },
    "kept-no-rope-window": {
        "widths": (16, 0), "n": 33, "m": 33, "window": 9, "length": [33, 20], "room": 1 << 14,
        "dtype": "bfloat16"
    },
    "kept-long": {"widths": (64, 24), "n": 70, "m": 75, "window": 43, "start": [0, 2],
                  "length": [75, 71], "room": 60_000},
}  # fmt: skip
TOLERANCE = {"float32": 3e-6, "float16": 6e-3, "bfloat16": 4.8e-2}


def run_case(name: str) -> dict[str, Any]:
    """Executed in the child: errors of one case."""
    from reattend.kernels.configs import KernelConfig
    from reattend.kernels.core import Rule
    from reattend.kernels.latent_attention.launch_backward import launch_backward
    from reattend.kernels.latent_attention.launch_kept import launch_kept
    from reattend.kernels.latent_attention.reference import latent_attention

    case = {"h": 3, "causal": True, "window": 0, "softcap": 0.0, "parts": 1, "room": 0}
    case |= {"dtype": "float32"} | CASES[name]
    dtype = getattr(torch, case["dtype"])
    b, h, n, m, (r, rope) = 2, case["h"], case["n"], case["m"], case["widths"]
    gen = torch.Generator().manual_seed(len(name))
    start = torch.tensor(case.get("start", [0, 0]))
    length = torch.tensor(case.get("length", [m, m]), dtype=torch.int32)

    def draw(*size: int) -> torch.Tensor:
        """In rows with other numbers between them, where the case says so; queries as [B, N, H]."""
        wide = torch.full((*size[:-1], size[-1] + case.get("apart", 0)), math.nan, dtype=dtype)
        if "apart" in case and len(size) == 4:
            wide = wide.transpose(1, 2).contiguous().transpose(1, 2)
        return wide[..., : size[-1]].copy_(torch.randn(size, generator=gen))

    given = [draw(b, h, n, r), draw(b, h, n, rope), draw(b, m, r), draw(b, m, rope)]
    for cache in given[2:]:  # whatever lies outside the valid rows must not be seen
        for row in range(b):
            cache[row, : int(start[row])] = math.nan
            cache[row, int(length[row]) :] = math.nan
    leaves = [x.double().requires_grad_() for x in given]
    y, lse = latent_attention(
        *leaves, start, length, scale=0.3, causal=case["causal"],
        sliding_window=case["window"], softcap=case["softcap"],
    )  # fmt: skip
    seen = lse > -math.inf
    dy, dlse = draw(*y.shape), torch.randn(lse.shape, generator=gen)
    loss = (y * dy.double()).sum() + (lse * dlse)[seen].sum()
    wanted = torch.autograd.grad(loss, leaves, materialize_grads=True)
    rule = Rule(0.3, case["causal"], case["window"], case["softcap"])
    configs = tuple(find_config("sm_90", kernel, r, 4) for kernel in ("latent_dq", "latent_dkv"))
    given_back = ((dy, dlse), (y.detach().to(dtype), lse.detach().float()), (*given, start, length))
    with poisoned():
        if case["room"]:
            made = launch_kept(*given_back, rule, 2 * (KernelConfig(16, 32, 4, 1),), case["room"])
        else:
            made = launch_backward(*given_back, rule, configs, splits=case["parts"])
    return {
        "errors": [
            float((a.double() - w).abs().max() / w.abs().max())
            for a, w in zip(made, wanted, strict=True)
            if w.numel()
        ],
        "dead": int((~seen).sum()),
    }


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    return interpreted(__file__)


@pytest.mark.parametrize("case", CASES)
def test_equals_autograd(results: dict[str, Any], case: str) -> None:
    got = results[case]
    assert len(got["errors"]) == (4 if CASES[case]["widths"][1] else 2)
    limit = TOLERANCE[CASES[case].get("dtype", "float32")]
    assert all(error <= limit for error in got["errors"]), got
    if "sees-nothing" in case:
        assert got["dead"] > 0


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_every_target_has_kernels_for_every_dtype(
    monkeypatch: pytest.MonkeyPatch, target: Target
) -> None:
    from reattend.kernels.latent_attention import launch_backward

    monkeypatch.setattr(launch_backward, "device_target", lambda _: target)

    def found(rank: int, rope: int, dtype: torch.dtype) -> bool:
        q, k = torch.empty(1, 2, 3, rank, dtype=dtype), torch.empty(1, 3, rope, dtype=dtype)
        return launch_backward.configs_for(q, k) is not None

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert all(found(r, rope, dtype) for r in (1, 64, 129, 512) for rope in (0, 64)), dtype
        assert not found(513, 64, dtype)
        assert not found(512, 65, dtype)
    assert not found(64, 32, torch.float64)


if __name__ == "__main__":
    sys.stdout.write(json.dumps({name: run_case(name) for name in CASES}) + "\n")
