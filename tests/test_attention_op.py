"""`reattend::attention` against torch's own SDPA with an explicit mask, in fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from reattend.errors import ArgumentError
from reattend.kernels.attention import attention, reference, register

OP = torch.ops.reattend.attention.default


def mask_of(
    start: list[int], length: list[int], n: int, m: int, causal: bool, window: int
) -> Tensor:
    """The contract, spelled key by key."""
    mask = torch.zeros(len(start), n, m, dtype=torch.bool)
    for b in range(len(start)):
        for i in range(n):
            pos = length[b] - n + i
            for j in range(m):
                seen = start[b] <= j < length[b]
                seen = seen and (not causal or j <= pos)
                mask[b, i, j] = seen and (window == 0 or pos - j < window)
    return mask


def oracle(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """SDPA in fp64 (softcap: by hand, SDPA has none), rows that see nothing replaced."""
    repeat = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().nan_to_num(), v.double().nan_to_num()
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    seen = mask.any(-1)[:, None, :]
    s = (q @ k.mT) * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    s = s.masked_fill(~mask[:, None], -math.inf)
    if softcap:
        y = torch.softmax(s, -1) @ v
    else:
        y = F.scaled_dot_product_attention(q, k, v, mask[:, None], scale=scale)
    y = torch.where(seen[..., None], y.nan_to_num(), 0)
    return y, torch.where(seen, torch.logsumexp(s, -1), -math.inf)


def make(
    b: int, h: int, g: int, n: int, m: int, d: int, e: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(b + 7 * h + 11 * n + 13 * m + 17 * d)
    make = lambda *s: torch.randn(*s, generator=gen, dtype=torch.float64).to(dtype)  # noqa: E731
    return make(b, h, n, d), make(b, g, m, d), make(b, g, m, e)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "left-padding": {"start": [0, 3, 9]},
    "ragged": {"length": [11, 8, 6]},
    "ragged-left-padding": {"start": [2, 0, 5], "length": [9, 11, 7]},
    "decode": {"n": 1, "start": [0, 4, 10]},
    "chunk-on-past": {"n": 3, "length": [11, 9, 5]},
    "window": {"window": 4},
    "window-1": {"window": 1, "start": [0, 2, 0]},
    "window-decode": {"n": 1, "window": 3, "length": [11, 4, 2]},
    "window-not-causal": {"window": 3, "causal": False},
    "not-causal": {"causal": False, "length": [11, 5, 9], "start": [0, 0, 4]},
    "softcap": {"softcap": 1.5},
    "softcap-window-padding": {"softcap": 0.7, "window": 5, "start": [1, 6, 0]},
    "mha": {"h": 3, "g": 3},
    "mqa": {"h": 6, "g": 1},
    "wide-value": {"d": 5, "e": 13},
    "narrow-value": {"d": 16, "e": 3},
    "capacity": {"m": 17, "length": [11, 6, 9]},
    "empty-row": {"length": [11, 0, 3], "n": 2},
    "one-key": {"n": 1, "m": 1, "length": [1, 1, 1]},
}


@pytest.mark.parametrize("form", ["op", "plain"])
@pytest.mark.parametrize("name", CASES)
def test_equals_sdpa(name: str, form: str) -> None:
    case = {"h": 4, "g": 2, "n": 11, "m": 11, "d": 7, "e": 7, "causal": True, "window": 0}
    case |= {"softcap": 0.0, **CASES[name]}
    n, m = case["n"], case["m"]
    start, length = case.get("start", [0, 0, 0]), case.get("length", [m, m, m])
    q, k, v = make(3, case["h"], case["g"], n, m, case["d"], case["e"])
    for b in range(3):  # nothing outside the valid rows may be read
        k[b, :, : start[b]] = v[b, :, : start[b]] = math.nan
        k[b, :, length[b] :] = v[b, :, length[b] :] = math.nan
    mask = mask_of(start, length, n, m, case["causal"], case["window"])
    want_y, want_lse = oracle(q, k, v, mask, 0.37, case["softcap"])
    function = attention if form == "op" else reference.attention
    y, lse = function(
        q,
        k,
        v,
        torch.tensor(start),
        torch.tensor(length, dtype=torch.int32),
        scale=0.37,
        causal=case["causal"],
        sliding_window=case["window"],
        softcap=case["softcap"],
    )
    assert y.shape == want_y.shape
    torch.testing.assert_close(y, want_y, rtol=0, atol=1e-13)
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-13)
    assert (lse == -math.inf).sum() == (~mask.any(-1)).sum() * case["h"]


@pytest.mark.parametrize("form", ["op", "plain"])
def test_paged_cache_equals_dense(form: str) -> None:
    q, k, v = make(2, 4, 2, 3, 10, 6, 5)
    page, table = 4, torch.tensor([[5, 2, 0], [3, 1, -7]], dtype=torch.int32)
    pages_k, pages_v = torch.full((6, 2, page, 6), math.nan), torch.full((6, 2, page, 5), math.nan)
    pages_k, pages_v = pages_k.double(), pages_v.double()
    start, length = [1, 0], [10, 7]
    for b in range(2):
        for j in range(length[b]):
            pages_k[table[b, j // page], :, j % page] = k[b, :, j]
            pages_v[table[b, j // page], :, j % page] = v[b, :, j]
    rows = (torch.tensor(start), torch.tensor(length))
    function = attention if form == "op" else reference.attention
    want = attention(q, k, v, *rows, scale=0.4)
    got = function(q, pages_k, pages_v, *rows, table, scale=0.4)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


def test_paged_gradient_lands_on_the_pages() -> None:
    q, k, v = make(2, 2, 2, 2, 8, 4, 4)
    table = torch.tensor([[3, 1], [0, 2]])
    pages_k = torch.zeros(4, 2, 4, 4, dtype=torch.float64)
    pages_v = torch.zeros(4, 2, 4, 4, dtype=torch.float64)
    for b in range(2):
        for j in range(8):
            pages_k[table[b, j // 4], :, j % 4] = k[b, :, j]
            pages_v[table[b, j // 4], :, j % 4] = v[b, :, j]
    rows = (torch.tensor([0, 2]), torch.tensor([8, 7]))
    pages = (pages_k.requires_grad_(), pages_v.requires_grad_())
    got = torch.autograd.grad(
        attention(q, *pages, *rows, table, scale=0.4)[0].square().sum(), pages
    )
    want = torch.autograd.grad(
        reference.attention(q, *pages, *rows, table, scale=0.4)[0].square().sum(), pages
    )
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
    assert got[0].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_is_computed_in_fp32(dtype: torch.dtype) -> None:
    q, k, v = make(2, 4, 2, 33, 40, 16, 16, dtype)
    rows = (torch.tensor([0, 5]), torch.tensor([40, 36]))
    y, lse = attention(q, k, v, *rows, scale=0.25)
    want_y, want_lse = attention(q.double(), k.double(), v.double(), *rows, scale=0.25)
    assert y.dtype == dtype
    assert lse.dtype == torch.float32
    assert want_lse.dtype == torch.float64
    tolerance = max(torch.finfo(dtype).eps * 4, 2e-6)  # one rounding of the result
    torch.testing.assert_close(y.double(), want_y, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), want_lse, rtol=2e-6, atol=2e-6)


def test_blocks_of_queries_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = make(2, 2, 1, 70, 90, 8, 8)
    rows = (torch.tensor([0, 40]), torch.tensor([85, 80]))
    want = reference.attention(q, k, v, *rows, scale=0.3, sliding_window=13)
    monkeypatch.setattr("reattend.kernels.blocked.SCORES_PER_BLOCK", 1)  # 16 queries per block
    got = attention(q, k, v, *rows, scale=0.3, sliding_window=13)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("options", [{}, {"softcap": 1.1, "sliding_window": 3}, {"causal": False}])
def test_gradcheck(options: dict[str, Any]) -> None:
    q, k, v = (x.requires_grad_() for x in make(2, 4, 2, 4, 6, 3, 2))
    rows = (torch.tensor([0, 3]), torch.tensor([6, 5]))

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        y, lse = attention(q, k, v, *rows, scale=0.6, **options)
        return y, lse.clamp(min=-1e3)  # gradcheck cannot subtract infinities

    assert torch.autograd.gradcheck(run, (q, k, v))


def test_gradient_ignores_garbage_in_unused_rows() -> None:
    q, k, v = make(2, 2, 1, 3, 9, 4, 4)
    k[:, :, 6:] = v[:, :, 6:] = math.nan
    rows = (torch.tensor([0, 4]), torch.tensor([6, 6]))
    for function in (attention, reference.attention):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        y, lse = function(*inputs, *rows, scale=0.6)
        (y.square().sum() + lse.clamp(min=-1e3).sum()).backward()
        assert all(torch.isfinite(x.grad).all() for x in inputs), function
        assert (inputs[1].grad[:, :, 6:] == 0).all()


def test_opcheck() -> None:
    q, k, v = (x.requires_grad_() for x in make(2, 4, 2, 3, 6, 8, 5, torch.float32))
    rows = (torch.tensor([0, 1]), torch.tensor([6, 5]))
    torch.library.opcheck(OP, (q, k, v, *rows), {"scale": 0.5, "softcap": 2.0})
    table = torch.tensor([[0], [1]])
    torch.library.opcheck(OP, (q, k, v, *rows, table), {"scale": 0.5, "sliding_window": 2})


class Layer(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, start: Tensor, length: Tensor) -> Tensor:
        return attention(q, k, v, start, length, scale=0.5, sliding_window=4)[0] * 2


def test_export_with_dynamic_dims() -> None:
    B, N, M = (torch.export.Dim(x, min=2, max=64) for x in ("B", "N", "M"))
    q, k, v = make(2, 4, 2, 3, 7, 8, 8, torch.float32)
    rows = (torch.tensor([0, 1]), torch.tensor([7, 5]))
    shapes = ({0: B, 2: N}, {0: B, 2: M}, {0: B, 2: M}, {0: B}, {0: B})
    program = torch.export.export(Layer(), (q, k, v, *rows), dynamic_shapes=shapes)
    assert [n.target for n in program.graph.nodes if "reattend" in str(n.target)] == [OP]
    q, k, v = make(3, 4, 2, 5, 11, 8, 8, torch.float32)
    rows = (torch.tensor([0, 1, 2]), torch.tensor([11, 5, 9]))
    for version in (program, program.run_decompositions()):
        got = version.module()(q, k, v, *rows)
        torch.testing.assert_close(got, Layer()(q, k, v, *rows), rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_fullgraph_with_gradient(backend: str) -> None:
    torch._dynamo.reset()
    layer = torch.compile(Layer(), fullgraph=True, backend=backend)
    q, k, v = (x.requires_grad_() for x in make(2, 4, 2, 3, 7, 8, 8, torch.float32))
    rows = (torch.tensor([0, 1]), torch.tensor([7, 5]))
    got, want = layer(q, k, v, *rows), Layer()(q, k, v, *rows)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    got_grad = torch.autograd.grad(got.square().sum(), (q, k, v))
    want_grad = torch.autograd.grad(want.square().sum(), (q, k, v))
    torch.testing.assert_close(got_grad, want_grad, rtol=1e-5, atol=1e-5)


def test_autocast_uses_the_dtype_of_the_region() -> None:
    q, k, v = make(2, 2, 1, 3, 5, 8, 8, torch.float32)
    rows = (torch.tensor([0, 0]), torch.tensor([5, 5]))
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            y, lse = attention(q, k.to(dtype), v, *rows, scale=0.5)
        assert (y.dtype, lse.dtype) == (dtype, torch.float32)
        torch.testing.assert_close(
            y, attention(q.to(dtype), k.to(dtype), v.to(dtype), *rows, scale=0.5)[0]
        )


def test_flops_are_counted() -> None:
    q, k, v = (x.requires_grad_() for x in make(2, 4, 2, 3, 7, 8, 5, torch.float32))
    rows = (torch.tensor([0, 1]), torch.tensor([7, 5]))
    with FlopCounterMode(display=False) as counter:
        attention(q, k, v, *rows, scale=0.5)[0].sum().backward()
    forward, backward = 2 * 2 * 4 * 3 * 7 * (8 + 5), 2 * 2 * 4 * 3 * 7 * (3 * 8 + 2 * 5)
    assert counter.get_total_flops() == forward + backward
    assert register.attention_flops.__doc__


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 3, 8)}, "multiple of the KV heads"),
        ({"q": torch.zeros(2, 4, 3, 6)}, "widths of q and k"),
        ({"q": torch.zeros(3, 4, 3, 8)}, "batches of q and k"),
        ({"v": torch.zeros(2, 2, 5, 8)}, "lengths of k and v"),
        ({"v": torch.zeros(2, 2, 7, 8, dtype=torch.float64)}, "one dtype"),
        ({"start": torch.zeros(3, dtype=torch.int64)}, "length of kv_start_B"),
        ({"length": torch.zeros(2)}, "int32 or int64"),
        ({"start": torch.zeros(2, dtype=torch.int64, device="meta")}, "device of the queries"),
        ({"sliding_window": -1}, "sliding_window and softcap"),
        ({"table": torch.zeros(2, dtype=torch.int64)}, "2-D int32 or int64"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    rows = torch.zeros(2, dtype=torch.int64)
    args = {
        "q": torch.zeros(2, 4, 3, 8),
        "k": torch.zeros(2, 2, 7, 8),
        "v": torch.zeros(2, 2, 7, 8),
    }
    args |= {"start": rows, "length": rows, "table": None}
    window = change.get("sliding_window", 0)
    args |= {key: value for key, value in change.items() if key in args}
    with pytest.raises(ArgumentError, match=message):
        attention(*args.values(), scale=1.0, sliding_window=window)
