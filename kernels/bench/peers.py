"""What the kernels are compared with, on the same device in the same run.

- ``flash``, ``cudnn``: torch's SDPA with that backend, on the same problem (attention only).
- ``flex``: FlexAttention compiled by inductor, on the same problem.
- ``flash, equal FLOPs`` (latent prefill): SDPA flash at head width 128 with as many heads as make
  the arithmetic the same. SDPA has no fast kernel for rows as wide as a latent's.
- ``original MHA`` and ``original 8 KV heads`` (latent decode): SDPA decode, by either backend, of
  the cache that a converted model had, at the same batch and length, heads of width 128.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from cases import Case, tensors
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

WIDTH = 128  # heads of the models that conversions start from
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
Call = Callable[[], Any]
Make = Callable[[tuple[Tensor, ...]], Call]


@dataclass(frozen=True)
class Peer:
    """Another implementation.

    Attributes:
        name: column of the table.
        case: the problem it solves.
        make: from the inputs of that problem to the call that is timed.
    """

    name: str
    case: Case
    make: Make


def sdpa(case: Case, backend: str) -> Make:
    """SDPA on an attention problem with one backend forced."""
    mask = None
    if 1 < case.n < case.m:
        mask = causal_lower_right(case.n, case.m)

    def make(inputs: tuple[Tensor, ...]) -> Call:
        q, k, v = inputs

        def call() -> Tensor:
            with sdpa_kernel([BACKENDS[backend]]):
                return F.scaled_dot_product_attention(
                    q, k, v, mask, is_causal=case.n == case.m, enable_gqa=case.h != case.g
                )

        return call

    return make


def flex(case: Case) -> Make:
    """FlexAttention on either op's problem (for a latent: one KV head of width r + R)."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    past = case.m - case.n

    def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= i + past

    mask = create_block_mask(causal, None, None, case.n, case.m) if case.n > 1 else None

    def make(inputs: tuple[Tensor, ...]) -> Call:
        if case.op == "latent_attention":
            q, k = torch.cat(inputs[:2], -1), torch.cat(inputs[2:], -1)[:, None]
            v = inputs[2][:, None]
        else:
            q, k, v = inputs
        return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=case.h != case.g)

    return make


def original(case: Case, groups: int) -> Case:
    """The attention problem a latent decode replaces."""
    return replace(case, name=f"original of {case.name}", op="attention", g=groups, d=WIDTH, rope=0)


def equal_flops(case: Case) -> Case:
    """Attention with heads of width 128 and the arithmetic of a latent prefill."""
    heads = round(case.h * (2 * case.d + case.rope) / (2 * WIDTH))
    return replace(
        case, name=f"flops of {case.name}", op="attention", h=heads, g=heads, d=WIDTH, rope=0
    )


def peers(case: Case, with_flex: bool) -> Sequence[Peer]:
    """Every peer of a case."""
    found = []
    if case.op == "attention":
        found = [Peer(name, case, sdpa(case, name)) for name in BACKENDS]
    elif case.decodes:
        whole = original(case, case.h)
        found = [Peer(f"{name}, original MHA", whole, sdpa(whole, name)) for name in BACKENDS]
        if case.h > 8:
            some = original(case, 8)
            found += [Peer(f"{n}, original 8 KV heads", some, sdpa(some, n)) for n in BACKENDS]
    else:
        same = equal_flops(case)
        found = [Peer("flash, equal FLOPs", same, sdpa(same, "flash"))]
        found.append(Peer("cudnn, equal FLOPs", same, sdpa(same, "cudnn")))
    if with_flex:
        found.append(Peer("flex", case, flex(case)))
    return found


def inputs_of(peer: Peer, sets: int) -> list[tuple[Tensor, ...]]:
    """Input sets of a peer's problem."""
    return [tensors(peer.case, torch.bfloat16, "cuda", seed) for seed in range(sets)]
