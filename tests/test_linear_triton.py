"""The Triton kernels of linear attention in Triton's interpreter against the fp64 reference.

One child process runs every case, as in `test_triton_interpreter.py` (this file run as a script).
"""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch
from interpreter import interpreted, poisoned

# tokens, what a query sees (lag, block), options of the call; chunks have 16 tokens
CASES: dict[str, dict[str, Any]] = {
    "causal": {"n": 35, "tile": 16},
    "everything": {"n": 35, "decay": True, "state": True, "normalize": True, "h": 2, "b": 2},
    "sliding": {"n": 34, "lag": 5, "decay": True, "state": True, "normalize": True, "b": 2},
    "sliding-far": {"n": 67, "lag": 37, "decay": True},
    "terraces": {"n": 37, "lag": 9, "block": 8, "normalize": True, "h": 4, "g": 2},
    "terraces-of-a-chunk": {"n": 50, "lag": 17, "block": 16, "decay": True},
    "terraces-of-no-chunk": {"n": 83, "lag": 25, "block": 24, "decay": True, "state": True},
    "sees-nothing": {"n": 20, "lag": 40, "normalize": True},
    "featured": {"n": 21, "featured": 0.4, "state": True, "normalize": True, "h": 2},
    "featured-forgetful": {"n": 18, "featured": 60.0, "b": 2},
    "featured-step": {"n": 1, "featured": 0.4, "state": True, "normalize": True, "h": 2, "b": 2},
    "step": {"n": 1, "decay": True, "state": True, "normalize": True, "h": 4, "g": 2, "b": 2},
    "step-behind-a-window": {"n": 1, "lag": 7, "state": True, "f": 18, "e": 40},
    # beyond the range of fp16: states, scores that are divided, gradients that were; `times`: what
    # q, k, v and dy are multiplied with
    "states": {"n": 50, "times": (1e-3, 200, 200, 1e-3)},
    "states-divided": {"n": 50, "times": (1e-3, 200, 200, 1e-2), "normalize": True},
    "states-featured": {"n": 21, "times": (1e-3, 200, 300, 1e-3), "featured": 0.01},
    "scores": {"n": 35, "times": (100, 100, 1, 1), "normalize": True, "lag": 5, "decay": True},
    "small-sums": {"n": 35, "times": (2e-3, 1e-3, 1, 1), "normalize": True},
    "small-sums-featured": {"n": 21, "times": (2e-3, 1e-3, 1, 1), "normalize": True,
                            "featured": 0.01},
    "no-sums": {"n": 50, "lag": 37, "normalize": True},
    "no-sums-terraces": {"n": 50, "lag": 17, "block": 16, "normalize": True, "decay": True},
}  # fmt: skip
FAR = ("states", "states-divided", "states-featured", "scores", "small-sums")
FAR += ("small-sums-featured", "no-sums", "no-sums-terraces")
HALF = ("sliding", "sliding-far", "step", "featured", *FAR)
NO_GRADIENT = ("step", "step-behind-a-window", "featured-step")
TOLERANCE = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1.6e-2}


