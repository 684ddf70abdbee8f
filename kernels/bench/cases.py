"""The problems of the kernel benchmark: shapes, inputs, our call, torch's call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from reattend.kernels.attention import attention
from reattend.kernels.attention import reference as attention_reference
from reattend.kernels.latent_attention import latent_attention
from reattend.kernels.latent_attention import reference as latent_reference

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """One problem.

    Attributes:
        name: what it stands for.
        op: ``attention`` or ``latent_attention``.
        b: batch.
        h: query heads.
        g: KV heads (1 for latent).
        n: new tokens.
        m: cached tokens, the new ones included; the capacity is the same.
        d: head width, or latent rank.
        rope: rotary width (latent only).
    """

    name: str
    op: str
    b: int
    h: int
    g: int
    n: int
    m: int
    d: int
    rope: int = 0

    @property
    def flops(self) -> int:
        """Arithmetic of the visible half (causal): 2 per multiply-add, scores and average."""
        per_pair = 2 * (2 * self.d + self.rope)
        pairs = self.n * self.m - self.n * (self.n - 1) // 2
        return self.b * self.h * pairs * per_pair

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache at 2 bytes per number: what decode must read."""
        row = self.d + self.rope if self.op == "latent_attention" else 2 * self.g * self.d
        return 2 * self.b * self.m * row


SPEED = (
    Case("gqa prefill 4k", "attention", 1, 32, 8, 4096, 4096, 128),
    Case("gqa chunk on past", "attention", 1, 32, 8, 512, 16384, 128),
    Case("gqa decode 8k", "attention", 8, 32, 8, 1, 8192, 128),
    Case("gqa decode 32k", "attention", 1, 32, 8, 1, 32768, 128),
    Case("mla prefill 2k, 16 heads", "latent_attention", 1, 16, 1, 2048, 2048, 512, 64),
    Case("mla decode 8k, 16 heads", "latent_attention", 8, 16, 1, 1, 8192, 512, 64),
    Case("mla decode 8k, 128 heads", "latent_attention", 8, 128, 1, 1, 8192, 512, 64),
    Case("mla decode 32k, 128 heads", "latent_attention", 1, 128, 1, 1, 32768, 512, 64),
)
CORRECT = (
    Case("gqa prefill", "attention", 2, 8, 2, 133, 200, 128),
    Case("gqa prefill, narrow", "attention", 2, 4, 4, 70, 70, 40),
    Case("gqa prefill, wide", "attention", 1, 2, 1, 129, 129, 256),
    Case("gqa decode", "attention", 3, 8, 2, 1, 1111, 128),
    Case("gqa small chunk", "attention", 2, 8, 2, 5, 700, 64),
    Case("mla prefill", "latent_attention", 2, 16, 1, 65, 150, 512, 64),
    Case("mla prefill, odd rank", "latent_attention", 2, 3, 1, 50, 77, 48, 16),
    Case("mla prefill, no rope", "latent_attention", 2, 4, 1, 40, 77, 128, 0),
    Case("mla decode, 16 heads", "latent_attention", 3, 16, 1, 1, 1111, 512, 64),
    Case("mla decode, 128 heads", "latent_attention", 2, 128, 1, 1, 2100, 512, 64),
)
OPTIONS = ({}, {"sliding_window": 37, "softcap": 5.0}, {"causal": False})


def tensors(case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[Tensor, ...]:
    """Float inputs of the op of a case."""
    make = torch.Generator(device="cpu").manual_seed(seed)
    latent = case.op == "latent_attention"
    shapes: tuple[tuple[int, ...], ...]
    if latent:
        heads = (case.b, case.h, case.n)
        shapes = ((*heads, case.d), (*heads, case.rope), (case.b, case.m, case.d))
        shapes += ((case.b, case.m, case.rope),)
    else:
        cache = (case.b, case.g, case.m, case.d)
        shapes = ((case.b, case.h, case.n, case.d), cache, cache)
    return tuple(torch.randn(s, generator=make).to(device, dtype) for s in shapes)


def ours(case: Case, inputs: tuple[Tensor, ...], rows: tuple[Tensor, Tensor], scale: float) -> Call:
    """The call that is timed."""
    op = latent_attention if case.op == "latent_attention" else attention
    return lambda: op(*inputs, *rows, scale=scale)[0]


def torchs(case: Case, inputs: tuple[Tensor, ...], scale: float) -> Call:
    """Torch's SDPA on the same problem; the mask is omitted where no key is hidden.

    For a latent cache the shared row is one KV head of width r + R with value width r, which is
    how SDPA can express absorbed MLA (the concatenation is not timed).
    """
    if case.op == "latent_attention":
        q = torch.cat(inputs[:2], -1)
        k = torch.cat(inputs[2:], -1)[:, None]
        v = inputs[2][:, None]
    else:
        q, k, v = inputs
    mask = None
    if 1 < case.n < case.m:
        mask = torch.ones(case.n, case.m, dtype=torch.bool, device=q.device)
        mask = mask.tril(case.m - case.n)
    causal = case.n == case.m
    return lambda: F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=True
    )


def error_of(case: Case, dtype: torch.dtype, device: str, options: dict[str, float]) -> float:
    """Largest error of y and lse against the fp64 reference, in units of the allowed error.

    Rows are ragged and left-padded, unused rows hold NaN. Allowed: 4 roundings of the result in
    its dtype relative to the largest value, for lse 1e-3 (bf16 and fp16 products, fp32 sums).
    """
    inputs = tensors(case, dtype, device)
    start = torch.arange(case.b, device=device) * 3
    length = case.m - torch.arange(case.b, device=device) * 5
    caches = inputs[2:] if case.op == "latent_attention" else inputs[1:]
    for cache in caches:
        for b in range(case.b):
            cache[b, ..., : int(start[b]), :] = float("nan")
            cache[b, ..., int(length[b]) :, :] = float("nan")
    scale = (case.d + case.rope) ** -0.5
    latent = case.op == "latent_attention"
    op = latent_attention if latent else attention
    reference = latent_reference.latent_attention if latent else attention_reference.attention
    y, lse = op(*inputs, start, length, scale=scale, **options)
    want, want_lse = reference(*(x.double() for x in inputs), start, length, scale=scale, **options)
    y_error = (y.double() - want).abs().max() / want.abs().max()
    finite = torch.isfinite(want_lse)
    if not torch.equal(torch.isfinite(lse), finite) or not torch.isfinite(y).all():
        return float("inf")
    lse_error = (lse.double() - want_lse)[finite].abs().max()
    lse_limit = 1e-3 if dtype != torch.float32 else 1e-5
    y_limit = 4 * max(torch.finfo(dtype).eps, 1e-6)
    return float(torch.maximum(y_error / y_limit, lse_error / lse_limit))
