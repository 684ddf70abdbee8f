"""Are the kernels of attention and latent attention right? Checked before anything is timed.

Rows are ragged and left-padded, unused rows of the cache hold NaN, uninitialised memory holds NaN
(an output that nobody writes is seen), one row of every batch of three is empty. Every case runs
in three dtypes and with several option sets and layouts, against the op's own formula in fp64 and
against torch's SDPA in fp64, which knows nothing of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from cases import Case
from torch import Tensor

from reattend.kernels.attention import attention
from reattend.kernels.attention import reference as attention_reference
from reattend.kernels.latent_attention import latent_attention
from reattend.kernels.latent_attention import reference as latent_reference

Op = Callable[..., tuple[Tensor, Tensor]]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"sliding_window": 37, "softcap": 5.0},
    {"causal": False},
    {"layout": "transposed"},
    {"layout": "paged"},
)
CORRECT = (
    Case("gqa prefill", "attention", 2, 8, 2, 133, 200, 128),
    Case("gqa prefill, width 32", "attention", 3, 4, 4, 70, 70, 32),
    Case("gqa prefill, width 40", "attention", 2, 4, 4, 70, 70, 40),
    Case("gqa prefill, width 64", "attention", 2, 4, 2, 300, 300, 64),
    Case("gqa prefill, width 80", "attention", 2, 4, 2, 97, 97, 80),
    Case("gqa prefill, width 96", "attention", 2, 4, 1, 65, 161, 96),
    Case("gqa prefill, width 256", "attention", 1, 2, 1, 129, 129, 256),
    Case("gqa decode", "attention", 3, 8, 2, 1, 1111, 128),
    Case("gqa decode, width 80", "attention", 3, 32, 4, 1, 999, 80),
    Case("gqa decode, width 256", "attention", 3, 8, 2, 1, 517, 256),
    Case("gqa small chunk", "attention", 3, 8, 2, 5, 700, 64),
    Case("mqa small chunk", "attention", 2, 24, 1, 16, 333, 128),
    Case("mla prefill", "latent_attention", 2, 16, 1, 65, 150, 512, 64),
    Case("mla prefill, rank 256", "latent_attention", 2, 8, 1, 65, 150, 256, 32),
    Case("mla prefill, odd rank", "latent_attention", 2, 3, 1, 50, 77, 48, 16),
    Case("mla prefill, no rope", "latent_attention", 2, 4, 1, 40, 77, 128, 0),
    Case("mla decode, 16 heads", "latent_attention", 3, 16, 1, 1, 1111, 512, 64),
    Case("mla decode, 128 heads", "latent_attention", 3, 128, 1, 1, 2100, 512, 64),
    Case("mla decode, rank 200", "latent_attention", 3, 32, 1, 2, 701, 200, 48),
)
Job = tuple[Case, torch.dtype, dict[str, Any]]


def tensors(case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[Tensor, ...]:
    """Float inputs of the op of a case."""
    make = torch.Generator(device=device).manual_seed(seed)
    shapes: tuple[tuple[int, ...], ...]
    if case.op == "latent_attention":
        heads = (case.b, case.h, case.n)
        shapes = ((*heads, case.d), (*heads, case.rope), (case.b, case.m, case.d))
        shapes += ((case.b, case.m, case.rope),)
    else:
        cache = (case.b, case.g, case.m, case.d)
        shapes = ((case.b, case.h, case.n, case.d), cache, cache)
    return tuple(torch.randn(s, generator=make, device=device).to(dtype) for s in shapes)


def jobs(cases: tuple[Case, ...] = CORRECT) -> Iterator[Job]:
    """Every case in every dtype with every option set; fp16, which compiles like bf16, with one."""
    for job in product(cases, DTYPES, OPTIONS):
        if job[1] != torch.float16 or not job[2]:
            yield job


def title(job: Job) -> str:
    """How a job is listed."""
    case, dtype, options = job
    return f"{case.name}, {str(dtype)[6:]}, {options or 'causal'}"


def transposed(x: Tensor) -> Tensor:
    """The same values with heads inside tokens, between other numbers: nothing is contiguous."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 8), float("nan"), dtype=x.dtype).to(x.device)
    if x.dim() == 4:
        wide = wide.transpose(1, 2).contiguous().transpose(1, 2)
    view = wide[..., : x.shape[-1]]
    view.copy_(x)
    return view