def run_case(name: str, dtype_name: str, device: str = "cpu") -> dict[str, Any]:
    """Errors of one case: the launchers in the interpreter (in the child), the op on a GPU."""
    from reattend.kernels.configs import KernelConfig
    from reattend.kernels.linear_attention import launch, linear_attention, reference, register

    case = {"lag": 0, "block": 1, "normalize": False, "h": 1, "g": 1, "f": 20, "e": 17, "b": 1}
    case |= CASES[name]
    b, h, g, n, f, e = (case[x] for x in ("b", "h", "g", "n", "f", "e"))
    gen = torch.Generator().manual_seed(n)
    dtype, columns = getattr(torch, dtype_name), e + case["normalize"]

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=gen, dtype=torch.float64).to(device)

    # queries are not contiguous; the first keys of the last row are padding
    by = case.get("times", (1, 1, 1, 1))
    q = (by[0] * draw(b, n, h, f).abs()).transpose(1, 2).to(dtype)
    k, v = (by[1] * draw(b, g, n, f).abs()).to(dtype), (by[2] * draw(b, g, n, e)).to(dtype)
    if name not in FAR:  # what a sum of zeros is divided by would make the largest gradients
        k[-1, :, : n // 4] = 0
    decay = -draw(b, g, n).abs() * 0.2 if case.get("decay") else None
    if case.get("featured"):  # some features forget everything, others hardly anything
        decay = -((draw(b, g, n, f).abs() / 3) ** 3) * case["featured"]
    state = draw(b, g, f, columns).abs() if case.get("state") else None
    tensors = [q, k, v, None if decay is None else decay.float()]
    tensors.append(None if state is None else state.float())
    rules = (case["lag"], case["block"], case["normalize"])
    config = KernelConfig(16, case.get("tile", 32), 4, 1)
    configs = dict.fromkeys((*launch.KERNELS, "channels"), config)
    x = launch.Inputs(*tensors, *rules)
    wide = [None if t is None else t.double().requires_grad_() for t in tensors]
    want = reference.linear_attention(*wide, *rules)
    if device == "cpu":
        with poisoned():
            found = launch.launch(x, configs)
    else:
        given = [None if t is None else t.requires_grad_() for t in tensors]
        found = linear_attention(*given, *rules)
    result = {
        "dtype": str(found[0].dtype),
        "errors": [apart(*p) for p in zip(found, want, strict=True)],
    }
    if name not in NO_GRADIENT:
        dy, dstate = (by[3] * draw(b, h, n, e)).to(dtype), draw(b, g, f, columns).float()
        if name == "sees-nothing":
            assert not bool(want[0].any())
        leaves = [t for t in wide if t is not None]
        wanted = torch.autograd.grad(want, leaves, (dy.double(), dstate.double()))
        if device == "cpu":
            with poisoned():
                made = launch.launch_backward(dy, dstate, x.for_gradient, configs)
            made = register._typed(made, x[:5])
            made = [m for m, t in zip(made, wide, strict=True) if t is not None]
        else:
            leaves = [t for t in given if t is not None]
            made = torch.autograd.grad(found, leaves, (dy, dstate))
        result["gradients"] = [apart(*p) for p in zip(made, wanted, strict=True)]
    return result


def drift(lag: int, dtype: torch.dtype = torch.bfloat16) -> float:
    """Error of the decays' gradient over 1024 tokens, rms, relative."""
    from reattend.kernels.configs import KernelConfig
    from reattend.kernels.linear_attention import launch, register

    gen = torch.Generator().manual_seed(0)
    q, k, v, dy = (torch.randn(1, 1, 1024, 16, generator=gen).to(dtype) for _ in range(4))
    given = [q, k, v, -0.2 * torch.rand(1, 1, 1024, generator=gen), None]
    dstate = torch.zeros(1, 1, 16, 16)
    configs = dict.fromkeys(launch.KERNELS, KernelConfig(64, 16, 4, 1))
    x = launch.Inputs(*given, lag, 1, False)
    found = launch.launch_backward(dy, dstate, x, configs)[3]
    wide = [None if t is None else t.double() for t in (dy, dstate, *given)]
    want = register.linear_attention_backward(*wide, lag, 1, False, False)[3]
    return float((found - want).norm() / want.norm())


def apart(found: torch.Tensor, want: torch.Tensor) -> float:
    top = want.detach().abs().max().clamp_min(1e-9)
    return float((found.double() - want).detach().abs().max() / top)


def names() -> list[tuple[str, str]]:
    """fp32 everywhere; fp16 and bf16 (computed in fp32 there) on some."""
    return [(c, "float32") for c in CASES] + [(c, d) for c in HALF for d in list(TOLERANCE)[1:]]


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    return interpreted(__file__)


def check(got: dict[str, Any], dtype: str) -> None:
    assert got["dtype"] == f"torch.{dtype}"
    assert max(got["errors"]) <= TOLERANCE[dtype], got
    assert max(got.get("gradients", [0.0])) <= 3 * TOLERANCE[dtype], got


@pytest.mark.parametrize(("case", "dtype"), names())
def test_equals_reference(results: dict[str, Any], case: str, dtype: str) -> None:
    check(results[f"{case} {dtype}"], dtype)


def test_rounding_does_not_add_up_in_the_gradient_of_decays(results: dict[str, Any]) -> None:
    found = results["drift"]
    assert found["0"] < 1e-2 and found["5"] < 1e-3, found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
def test_the_op_is_right_on_this_gpu(case: str, dtype: str) -> None:
    check(run_case(case, dtype, "cuda"), dtype)


@pytest.mark.parametrize("normalize", [False, True])
def test_tensors_without_a_kernel_are_computed_in_torch(normalize: bool) -> None:
    """What the dispatcher calls on a GPU, for fp64 for instance."""
    from reattend.kernels.linear_attention import linear_attention, register

    q, k, v = torch.rand(3, 1, 2, 20, 8, dtype=torch.float64)
    args = (q, k, v, None, None, 3, 1, normalize, False)
    found = register._cuda(*args)
    torch.testing.assert_close(found, linear_attention(*args), rtol=0, atol=0)
    grads = register._cuda_backward(*found, *args)
    want = register.linear_attention_backward(*found, *args)
    torch.testing.assert_close(grads, want, rtol=0, atol=0)


if __name__ == "__main__":
    every = {" ".join(name): run_case(*name) for name in names()}
    every["drift"] = {str(lag): drift(lag) for lag in (0, 5)}
    sys.stdout.write(json.dumps(every) + "\n")
