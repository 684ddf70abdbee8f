"""`reattend::sparse_attention` against torch's own SDPA with an explicit mask, in fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sparse_layouts import PATTERNS, mask_of
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.flop_counter import FlopCounterMode

from reattend.errors import ArgumentError
from reattend.kernels.sparse_attention import BlockLayout, reference, sparse_attention

OP = torch.ops.reattend.sparse_attention.default


def layout_of(
    pattern: str, heads: int, group: int, n: int, block: int = 16, first: int = 0
) -> tuple[BlockLayout, Tensor]:
    """A layout of three head classes, and the mask (H, n, n) it was compiled from."""
    mask = mask_of(pattern, n)
    head_layout = torch.arange(heads) // group % len(mask)
    part = mask[:, first * block :]
    return BlockLayout.from_mask(part, head_layout, block, first=first), mask[head_layout]


def oracle(
    q: Tensor, k: Tensor, v: Tensor, mask_BHNM: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """SDPA in fp64 (softcap: by hand, SDPA has none), rows that see nothing replaced."""
    repeat = q.shape[1] // k.shape[1]
    k, v = (x.nan_to_num().repeat_interleave(repeat, 1) for x in (k, v))
    seen = mask_BHNM.any(-1)
    s = (q @ k.mT) * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    s = s.masked_fill(~mask_BHNM, -math.inf)
    if softcap:
        y = torch.softmax(s, -1) @ v
    else:
        y = F.scaled_dot_product_attention(q, k, v, mask_BHNM, scale=scale)
    y = torch.where(seen[..., None], y.nan_to_num(), 0)
    return y, torch.where(seen, torch.logsumexp(s, -1), -math.inf)


def make(
    b: int, h: int, g: int, n: int, m: int, d: int, e: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(b + 7 * h + 11 * n + 13 * m + 17 * d)
    draw = lambda *s: torch.randn(*s, generator=gen, dtype=torch.float64).to(dtype)  # noqa: E731
    return draw(b, h, n, d), draw(b, g, m, d), draw(b, g, m, e)


def stored_mask(mask_HTT: Tensor, start: list[int], length: list[int], n: int, m: int) -> Tensor:
    """Logical mask -> (B, H, n, m) over storage rows, spelled query by query."""
    out = torch.zeros(len(start), mask_HTT.shape[0], n, m, dtype=torch.bool)
    for b, (begin, end) in enumerate(zip(start, length, strict=True)):
        for i in range(n):
            pos = end - begin - n + i
            if pos >= 0:
                out[b, :, i, begin:end] = mask_HTT[:, pos, : end - begin]
    return out


CASES: dict[str, dict[str, Any]] = {
    **{pattern: {"pattern": pattern} for pattern in PATTERNS},
    "block-32": {"block": 32},
    "block-64": {"block": 64, "t": 130},
    "whole-blocks": {"t": 64},
    "mha": {"g": 6},
    "mqa": {"g": 1},
    "heads-of-a-group-differ": {"g": 2, "group": 1},
    "softcap": {"softcap": 1.5},
    "wide-value": {"d": 5, "e": 13},
    "left-padding": {"start": [0, 3, 40], "m": 90, "length": [61, 64, 90]},
    "ragged": {"length": [61, 33, 8]},
    "capacity": {"m": 99, "start": [1, 0, 7], "length": [62, 50, 68]},
    "decode": {"n": 1, "start": [0, 4, 45], "length": [61, 61, 61]},
    "chunk-on-past": {"n": 20, "start": [0, 2, 5], "first": 2},
    "last-row-only": {"n": 3, "first": 3},
    "padded-queries": {"n": 61, "start": [0, 50, 61]},
    "empty-row": {"n": 2, "length": [61, 0, 1]},
}


@pytest.mark.parametrize("form", ["op", "plain"])
@pytest.mark.parametrize("name", CASES)
def test_equals_sdpa(name: str, form: str) -> None:
    case = {"h": 6, "g": 3, "t": 61, "d": 7, "e": 7, "block": 16, "first": 0, "softcap": 0.0}
    case |= {"pattern": "sinks-and-window", **CASES[name]}
    m = case.get("m", case["t"])
    n, h, g = case.get("n", case["t"]), case["h"], case["g"]
    start, length = case.get("start", [0, 0, 0]), case.get("length", [case["t"]] * 3)
    layout, mask = layout_of(
        case["pattern"], h, case.get("group", h // g), case["t"], case["block"], case["first"]
    )
    q, k, v = make(3, h, g, n, m, case["d"], case["e"])
    for b in range(3):  # nothing outside the valid rows may be read
        k[b, :, : start[b]] = v[b, :, : start[b]] = math.nan
        k[b, :, length[b] :] = v[b, :, length[b] :] = math.nan
    mask = stored_mask(mask, start, length, n, m)
    want_y, want_lse = oracle(q, k, v, mask, 0.37, case["softcap"])
    function = sparse_attention if form == "op" else reference.sparse_attention
    rows = (torch.tensor(start), torch.tensor(length, dtype=torch.int32))
    scalars = (layout.block, layout.first, 0.37, case["softcap"])
    y, lse = function(q, k, v, *layout.tensors, *rows, *scalars)
    torch.testing.assert_close(y, want_y, rtol=0, atol=1e-13)
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-13)
    assert (lse == -math.inf).sum() == (~mask.any(-1)).sum()
    assert mask.any()


def run(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, **options: Any) -> Any:
    rows = (torch.zeros(len(q), dtype=torch.int64), torch.full((len(q),), k.shape[2]))
    options = {"block": layout.block, "first": layout.first, "scale": 0.3, **options}
    return sparse_attention(q, k, v, *layout.tensors, *rows, **options)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("pattern", ["random", "sinks-and-window", "vision"])
def test_equals_flex_attention(pattern: str) -> None:
    """A second oracle: torch's FlexAttention, its block mask made from the predicate alone."""
    layout, mask = layout_of(pattern, 6, 2, 150, 32)
    q, k, v = make(2, 6, 3, 150, 150, 16, 16, torch.float32)
    blocks = create_block_mask(lambda b, h, i, j: mask[h, i, j], None, 6, 150, 150, device="cpu")
    want = flex_attention(q, k, v, block_mask=blocks, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(run(q, k, v, layout)[0], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_is_computed_in_fp32(dtype: torch.dtype) -> None:
    layout, _ = layout_of("sinks-and-window", 6, 2, 75)
    q, k, v = make(2, 6, 3, 75, 75, 16, 16, dtype)
    y, lse = run(q, k, v, layout)
    want_y, want_lse = run(q.double(), k.double(), v.double(), layout)
    assert (y.dtype, lse.dtype, want_lse.dtype) == (dtype, torch.float32, torch.float64)
    tolerance = max(torch.finfo(dtype).eps * 4, 2e-6)  # one rounding of the result
    torch.testing.assert_close(y.double(), want_y, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), want_lse, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("pattern", ["random", "sinks-and-window", "causal"])
def test_small_steps_do_not_change_the_result(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, _ = layout_of(pattern, 4, 2, 170)
    q, k, v = make(2, 4, 2, 170, 170, 8, 8)
    want = run(q, k, v, layout)
    package = "reattend.kernels.sparse_attention"
    monkeypatch.setattr(f"{package}.blocked.SCORES_PER_STEP", 3000)
    monkeypatch.setattr(f"{package}.blocked.SCORES_OF_A_RUN", 1)  # keys without gathering
    monkeypatch.setattr(f"{package}.schedule.ITEMS", 3)
    torch.testing.assert_close(run(q, k, v, layout), want, rtol=0, atol=1e-13)


def test_strided_inputs() -> None:
    layout, _ = layout_of("sinks-and-window", 6, 2, 61)
    q, k, v = make(2, 6, 3, 61, 61, 8, 8)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert not strided[0].is_contiguous()
    torch.testing.assert_close(run(*strided, layout), run(q, k, v, layout), rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"softcap": 1.1}])
def test_gradcheck(options: dict[str, Any]) -> None:
    layout, mask = layout_of("random", 2, 1, 21)
    q, k, v = (x.requires_grad_() for x in make(2, 2, 1, 21, 21, 3, 2))
    rows = (torch.tensor([0, 4]), torch.tensor([21, 18]))

    def one(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        y, lse = sparse_attention(q, k, v, *layout.tensors, *rows, 16, 0, 0.6, **options)
        return y, lse.clamp(min=-1e3)  # gradcheck cannot subtract infinities

    assert not mask.any(-1).all()
    assert torch.autograd.gradcheck(one, (q, k, v), fast_mode=True)


def test_gradient_ignores_garbage_in_unused_rows() -> None:
    layout, _ = layout_of("sinks-and-window", 2, 1, 40)
    q, k, v = make(2, 2, 1, 40, 50, 4, 4)
    k[:, :, 40:] = v[:, :, 40:] = math.nan
    k[1, :, :5] = v[1, :, :5] = math.nan
    rows = (torch.tensor([0, 5]), torch.tensor([40, 40]))
    grads = []
    for function in (sparse_attention, reference.sparse_attention):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        y, lse = function(*inputs, *layout.tensors, *rows, 16, 0, 0.6)
        (y.square().sum() + lse.clamp(min=-1e3).sum()).backward()
        grads.append([x.grad for x in inputs])
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-12)
    assert all(torch.isfinite(x).all() for x in grads[0])
    assert (grads[0][1][:, :, 40:] == 0).all()


def test_opcheck() -> None:
    layout, _ = layout_of("random", 4, 2, 37)
    q, k, v = (x.requires_grad_() for x in make(2, 4, 2, 37, 37, 8, 5, torch.float32))
    rows = (torch.tensor([0, 1]), torch.tensor([37, 35]))
    torch.library.opcheck(OP, (q, k, v, *layout.tensors, *rows, 16, 0, 0.5, 2.0))


class Layer(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        return sparse_attention(q, k, v, *rest, 16, 0, 0.5)[0] * 2


def test_export_with_dynamic_dims() -> None:
    B, N, M, P, E, T = (torch.export.Dim(x, min=2, max=999) for x in "BNMPET")
    layout_shapes = ({1: P}, {0: E}, {0: E}, {0: T}, {})
    shapes = ({0: B, 2: N}, {0: B, 2: M}, {0: B, 2: M}, (*layout_shapes, {0: B}, {0: B}))

    def inputs(b: int, t: int) -> tuple[Tensor, ...]:
        layout, _ = layout_of("random", 4, 2, t)
        rows = (torch.arange(b), torch.full((b,), t))
        return *make(b, 4, 2, t, t, 8, 8, torch.float32), *layout.tensors, *rows

    program = torch.export.export(Layer(), inputs(2, 37), dynamic_shapes=shapes)
    assert [n.target for n in program.graph.nodes if "reattend" in str(n.target)] == [OP]
    given = inputs(3, 70)
    for version in (program, program.run_decompositions()):
        torch.testing.assert_close(version.module()(*given), Layer()(*given), rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_fullgraph_with_gradient(backend: str) -> None:
    torch._dynamo.reset()
    layer = torch.compile(Layer(), fullgraph=True, backend=backend)
    layout, _ = layout_of("random", 4, 2, 37)
    q, k, v = (x.requires_grad_() for x in make(2, 4, 2, 37, 37, 8, 8, torch.float32))
    rest = (*layout.tensors, torch.tensor([0, 1]), torch.tensor([37, 35]))
    got, want = layer(q, k, v, *rest), Layer()(q, k, v, *rest)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    got_grad = torch.autograd.grad(got.square().sum(), (q, k, v))
    want_grad = torch.autograd.grad(want.square().sum(), (q, k, v))
    torch.testing.assert_close(got_grad, want_grad, rtol=1e-5, atol=1e-5)


def test_autocast_uses_the_dtype_of_the_region() -> None:
    layout, _ = layout_of("random", 4, 2, 37)
    q, k, v = make(2, 4, 2, 37, 37, 8, 8, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, lse = run(q, k.bfloat16(), v, layout)
    assert (y.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    want = run(q.bfloat16(), k.bfloat16(), v.bfloat16(), layout)
    torch.testing.assert_close((y, lse), want, rtol=0, atol=0)


def test_flops_are_those_of_the_blocks_read() -> None:
    layout, _ = layout_of("sinks-and-window", 4, 4, 64)  # one layout of the three is used
    layout = BlockLayout.from_mask(mask_of("sinks-and-window", 64)[:1], layout.head_layout * 0, 16)
    q, k, v = (x.requires_grad_() for x in make(2, 4, 2, 64, 64, 8, 5, torch.float32))
    with FlopCounterMode(display=False) as counter:
        run(q, k, v, layout)[0].sum().backward()
    pairs = 2 * 4 * len(layout.col) * 16 * 16
    assert counter.get_total_flops() == 2 * pairs * (8 + 5) + 2 * pairs * (3 * 8 + 2 * 5)


LAYOUT, _ = layout_of("causal", 4, 2, 37)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 37, 8)}, "multiple of the KV heads"),
        ({"q": torch.zeros(2, 2, 37, 8)}, "heads of the layout"),
        ({"q": torch.zeros(3, 4, 37, 8)}, "batches of q and k"),
        ({"v": torch.zeros(2, 2, 37, 8, dtype=torch.float64)}, "one dtype"),
        ({"start": torch.zeros(3, dtype=torch.int64)}, "length of kv_start_B"),
        ({"tile": LAYOUT.tile[1:]}, "col and tile"),
        ({"col": LAYOUT.col.long()}, "col must be a 1-D torch.int32"),
        ({"tiles": LAYOUT.tiles[:, 1:]}, "one number per query"),
        ({"block": 48}, "block must be one of"),
        ({"first": -1}, "first must not be negative"),
        ({"first": 1}, "queries lie outside of the layout"),
        ({"length": torch.tensor([37, 60])}, "queries lie outside of the layout"),
        ({"softcap": -1.0}, "softcap"),
        ({name: x.to("meta") for name, x in vars(LAYOUT).items() if isinstance(x, Tensor)},
         "device of the queries"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    names = ("row_ptr", "col", "tile", "tiles", "head_layout")
    args = dict(zip("qkv", make(2, 4, 2, 37, 37, 8, 8, torch.float32), strict=True))
    args |= dict(zip(names, LAYOUT.tensors, strict=True))
    args |= {"start": torch.zeros(2, dtype=torch.int64), "length": torch.tensor([37, 37])}
    args |= {"block": 16, "first": 0, "scale": 1.0, "softcap": 0.0, **change}
    with pytest.raises(ArgumentError, match=message):
        sparse_attention(*args.values())
