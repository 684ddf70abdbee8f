"""The Triton kernels of sparse attention in Triton's interpreter against the fp64 reference.

One child process runs every case, as in `test_triton_interpreter.py` (this file run as a script).
"""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import pytest
import torch
from interpreter import interpreted, poisoned

# queries, tokens, rows (start, length), pattern, block; the layout begins at block `first`
CASES: dict[str, dict[str, Any]] = {
    "prefill": {"n": 37, "t": 37, "h": 4},
    "prefill-random": {"n": 45, "t": 45, "h": 4, "pattern": "random", "start": [0, 3]},
    "prefill-two-way": {"n": 41, "t": 41, "pattern": "vision"},
    "prefill-sees-nothing": {"n": 40, "t": 40, "pattern": "nothing", "length": [40, 0]},
    "prefill-softcap": {"n": 33, "t": 33, "softcap": 2.0, "start": [5, 0]},
    "prefill-whole-blocks": {"n": 48, "t": 48, "pattern": "whole-blocks", "length": [48, 41]},
    "prefill-chunk": {"n": 21, "t": 60, "start": [0, 2], "first": 2, "m": 70},
    "prefill-heads-differ": {"n": 37, "t": 37, "h": 4, "group": 1},
    "prefill-padded-queries": {"n": 40, "t": 40, "start": [0, 33]},
    "prefill-block-32": {"n": 45, "t": 45, "block": 32, "pattern": "random"},
    "decode": {"n": 1, "t": 53, "h": 4, "length": [53, 31], "decode": True},
    "decode-split": {"n": 1, "t": 100, "start": [40, 2], "splits": 3, "m": 110},
    "decode-two-blocks": {"n": 5, "t": 66, "start": [0, 11], "splits": 2, "first": 3},
    "decode-heads-differ": {"n": 2, "t": 50, "group": 1, "pattern": "random"},
    "decode-padded-queries": {"n": 4, "t": 40, "start": [0, 38]},
    "decode-empty-row": {"n": 1, "t": 40, "length": [40, 0], "splits": 2},
    "decode-block-32": {"n": 3, "t": 70, "block": 32, "softcap": 2.0},
}
BACKWARD = ("prefill-random", "prefill-softcap", "prefill-chunk", "prefill-heads-differ")
BACKWARD += ("prefill-sees-nothing", "prefill-block-32")
TOLERANCE = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1.6e-2}


def run_case(name: str, dtype_name: str, device: str = "cpu") -> dict[str, Any]:
    """Errors of one case: the launchers in the interpreter (in the child), the op on a GPU."""
    from sparse_layouts import mask_of

    from reattend.kernels.configs import KernelConfig
    from reattend.kernels.core import Rule
    from reattend.kernels.sparse_attention import BlockLayout, reference, sparse_attention
    from reattend.kernels.sparse_attention.blocked import Inputs
    from reattend.kernels.sparse_attention.launch import launch, launch_backward

    case = {
        "pattern": "sinks-and-window",
        "block": 16,
        "softcap": 0.0,
        "group": 2,
        "first": 0,
        "h": 2,
    }
    case |= CASES[name]
    b, h, d, e, n, t = 2, case["h"], 20, 24, case["n"], case["t"]
    g = h // 2
    m = case.get("m", t)
    start = torch.tensor(case.get("start", [0, 0]))
    length = torch.tensor(case.get("length", [t, t]), dtype=torch.int32)
    mask = mask_of(case["pattern"], t)[:, case["first"] * case["block"] :]
    head_layout = torch.arange(h) // case["group"] % 3
    layout = BlockLayout.from_mask(mask, head_layout, case["block"], first=case["first"])
    layout, start, length = layout.to(device), start.to(device), length.to(device)
    gen = torch.Generator().manual_seed(len(name))
    dtype = getattr(torch, dtype_name)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=gen).to(device, dtype)

    q, k, v = draw(b, n, h, d).transpose(1, 2), draw(b, g, m, d), draw(b, g, m, e)
    for cache in (k, v):  # whatever lies outside the valid rows must not be seen
        for row in range(b):
            cache[row, :, : int(start[row])] = math.nan
            cache[row, :, int(length[row]) :] = math.nan
    scalars = (layout.block, layout.first, 0.3, case["softcap"])
    x = Inputs(q, k, v, layout.tensors, (start, length), layout.block, layout.first)
    rule, config = Rule(0.3, False, 0, case["softcap"]), KernelConfig(16, 16, 4, 1)
    if device == "cpu":
        decode, splits = name.startswith("decode"), case.get("splits", 1)
        with poisoned():
            y, lse = launch(x, rule, config, decode=decode, splits=splits)
    else:
        given = [t.requires_grad_() for t in (q, k, v)]
        y, lse = sparse_attention(*given, *layout.tensors, start, length, *scalars)
    inputs = [t.double().requires_grad_() for t in (q, k, v)]
    want, want_lse = reference.sparse_attention(*inputs, *layout.tensors, start, length, *scalars)
    dead = want_lse == -math.inf
    result = {
        "y": float((y.double() - want).detach().abs().max() / want.detach().abs().max()),
        "lse": float((lse.double() - want_lse).detach()[~dead].abs().max()),
        "dead": int(dead.sum()),
        "dead_agree": bool(torch.equal(lse == -math.inf, dead)),
        "dead_zero": bool((y[dead] == 0).all()),
        "dtype": str(y.dtype),
    }
    if name in BACKWARD:
        dy, dlse = draw(b, h, n, e), torch.randn(b, h, n, generator=gen).to(device)
        loss = (want * dy.double()).sum() + (want_lse * dlse)[~dead].sum()
        wanted = torch.autograd.grad(loss, inputs)
        if device == "cpu":
            with poisoned():
                found = launch_backward((dy, dlse), (y, lse), x, rule, (config, config))
        else:
            found = torch.autograd.grad((y, lse), given, (dy, dlse))
        result["gradients"] = [
            float((a.double() - w).abs().max() / w.abs().max())
            for a, w in zip(found, wanted, strict=True)
        ]
    return result


