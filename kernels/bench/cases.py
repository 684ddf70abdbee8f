"""The problems of the kernel benchmark: shapes, inputs, our call, torch's call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from reattend.kernels.attention import attention
from reattend.kernels.configs import DECODE_QUERIES
from reattend.kernels.latent_attention import latent_attention

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
    def decodes(self) -> bool:
        """Whether the decode kernel runs it."""
        return self.n <= DECODE_QUERIES

    @property
    def kernel(self) -> str:
        """Op, phase and width class, as the sweep's grid lists them."""
        op = "latent" if self.op == "latent_attention" else "attention"
        classes = (128, 256, 512) if op == "latent" else (64, 128, 256)
        width = min(w for w in classes if w >= self.d)
        return f"{op} {'decode' if self.decodes else 'prefill'} {width}"

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
    Case("gqa prefill 16k", "attention", 1, 32, 8, 16384, 16384, 128),
    Case("mha prefill 4k", "attention", 1, 32, 32, 4096, 4096, 128),
    Case("gqa prefill 4k, width 64", "attention", 1, 32, 8, 4096, 4096, 64),
    Case("gqa prefill 4k, width 256", "attention", 1, 16, 4, 4096, 4096, 256),
    Case("gqa 512 new on 16k", "attention", 1, 32, 8, 512, 16384, 128),
    Case("gqa decode 8k, batch 8", "attention", 8, 32, 8, 1, 8192, 128),
    Case("gqa decode 32k, batch 1", "attention", 1, 32, 8, 1, 32768, 128),
    Case("mha decode 8k, batch 8", "attention", 8, 32, 32, 1, 8192, 128),
    Case("mla prefill 4k, 16 heads", "latent_attention", 1, 16, 1, 4096, 4096, 512, 64),
    Case("mla prefill 4k, 32 heads, rank 256", "latent_attention", 1, 32, 1, 4096, 4096, 256, 64),
    Case("mla decode 8k, batch 8, 16 heads", "latent_attention", 8, 16, 1, 1, 8192, 512, 64),
    Case("mla decode 8k, batch 8, 32 heads", "latent_attention", 8, 32, 1, 1, 8192, 512, 64),
    Case("mla decode 8k, batch 8, 128 heads", "latent_attention", 8, 128, 1, 1, 8192, 512, 64),
    Case("mla decode 8k, batch 64, 16 heads", "latent_attention", 64, 16, 1, 1, 8192, 512, 64),
    Case("mla decode 8k, batch 64, 32 heads", "latent_attention", 64, 32, 1, 1, 8192, 512, 64),
    Case("mla decode 32k, batch 1, 128 heads", "latent_attention", 1, 128, 1, 1, 32768, 512, 64),
    Case("mla decode 128k, batch 8, 16 heads", "latent_attention", 8, 16, 1, 1, 131072, 512, 64),
    Case(
        "mla decode 8k, batch 64, 32 heads, rank 256",
        "latent_attention",
        64,
        32,
        1,
        1,
        8192,
        256,
        64,
    ),
)
SWEEP = (
    Case("gqa prefill 4k d128", "attention", 1, 32, 8, 4096, 4096, 128),
    Case("gqa prefill 16k d128", "attention", 1, 32, 8, 16384, 16384, 128),
    Case("gqa prefill 4k d64", "attention", 1, 32, 8, 4096, 4096, 64),
    Case("gqa prefill 4k d256", "attention", 1, 16, 4, 4096, 4096, 256),
    Case("gqa decode 8k b8 d128", "attention", 8, 32, 8, 1, 8192, 128),
    Case("gqa decode 32k b1 d128", "attention", 1, 32, 8, 1, 32768, 128),
    Case("mha decode 8k b8 d128", "attention", 8, 32, 32, 1, 8192, 128),
    Case("gqa decode 8k b8 d64", "attention", 8, 32, 8, 1, 8192, 64),
    Case("gqa decode 8k b8 d256", "attention", 8, 16, 4, 1, 8192, 256),
    Case("mla prefill 4k h16 r512", "latent_attention", 1, 16, 1, 4096, 4096, 512, 64),
    Case("mla prefill 4k h32 r256", "latent_attention", 1, 32, 1, 4096, 4096, 256, 64),
    Case("mla decode 8k b8 h16 r512", "latent_attention", 8, 16, 1, 1, 8192, 512, 64),
    Case("mla decode 8k b8 h32 r512", "latent_attention", 8, 32, 1, 1, 8192, 512, 64),
    Case("mla decode 8k b8 h128 r512", "latent_attention", 8, 128, 1, 1, 8192, 512, 64),
    Case("mla decode 8k b64 h16 r512", "latent_attention", 64, 16, 1, 1, 8192, 512, 64),
    Case("mla decode 8k b64 h32 r512", "latent_attention", 64, 32, 1, 1, 8192, 512, 64),
    Case("mla decode 8k b64 h32 r256", "latent_attention", 64, 32, 1, 1, 8192, 256, 64),
    Case("mla decode 32k b1 h128 r512", "latent_attention", 1, 128, 1, 1, 32768, 512, 64),
    Case("mla decode 128k b8 h16 r512", "latent_attention", 8, 16, 1, 1, 131072, 512, 64),
    Case("mla prefill 4k h32 r128", "latent_attention", 1, 32, 1, 4096, 4096, 128, 64),
    Case("mla decode 8k b8 h128 r256", "latent_attention", 8, 128, 1, 1, 8192, 256, 64),
    Case("mla decode 8k b8 h16 r256", "latent_attention", 8, 16, 1, 1, 8192, 256, 64),
    Case("mla decode 8k b8 h32 r128", "latent_attention", 8, 32, 1, 1, 8192, 128, 64),
    Case("mla decode 8k b8 h32 r256", "latent_attention", 8, 32, 1, 1, 8192, 256, 64),
)


def tensors(case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[Tensor, ...]:
    """Float inputs of the op of a case."""
    make = torch.Generator(device=device).manual_seed(seed)
    latent = case.op == "latent_attention"
    shapes: tuple[tuple[int, ...], ...]
    if latent:
        heads = (case.b, case.h, case.n)
        shapes = ((*heads, case.d), (*heads, case.rope), (case.b, case.m, case.d))
        shapes += ((case.b, case.m, case.rope),)
    else:
        cache = (case.b, case.g, case.m, case.d)
        shapes = ((case.b, case.h, case.n, case.d), cache, cache)
    return tuple(torch.randn(s, generator=make, device=device).to(dtype) for s in shapes)


def bytes_of(case: Case) -> int:
    """Bytes every input of a case read once and its output written once, 2 per number."""
    new = case.b * case.h * case.n * (2 * case.d + case.rope)
    return case.cache_bytes + 2 * new


def ours(case: Case, inputs: tuple[Tensor, ...], rows: tuple[Tensor, Tensor], scale: float) -> Call:
    """The call that is timed."""
    op = latent_attention if case.op == "latent_attention" else attention
    return lambda: op(*inputs, *rows, scale=scale)[0]


def case_calls(case: Case, sets: int) -> list[Call]:
    """Our op on each of several input sets."""
    scale = (case.d + case.rope) ** -0.5
    start = torch.zeros(case.b, dtype=torch.int64, device="cuda")
    rows = (start, start + case.m)
    made = (tensors(case, torch.bfloat16, "cuda", seed) for seed in range(sets))
    return [ours(case, inputs, rows, scale) for inputs in made]


def compile_case(case: Case) -> None:
    """In a worker: run once, which leaves the compiled kernel on disk."""
    case_calls(case, 1)[0]()
