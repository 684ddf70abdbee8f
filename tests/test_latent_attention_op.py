"""`reattend::latent_attention` against torch's own SDPA on the concatenated rows, in fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from reattend.errors import ArgumentError
from reattend.kernels.attention import attention
from reattend.kernels.latent_attention import latent_attention, reference

OP = torch.ops.reattend.latent_attention.default


def oracle(args: tuple[Tensor, ...], mask: Tensor, scale: float, softcap: float) -> Tensor:
    """SDPA with key [latent | rope] and value latent, one KV head repeated."""
    q_nope, q_rope, latent, rope = (x.double() for x in args)
    q = torch.cat((q_nope, q_rope), -1)
    k = torch.cat((latent, rope), -1).nan_to_num()[:, None].expand(-1, q.shape[1], -1, -1)
    v = latent.nan_to_num()[:, None].expand(-1, q.shape[1], -1, -1)
    if softcap:
        s = softcap * torch.tanh((q @ k.mT) * scale / softcap)
        u = torch.softmax(s.masked_fill(~mask[:, None], -math.inf), -1) @ v
    else:
        u = F.scaled_dot_product_attention(q, k, v, mask[:, None], scale=scale)
    return torch.where(mask.any(-1)[:, None, :, None], u.nan_to_num(), 0)


def mask_of(start: Tensor, length: Tensor, n: int, m: int, causal: bool, window: int) -> Tensor:
    rows = []
    for s, end in zip(start.tolist(), length.tolist(), strict=True):
        pos = range(end - n, end)
        rows.append(
            [
                [
                    s <= j < end and (not causal or j <= p) and (not window or p - j < window)
                    for j in range(m)
                ]
                for p in pos
            ]
        )
    return torch.tensor(rows, dtype=torch.bool)


def make(
    b: int, h: int, n: int, m: int, r: int, rope: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(b + 7 * h + 11 * n + 13 * m + 17 * r)
    shapes = ((b, h, n, r), (b, h, n, rope), (b, m, r), (b, m, rope))
    q_nope, q_rope, latent, key = (
        torch.randn(*s, generator=gen, dtype=torch.float64).to(dtype) for s in shapes
    )
    return q_nope, q_rope, latent, key


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-rope": {"rope": 0},
    "no-rope-decode": {"rope": 0, "n": 1, "length": [13, 4, 9]},
    "left-padding": {"start": [0, 5, 12]},
    "ragged-capacity": {"m": 19, "length": [13, 9, 6], "start": [0, 2, 3], "n": 5},
    "decode": {"n": 1, "start": [1, 0, 7], "length": [13, 8, 9]},
    "chunk": {"n": 4, "length": [13, 10, 4]},
    "window": {"window": 3},
    "softcap": {"softcap": 0.9, "start": [0, 3, 0]},
    "not-causal": {"causal": False, "length": [13, 7, 10]},
    "odd": {"h": 5, "r": 11, "rope": 3},
    "one-head": {"h": 1, "r": 1, "rope": 2},
    "empty-row": {"n": 2, "length": [13, 0, 1]},
}


@pytest.mark.parametrize("form", ["op", "plain"])
@pytest.mark.parametrize("name", CASES)
def test_equals_sdpa(name: str, form: str) -> None:
    case = {"h": 4, "n": 13, "m": 13, "r": 8, "rope": 4, "causal": True, "window": 0}
    case |= {"softcap": 0.0, **CASES[name]}
    n, m = case["n"], case["m"]
    start = torch.tensor(case.get("start", [0, 0, 0]), dtype=torch.int32)
    length = torch.tensor(case.get("length", [m, m, m]))
    args = make(3, case["h"], n, m, case["r"], case["rope"])
    for b in range(3):
        for cache in args[2:]:
            cache[b, : start[b]] = cache[b, length[b] :] = math.nan
    mask = mask_of(start, length, n, m, case["causal"], case["window"])
    function = latent_attention if form == "op" else reference.latent_attention
    u, lse = function(
        *args,
        start,
        length,
        scale=0.31,
        causal=case["causal"],
        sliding_window=case["window"],
        softcap=case["softcap"],
    )
    torch.testing.assert_close(u, oracle(args, mask, 0.31, case["softcap"]), rtol=0, atol=1e-13)
    # lse against the other op, whose lse has its own test
    q, k = torch.cat(args[:2], -1), torch.cat(args[2:], -1)[:, None]
    _, want = attention(
        q,
        k,
        args[2][:, None],
        start,
        length,
        scale=0.31,
        causal=case["causal"],
        sliding_window=case["window"],
        softcap=case["softcap"],
    )
    torch.testing.assert_close(lse, want, rtol=0, atol=1e-13)


def test_absorbed_equals_expanded() -> None:
    """The identity the op exists for: u times W_uv equals attention over expanded heads."""
    gen = torch.Generator().manual_seed(0)
    b, h, n, r, rope, d, e = 2, 3, 6, 8, 4, 5, 7
    draw = lambda *s: torch.randn(*s, generator=gen, dtype=torch.float64)  # noqa: E731
    w_uk, w_uv = draw(h, d, r), draw(h, e, r)
    q, q_rope, latent, k_rope = (
        draw(b, h, n, d),
        draw(b, h, n, rope),
        draw(b, n, r),
        draw(b, n, rope),
    )
    rows = (torch.tensor([0, 2]), torch.tensor([n, n]))
    u, lse = latent_attention(
        torch.einsum("bhnd,hdr->bhnr", q, w_uk), q_rope, latent, k_rope, *rows, scale=0.2
    )
    k = torch.einsum("bmr,hdr->bhmd", latent, w_uk)
    k = torch.cat((k, k_rope[:, None].expand(-1, h, -1, -1)), -1)
    v = torch.einsum("bmr,her->bhme", latent, w_uv)
    y, lse_expanded = attention(torch.cat((q, q_rope), -1), k, v, *rows, scale=0.2)
    got = torch.einsum("bhnr,her->bhne", u, w_uv)
    torch.testing.assert_close(got, y, rtol=0, atol=1e-13)
    torch.testing.assert_close(lse, lse_expanded, rtol=0, atol=1e-13)


@pytest.mark.parametrize("form", ["op", "plain"])
@pytest.mark.parametrize("rope", [0, 4])
def test_paged_cache_and_its_gradient_equal_dense(form: str, rope: int) -> None:
    q_nope, q_rope, latent, key = make(2, 3, 3, 10, 6, rope)
    page, table = 4, torch.tensor([[5, 2, 0], [3, 1, 99]])
    pages = (
        torch.full((6, page, 6), math.nan).double(),
        torch.full((6, page, rope), math.nan).double(),
    )
    length = [10, 7]
    for b in range(2):
        for j in range(length[b]):
            pages[0][table[b, j // page], j % page] = latent[b, j]
            pages[1][table[b, j // page], j % page] = key[b, j]
    rows = (torch.tensor([1, 0]), torch.tensor(length))
    function = latent_attention if form == "op" else reference.latent_attention
    dense = latent.clone().requires_grad_()
    want = latent_attention(q_nope, q_rope, dense, key, *rows, scale=0.4)
    paged = pages[0].requires_grad_()
    got = function(q_nope, q_rope, paged, pages[1], *rows, table, scale=0.4)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-14)
    (want_grad,) = torch.autograd.grad(want[0].square().sum(), dense)
    (got_grad,) = torch.autograd.grad(got[0].square().sum(), paged)
    for b in range(2):
        for j in range(length[b]):
            torch.testing.assert_close(got_grad[table[b, j // page], j % page], want_grad[b, j])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_is_computed_in_fp32(dtype: torch.dtype) -> None:
    args = make(2, 4, 33, 40, 16, 8, dtype)
    rows = (torch.tensor([0, 5]), torch.tensor([40, 36]))
    u, lse = latent_attention(*args, *rows, scale=0.2)
    want_u, want_lse = latent_attention(*(x.double() for x in args), *rows, scale=0.2)
    assert (u.dtype, lse.dtype) == (dtype, torch.float32)
    tolerance = max(torch.finfo(dtype).eps * 4, 2e-6)
    torch.testing.assert_close(u.double(), want_u, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), want_lse, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("rope", [0, 2])
@pytest.mark.parametrize("options", [{}, {"softcap": 1.1, "sliding_window": 3}])
def test_gradcheck(rope: int, options: dict[str, Any]) -> None:
    args = tuple(x.requires_grad_() for x in make(2, 2, 4, 6, 3, rope))
    rows = (torch.tensor([0, 3]), torch.tensor([6, 5]))

    def run(*args: Tensor) -> tuple[Tensor, Tensor]:
        u, lse = latent_attention(*args, *rows, scale=0.6, **options)
        return u, lse.clamp(min=-1e3)

    assert torch.autograd.gradcheck(run, args)


@pytest.mark.parametrize("rope", [0, 4])
def test_opcheck(rope: int) -> None:
    args = tuple(x.requires_grad_() for x in make(2, 4, 3, 6, 8, rope, torch.float32))
    rows = (torch.tensor([0, 1]), torch.tensor([6, 5]))
    torch.library.opcheck(OP, (*args, *rows), {"scale": 0.5})


class Layer(torch.nn.Module):
    def forward(self, *args: Tensor) -> Tensor:
        return latent_attention(*args, scale=0.5, softcap=3.0)[0] * 2


def test_export_with_dynamic_dims() -> None:
    B, N, M = (torch.export.Dim(x, min=2, max=64) for x in ("B", "N", "M"))
    args = (*make(2, 4, 3, 7, 8, 4, torch.float32), torch.tensor([0, 1]), torch.tensor([7, 5]))
    shapes = (({0: B, 2: N}, {0: B, 2: N}, {0: B, 1: M}, {0: B, 1: M}, {0: B}, {0: B}),)
    program = torch.export.export(Layer(), args, dynamic_shapes=shapes)
    assert [n.target for n in program.graph.nodes if "reattend" in str(n.target)] == [OP]
    rows = (torch.tensor([0, 1, 2]), torch.tensor([11, 5, 9]))
    args = (*make(3, 4, 5, 11, 8, 4, torch.float32), *rows)
    got = program.run_decompositions().module()(*args)
    torch.testing.assert_close(got, Layer()(*args), rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_fullgraph_with_gradient(backend: str) -> None:
    torch._dynamo.reset()
    layer = torch.compile(Layer(), fullgraph=True, backend=backend)
    args = tuple(x.requires_grad_() for x in make(2, 4, 3, 7, 8, 4, torch.float32))
    rows = (torch.tensor([0, 1]), torch.tensor([7, 5]))
    got, want = layer(*args, *rows), Layer()(*args, *rows)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    got_grad = torch.autograd.grad(got.square().sum(), args)
    want_grad = torch.autograd.grad(want.square().sum(), args)
    torch.testing.assert_close(got_grad, want_grad, rtol=1e-5, atol=1e-5)


def test_autocast_uses_the_dtype_of_the_region() -> None:
    args = make(2, 2, 3, 5, 8, 4, torch.float32)
    rows = (torch.tensor([0, 0]), torch.tensor([5, 5]))
    with torch.autocast("cpu", torch.bfloat16):
        u, lse = latent_attention(*args, *rows, scale=0.5)
    assert (u.dtype, lse.dtype) == (torch.bfloat16, torch.float32)


def test_flops_are_counted() -> None:
    args = tuple(x.requires_grad_() for x in make(2, 4, 3, 7, 8, 4, torch.float32))
    rows = (torch.tensor([0, 1]), torch.tensor([7, 5]))
    with FlopCounterMode(display=False) as counter:
        latent_attention(*args, *rows, scale=0.5)[0].sum().backward()
    pairs = 2 * 2 * 4 * 3 * 7
    assert counter.get_total_flops() == pairs * (2 * 8 + 4) + pairs * (5 * 8 + 3 * 4)


@pytest.mark.parametrize(
    ("which", "shape", "message"),
    [
        (0, (2, 4, 3, 9), "widths of q_nope and latent"),
        (1, (2, 4, 3, 5), "widths of q_rope and rope"),
        (1, (2, 3, 3, 4), "query heads"),
        (3, (2, 6, 4), "lengths of latent and rope"),
        (2, (2, 1, 7, 8), "4 dimensions"),
    ],
)
def test_wrong_arguments_are_named(which: int, shape: tuple[int, ...], message: str) -> None:
    args = list(make(2, 4, 3, 7, 8, 4))
    args[which] = torch.zeros(shape, dtype=torch.float64)
    rows = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ArgumentError, match=message):
        latent_attention(*args, rows, rows, scale=1.0)
