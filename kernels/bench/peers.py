"""What the kernels are compared with, on the same device in the same run.

- ``flash``, ``cudnn``: torch's SDPA with that backend; on the same problem, of sparse and routed
  attention without a pattern: dense.
- ``masked``: SDPA with the pattern as a mask, which computes what it hides: a floor, no rival.
- ``flex``: FlexAttention compiled by inductor, on the same problem, blocks left out as ours.
- ``ours, all heads`` (routed): `reattend::attention`.
- ``flash, equal FLOPs`` (latent prefill): SDPA flash at head width 128 with as many heads as make
  the arithmetic the same. SDPA has no fast kernel for rows as wide as a latent's.
- ``original MHA`` and ``original 8 KV heads`` (latent decode): SDPA decode, by either backend, of
  the cache that a converted model had, at the same batch and length, heads of width 128.
- ``fla``: the chunk kernels of fla-core, where that package is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from cases import Case
from patterns import heads_of, layout_of
from problems import Problem
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

WIDTH = 128  # heads of the models that conversions start from
MASKED = 16384  # tokens up to which a mask fits
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
FLEX = ("gqa prefill 4k", "gqa decode 8k, batch 8", "mla prefill 4k, 16 heads")
Call = Callable[[], Any]
Make = Callable[[Problem], Call]


@dataclass(frozen=True)
class Peer:
    """Another implementation.

    Attributes:
        name: column of the table.
        case: the problem it solves.
        make: from that problem's tensors to the call that is timed.
        back: to the call of its gradient alone, where that is compared. It goes through autograd,
            which a graph cannot hold, so it is timed between events.
        compiles: in how many processes it is compiled beforehand, where its first call takes long.

    Peers of one name and problem are equal: they are timed once.
    """

    name: str
    case: Case
    make: Make = field(compare=False)
    back: Make | None = field(default=None, compare=False)
    compiles: int = field(default=0, compare=False)


def sdpa(case: Case, backend: str) -> Make:
    """SDPA on an attention problem with one backend forced."""
    mask = causal_lower_right(case.n, case.m) if 1 < case.n < case.m else None

    def make(problem: Problem) -> Call:
        q, k, v = problem.data

        def call() -> Tensor:
            with sdpa_kernel([BACKENDS[backend]]):
                return F.scaled_dot_product_attention(
                    q, k, v, mask, is_causal=case.n == case.m, enable_gqa=case.h != case.g
                )

        return call

    return make


def masked(problem: Problem) -> Call:
    """SDPA with the layout as a mask."""
    case, layout = problem.case, layout_of(problem.case)
    start = (case.m - case.n) - layout.first * layout.block
    seen = layout.to(problem.device).to_mask(start + case.n, case.m)[:, start:]
    mask = seen if len(seen) == 1 else seen[layout.head_layout.long()]
    q, k, v = problem.data
    return lambda: F.scaled_dot_product_attention(q, k, v, mask[None], enable_gqa=case.h != case.g)


def flex(case: Case) -> Make:
    """FlexAttention on an op's problem (for a latent: one KV head of width r + R)."""
    past = case.m - case.n

    @cache
    def parts() -> tuple[Any, Any, Any]:  # slow to import; patterns may be wanting
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        pattern = heads_of(case)[0] if case.pattern else None

        def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            visible = j <= i + past
            if pattern is not None:
                visible = visible & ((i + past - j < pattern.window) | (j < pattern.sinks))
            return visible

        return torch.compile(flex_attention, dynamic=False), create_block_mask, seen

    def make(problem: Problem) -> Call:
        compiled, create_block_mask, seen = parts()
        blocks = None
        if case.n > 1:
            blocks = create_block_mask(
                seen, None, None, case.n, case.m, device=problem.device, _compile=True
            )
        if case.op == "latent_attention":
            q_nope, q_rope, latent, rope = problem.data
            q, k = torch.cat([q_nope, q_rope], -1), torch.cat([latent, rope], -1)[:, None]
            v = latent[:, None]
        else:
            q, k, v = problem.data
        return lambda: compiled(q, k, v, block_mask=blocks, enable_gqa=case.h != case.g)

    return make


def fla(problem: Problem) -> Call:
    """fla-core's chunk kernel of the same decay, on tensors in its own order."""
    q, k, v, decay, _ = (
        None if x is None else x.transpose(1, 2).contiguous() for x in problem.data
    )
    if problem.case.decay == "head":
        op = import_module("fla.ops.simple_gla").chunk_simple_gla
        return lambda: op(q, k, v, decay, scale=1.0, output_final_state=True)
    if problem.case.decay == "feature":
        op = import_module("fla.ops.gla").chunk_gla
        return lambda: op(q, k, v, decay, scale=1.0, output_final_state=True)
    op = import_module("fla.ops.linear_attn").chunk_linear_attn
    return lambda: op(q, k, v, scale=1.0, normalize=False, output_final_state=True)


def fla_gradient(problem: Problem) -> Call:
    """The gradient of `fla` through autograd, the graph kept."""
    wide = [None if x is None else x.requires_grad_() for x in problem.data]
    with torch.enable_grad():
        y, state = fla(problem)()
    given = [x for x in wide if x is not None]
    dy, dstate = torch.randn_like(y), torch.randn_like(state)
    return lambda: torch.autograd.grad((y, state), given, (dy, dstate), retain_graph=True)


def dense(case: Case) -> Case:
    """The attention problem without a pattern or a choice of heads."""
    name = f"{case.h}/{case.g} heads, {case.n} on {case.m}, batch {case.b}, {case.dtype}"
    return replace(case, name=name, op="attention", pattern="", share=1.0, goals=())


def original(case: Case, groups: int) -> Case:
    """The attention problem a latent decode replaces."""
    name = f"original of {case.name}"
    return replace(case, name=name, op="attention", g=groups, d=WIDTH, rope=0, page=0, goals=())


def equal_flops(case: Case) -> Case:
    """Attention with heads of width 128 and the arithmetic of a latent prefill."""
    heads = round(case.h * (2 * case.d + case.rope) / (2 * WIDTH))
    name = f"flops of {case.name}"
    return replace(
        case, name=name, op="attention", h=heads, g=heads, d=WIDTH, rope=0, backward=False, goals=()
    )


def peers(case: Case) -> Iterator[Peer]:
    """Every peer of a case."""
    if case.op == "linear_attention":
        if case.n > 1 and case.dtype != "float32" and find_spec("fla") is not None:
            yield Peer("fla", case, fla, fla_gradient, compiles=8)
        return
    if case.op != "latent_attention":
        whole = dense(case)
        yield from (Peer(name, whole, sdpa(whole, name)) for name in BACKENDS)
        if case.op == "routed_attention":
            yield Peer("ours, all heads", whole, lambda problem: problem.forward)
    elif case.decodes:
        for groups, name in ((case.h, "original MHA"), (8, "original 8 KV heads")):
            if groups == case.h or case.h > 8:
                some = original(case, groups)
                yield from (Peer(f"{n}, {name}", some, sdpa(some, n)) for n in BACKENDS)
    else:
        same = equal_flops(case)
        yield from (Peer(f"{n}, equal FLOPs", same, sdpa(same, n)) for n in BACKENDS)
    if case.op == "sparse_attention" and not case.decodes:
        if case.n <= MASKED:
            yield Peer("masked", case, masked)
        if case.pattern.startswith("sinks"):
            yield Peer("flex", case, flex(case), compiles=1)
    if case.name in FLEX:
        yield Peer("flex", case, flex(case), compiles=1)