def paged(
    caches: tuple[Tensor, ...], page: int = 16, make: torch.Generator | None = None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The same rows in pages that lie in a random order, and the block table."""
    b, m = caches[0].shape[0], caches[0].shape[-2]
    count = -(-m // page)
    order = torch.randperm(b * count, generator=make, device=caches[0].device)
    found = []
    for cache in caches:
        whole = cache.new_full((*cache.shape[:-2], count * page, cache.shape[-1]), float("nan"))
        whole[..., :m, :] = cache
        split = whole.unflatten(-2, (count, page)).movedim(-3, 1).flatten(0, 1)
        found.append(torch.empty_like(split).index_copy_(0, order, split))
    return tuple(found), order.view(b, count).to(torch.int32)


def ops_of(case: Case) -> tuple[Op, Op]:
    """The op and its reference."""
    if case.op == "latent_attention":
        return latent_attention, latent_reference.latent_attention
    return attention, attention_reference.attention


def rows_of(b: int, m: int, device: str) -> tuple[Tensor, Tensor]:
    """First and past-the-last key of each of b rows; the third row of a batch is empty."""
    start = torch.arange(b, device=device) * 3
    length = m - torch.arange(b, device=device) * 5
    if b > 2:
        length[2] = start[2]
    return start, length


def error_of(case: Case, dtype: torch.dtype, device: str, options: dict[str, Any]) -> float:
    """Largest error of y and lse against the fp64 reference, in units of the allowed error.

    Allowed: 4 roundings of the result in its dtype relative to the largest value, for lse 1e-3
    (1e-5 in fp32).
    """
    options = dict(options)
    layout = options.pop("layout", "plain")
    inputs = tensors(case, dtype, device)
    start, length = rows_of(case.b, case.m, device)
    latent = case.op == "latent_attention"
    for cache in inputs[2:] if latent else inputs[1:]:
        for b in range(case.b):
            cache[b, ..., : int(start[b]), :] = float("nan")
            cache[b, ..., int(length[b]) :, :] = float("nan")
    scale = (case.d + case.rope) ** -0.5
    op, reference = ops_of(case)
    given, table = inputs, None
    if layout == "transposed":
        given = tuple(transposed(x) for x in inputs)
    elif layout == "paged":
        new = 2 if latent else 1
        pages, table = paged(inputs[new:])
        given = (*inputs[:new], *pages)
    y, lse = op(*given, start, length, table, scale=scale, **options)
    wide = tuple(x.double() for x in inputs)
    want, want_lse = reference(*wide, start, length, scale=scale, **options)
    error = compared(y, lse, want, want_lse, dtype)
    if options.get("softcap"):  # SDPA has none
        return error
    keys = slice(int(start[0]), int(length[0]))
    other = second_oracle(case, wide, keys, scale, options)
    seen = torch.isfinite(want_lse[0])
    apart = (y[0].double() - other)[seen].abs().max() / want.abs().max()
    return max(error, float(apart) / y_limit(dtype))


def second_oracle(
    case: Case, wide: tuple[Tensor, ...], keys: slice, scale: float, options: dict[str, Any]
) -> Tensor:
    """The first row of the batch by torch's SDPA in fp64, [H, N, e]."""
    if case.op == "latent_attention":
        q, k = torch.cat(wide[:2], -1), torch.cat(wide[2:], -1)[:, None]
        v = wide[2][:, None]
    else:
        q, k, v = wide
    repeat = q.shape[1] // k.shape[1]
    k, v = (x[:1, :, keys].repeat_interleave(repeat, 1) for x in (k, v))
    pos = keys.stop - case.n + torch.arange(case.n, device=q.device)[:, None]
    j = torch.arange(keys.start, keys.stop, device=q.device)
    seen = torch.ones(case.n, len(j), dtype=torch.bool, device=q.device)
    if options.get("causal", True):
        seen &= j <= pos
    if options.get("sliding_window"):
        seen &= pos - j < options["sliding_window"]
    return F.scaled_dot_product_attention(q[:1], k, v, seen, scale=scale)[0]


def y_limit(dtype: torch.dtype) -> float:
    """Allowed error of an output relative to the largest value."""
    return 4 * max(torch.finfo(dtype).eps, 1e-6)


def compared(y: Tensor, lse: Tensor, want: Tensor, want_lse: Tensor, dtype: torch.dtype) -> float:
    """Error in units of the allowed one; infinite where NaN or unseen rows disagree."""
    finite = torch.isfinite(want_lse)
    if not torch.equal(torch.isfinite(lse), finite) or not torch.isfinite(y).all():
        return float("inf")
    y_error = (y.double() - want).abs().max() / want.abs().max()
    lse_error = (lse.double() - want_lse)[finite].abs().max()
    lse_limit = 1e-3 if dtype != torch.float32 else 1e-5
    return float(torch.maximum(y_error / y_limit(dtype), lse_error / lse_limit))