def names() -> list[tuple[str, str]]:
    """fp32 everywhere; fp16 and bf16 (computed in fp32 there) on some."""
    half = ("prefill-softcap", "decode-split")
    full = [(c, "float32") for c in CASES]
    return full + [(c, "float16") for c in half] + [(c, "bfloat16") for c in ("prefill", "decode")]


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    return interpreted(__file__)


def check(got: dict[str, Any], dtype: str) -> None:
    assert got["dtype"] == f"torch.{dtype}"
    assert got["y"] <= TOLERANCE[dtype], got
    assert got["lse"] <= 5e-6, got
    assert got["dead_agree"], got
    assert got["dead_zero"], got
    for error in got.get("gradients", []):
        assert error <= 3 * TOLERANCE[dtype], got


@pytest.mark.parametrize(("case", "dtype"), names())
def test_equals_reference(results: dict[str, Any], case: str, dtype: str) -> None:
    check(results[f"{case} {dtype}"], dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
def test_the_op_is_right_on_this_gpu(case: str, dtype: str) -> None:
    check(run_case(case, dtype, "cuda"), dtype)


@pytest.mark.parametrize("softcap", [(), (2.0,)])
def test_tensors_without_a_kernel_are_computed_in_torch(softcap: tuple[float, ...]) -> None:
    """What the dispatcher calls on a GPU, with positional arguments, for fp64 for instance."""
    from sparse_layouts import mask_of

    from reattend.kernels.sparse_attention import BlockLayout, register, sparse_attention

    layout = BlockLayout.from_mask(mask_of("random", 20), torch.tensor([0, 2]), 16)
    q, k, v = torch.randn(3, 1, 2, 20, 8, dtype=torch.float64)
    rows = (torch.tensor([0]), torch.tensor([20]))
    args = (q, k, v, *layout.tensors, *rows, 16, 0, 0.5, *softcap)
    y, lse = register._cuda(*args)
    torch.testing.assert_close((y, lse), sparse_attention(*args), rtol=0, atol=0)
    grads = register._cuda_backward(y, lse.nan_to_num(neginf=0.0), y, lse, *args)
    want = register.sparse_attention_backward(y, lse.nan_to_num(neginf=0.0), y, lse, *args)
    torch.testing.assert_close(grads, want, rtol=0, atol=0)


def test_cases_include_rows_that_see_nothing(results: dict[str, Any]) -> None:
    for name in ("prefill-sees-nothing", "prefill-padded-queries", "decode-empty-row"):
        assert results[f"{name} float32"]["dead"] > 0
    assert sum("gradients" in result for result in results.values()) > len(BACKWARD)


if __name__ == "__main__":
    found = {" ".join(name): run_case(*name) for name in names()}
    sys.stdout.write(json.dumps(found) + "\n")
