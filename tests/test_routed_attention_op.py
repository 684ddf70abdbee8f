"""`reattend::routed_attention` against torch's own SDPA with heads set to nothing, in fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_attention_op import make, mask_of, oracle
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from reattend.errors import ArgumentError
from reattend.kernels.routed_attention import reference, routed_attention

OP = torch.ops.reattend.routed_attention.default
CASES: dict[str, dict[str, Any]] = {
    "heads": {},
    "groups": {"units": 2},
    "left-padding": {"start": [0, 3, 9]},
    "ragged": {"start": [2, 0, 5], "length": [21, 25, 16], "units": 2},
    "window": {"window": 6},
    "softcap": {"softcap": 1.5},
    "not-causal": {"causal": False, "length": [25, 12, 20]},
    "wide-value": {"e": 13, "units": 2},
    "past": {"n": 19, "m": 29, "length": [29, 24, 20]},
    "few": {"n": 3, "start": [0, 4, 10]},
    "few-groups": {"n": 1, "units": 2, "length": [25, 0, 9]},
    "empty-row": {"length": [25, 0, 3]},
}


def chosen(b: int, units: int, n: int) -> Tensor:
    """Which queries use which units: about half, unit 0 of row 0 by none, of row 1 by all."""
    active = torch.rand(b, units, n, generator=torch.Generator().manual_seed(n)) < 0.5
    active[0, 0], active[1, 0] = False, True
    return active


@pytest.mark.parametrize("form", ["op", "plain"])
@pytest.mark.parametrize("name", CASES)
def test_equals_sdpa(name: str, form: str) -> None:
    case = {"n": 25, "m": 25, "d": 7, "e": 7, "causal": True, "window": 0, "softcap": 0.0}
    case |= {"units": 4, **CASES[name]}
    n, m = case["n"], case["m"]
    start, length = case.get("start", [0, 0, 0]), case.get("length", [m, m, m])
    q, k, v = make(3, 4, 2, n, m, case["d"], case["e"])
    for b in range(3):  # nothing outside the valid rows may be read
        k[b, :, : start[b]] = v[b, :, : start[b]] = math.nan
        k[b, :, length[b] :] = v[b, :, length[b] :] = math.nan
    active = chosen(3, case["units"], n)
    if case["units"] == 2 and form == "op":
        k[0, 0] = math.nan  # nor keys of a group that no query of its row uses
    mask = mask_of(start, length, n, m, case["causal"], case["window"])
    want_y, want_lse = oracle(q, k, v, mask, 0.37, case["softcap"])
    used = active.repeat_interleave(4 // case["units"], 1)
    want_y = torch.where(used[..., None], want_y, 0)
    want_lse = torch.where(used, want_lse, -math.inf)
    function = routed_attention if form == "op" else reference.routed_attention
    y, lse = function(
        q, k, v, active, torch.tensor(start), torch.tensor(length, dtype=torch.int32),
        scale=0.37, causal=case["causal"], sliding_window=case["window"], softcap=case["softcap"],
    )  # fmt: skip
    torch.testing.assert_close(y, want_y, rtol=0, atol=1e-13)
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stretches_of_queries_do_not_change_the_result(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through torch's fused kernel, several calls per head, padding and window included."""
    monkeypatch.setattr("reattend.kernels.routed_attention.fused.STRETCH", 16)
    q, k, v = make(2, 4, 2, 70, 80, 16, 16, dtype)
    rows = (torch.tensor([0, 3]), torch.tensor([80, 76]))
    active = chosen(2, 4, 70)
    y, lse = routed_attention(q, k, v, active, *rows, scale=0.3, sliding_window=23)
    want_y, want_lse = reference.routed_attention(
        q.double(), k.double(), v.double(), active, *rows, scale=0.3, sliding_window=23
    )
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    assert (y.dtype, lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(y.double(), want_y, rtol=0, atol=tolerance)
    torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=tolerance)


@pytest.mark.parametrize("options", [{}, {"softcap": 1.1, "sliding_window": 3}, {"causal": False}])
@pytest.mark.parametrize("n", [4, 18])
def test_gradient_is_that_of_the_plain_form(options: dict[str, Any], n: int) -> None:
    inputs = [x.requires_grad_() for x in make(2, 4, 2, n, 20, 3, 3)]
    rest = (chosen(2, 4, n), torch.tensor([0, 3]), torch.tensor([20, 18]))
    found = []
    for function in (routed_attention, reference.routed_attention):
        y, lse = function(*inputs, *rest, scale=0.6, **options)
        pull = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).double()
        alive = lse.masked_fill(lse == -math.inf, 0)
        loss = (y * pull).sum() + (alive * pull[..., 0]).sum()
        found.append(torch.autograd.grad(loss, inputs))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        assert want.abs().max() > 0


def test_opcheck_and_export() -> None:
    q, k, v = (x.requires_grad_() for x in make(2, 4, 2, 3, 6, 8, 8, torch.float32))
    rows = (torch.tensor([0, 1]), torch.tensor([6, 5]))
    torch.library.opcheck(OP, (q, k, v, chosen(2, 2, 3), *rows), {"scale": 0.5, "softcap": 2.0})

    class Layer(torch.nn.Module):
        def forward(self, *x: Tensor) -> Tensor:
            return routed_attention(*x, scale=0.5)[0] * 2

    n = torch.export.Dim("N", min=2, max=64)
    shapes = (({2: n}, None, None, {2: n}, None, None),)
    program = torch.export.export(Layer(), (q, k, v, chosen(2, 2, 3), *rows), dynamic_shapes=shapes)
    q, k, v = make(2, 4, 2, 5, 6, 8, 8, torch.float32)
    given = (q, k, v, chosen(2, 2, 5), *rows)
    torch.testing.assert_close(program.module()(*given), Layer()(*given), rtol=0, atol=0)


@pytest.mark.parametrize("units", [4, 2])
def test_flops_are_those_of_the_heads_used(units: int) -> None:
    """At 75 and 50 % of the heads, 75 and 50 % of the operations; forward and backward."""
    q, k, v = (x.requires_grad_() for x in make(2, 4, 2, 20, 20, 8, 8, torch.float32))
    rows = (torch.tensor([0, 0]), torch.tensor([20, 20]))
    counted = []
    for share in (1.0, 0.75, 0.5):
        active = torch.zeros(2, units, 20, dtype=torch.bool)
        active.view(-1)[: int(share * active.numel())] = True
        with FlopCounterMode(display=False) as counter:
            routed_attention(q, k, v, active, *rows, scale=0.5)[0].sum().backward()
        counted.append(counter.get_total_flops())
    whole = 2 * 2 * 4 * 20 * 20 * (8 + 8 + 3 * 8 + 2 * 8)
    assert counted == [whole, 0.75 * whole, 0.5 * whole]


@pytest.mark.parametrize(
    ("active", "message"),
    [
        (torch.zeros(2, 3, 3, dtype=torch.bool), "a query head or a KV group"),
        (torch.zeros(2, 4, 3), "3-D bool"),
        (torch.zeros(2, 4, 5, dtype=torch.bool), "lengths of q and active_BUN"),
    ],
)
def test_wrong_arguments_are_named(active: Tensor, message: str) -> None:
    q, k, v = make(2, 4, 2, 3, 6, 8, 8)
    rows = (torch.tensor([0, 1]), torch.tensor([6, 5]))
    with pytest.raises(ArgumentError, match=message):
        routed_attention(q, k, v, active, *rows, scale=1.0)
