"""Registration of `reattend::linear_attention` and its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from reattend.errors import ArgumentError
from reattend.kernels.autocast import register_autocast
from reattend.kernels.checks import Shape, check_cache, same_size
from reattend.kernels.core import compute_dtype
from reattend.kernels.lazy_triton import load_launch
from reattend.kernels.linear_attention import both_ways, channels, chunked, gradient
from reattend.kernels.linear_attention.reference import divided, undivided, with_ones

NAME = "reattend::linear_attention"
_Tensors = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
_Prepared = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]
_ARGUMENTS = (
    "Tensor q_BHNf, Tensor k_BGNf, Tensor v_BGNe, Tensor? decay_BGN=None, Tensor? state_BGfe=None,"
    " int lag=0, int block=1, bool normalize=False, bool bidirectional=False"
)


def check(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None,
    lag: int, block: int, normalize: bool, bidirectional: bool,
) -> None:  # fmt: skip
    """Raise ArgumentError where shapes or dtypes break the contract of the op."""
    check_cache(NAME, q, k, v)
    same_size(NAME, q.shape[0], k.shape[0], "the batches of q and k")
    same_size(NAME, q.shape[2], k.shape[2], "the lengths of q and k")
    if lag < 0 or block < 1:
        raise ArgumentError(
            f"{NAME}: lag must be 0 or more, and block positive", why=f"lag={lag}, block={block}"
        )
    columns = v.shape[3] + (1 if normalize else 0)
    if bidirectional and (decay is not None or (lag, block) != (0, 1)):
        raise ArgumentError(
            f"{NAME}: where every query sees all keys, nothing decays and no key is left out",
            why=f"a decay is {'not ' if decay is None else ''}given, lag={lag}, block={block}",
            next_step="leave out decay_BGN, lag and block, or bidirectional",
        )
    featured = decay is not None and decay.dim() == 4
    if featured and (lag, block) != (0, 1):
        raise ArgumentError(
            f"{NAME}: a decay for every feature needs lag 0 and block 1",
            why=f"lag={lag}, block={block}",
        )
    for name, x, sizes in (
        ("decay_BGN", decay, k.shape if featured else k.shape[:3]),
        ("state_BGfe", state, (*k.shape[:2], k.shape[3], columns)),
    ):
        if x is None:
            continue
        if x.dim() != len(sizes) or not x.is_floating_point():
            raise ArgumentError(
                f"{NAME}: {name} must be a float tensor of {len(sizes)} dimensions",
                why=f"it has {x.dim()} and dtype {x.dtype}",
            )
        for number, (a, b) in enumerate(zip(x.shape, sizes, strict=True)):
            same_size(NAME, a, b, f"size {number} of {name} and what k and v make of it")


def _prepared(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None, normalize: bool
) -> _Prepared:
    """Tensors in the compute dtype; the state is there, and the values' column of ones."""
    dtype = compute_dtype(q.dtype)
    wide = with_ones(v.to(dtype)) if normalize else v.to(dtype)
    if state is None:
        state = wide.new_zeros(*k.shape[:2], k.shape[3], wide.shape[3])
    decay = None if decay is None else decay.to(dtype)
    return q.to(dtype), k.to(dtype), wide, decay, state.to(dtype)


def _sums(x: _Prepared, lag: int, block: int, bidirectional: bool) -> tuple[Tensor, Tensor]:
    """Nothing divided."""
    q, k, v, decay, state = x
    if bidirectional:
        return both_ways.forward(q, k, v, state)
    if decay is not None and decay.dim() == 4:
        return channels.forward(q, k, v, decay, state)
    return chunked.forward(q, k, v, decay, state, lag, block)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None,
    lag: int, block: int, normalize: bool, bidirectional: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The op in torch."""
    y, after = _sums(_prepared(q, k, v, decay, state, normalize), lag, block, bidirectional)
    y = divided(y) if normalize else y
    return y.to(q.dtype).contiguous(), after.contiguous()


@torch.library.custom_op(NAME, mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)")
def linear_attention(
    q_BHNf: Tensor,
    k_BGNf: Tensor,
    v_BGNe: Tensor,
    decay_BGN: Tensor | None = None,
    state_BGfe: Tensor | None = None,
    lag: int = 0,
    block: int = 1,
    normalize: bool = False,
    bidirectional: bool = False,
) -> tuple[Tensor, Tensor]:
    """See `reattend.kernels.linear_attention.reference` for the meaning of every argument.

    Raises:
        ArgumentError: shapes or dtypes do not fit.
    """
    x = (q_BHNf, k_BGNf, v_BGNe, decay_BGN, state_BGfe, lag, block, normalize, bidirectional)
    check(*x)
    return _forward(*x)


@linear_attention.register_kernel("cuda")
def _cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    state: Tensor | None = None,
    lag: int = 0,
    block: int = 1,
    normalize: bool = False,
    bidirectional: bool = False,
) -> tuple[Tensor, Tensor]:
    given = (q, k, v, decay, state, lag, block, normalize)
    check(*given, bidirectional)
    launch = load_launch("reattend.kernels.linear_attention.launch")
    x = launch.Inputs(*given)
    configs = None if bidirectional else launch.configs_for(x)
    if configs is None:  # two products, fp64, very wide heads, a GPU no kernel is shipped for
        return _forward(*given, bidirectional)
    made: tuple[Tensor, Tensor] = launch.launch(x, configs)
    return made


@linear_attention.register_fake
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    state: Tensor | None = None,
    lag: int = 0,
    block: int = 1,
    normalize: bool = False,
    bidirectional: bool = False,
) -> tuple[Tensor, Tensor]:
    check(q, k, v, decay, state, lag, block, normalize, bidirectional)
    shape = (*k.shape[:2], k.shape[3], v.shape[3] + (1 if normalize else 0))
    y = q.new_empty(*q.shape[:3], v.shape[3])
    return y, q.new_empty(shape, dtype=compute_dtype(q.dtype))


@torch.library.custom_op(
    "reattend::linear_attention_backward",
    mutates_args=(),
    schema="(Tensor dy_BHNe, Tensor dstate_BGfe, Tensor q_BHNf, Tensor k_BGNf, Tensor v_BGNe,"
    " Tensor? decay_BGN, Tensor? state_BGfe, int lag, int block, bool normalize,"
    " bool bidirectional) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def linear_attention_backward(
    dy_BHNe: Tensor,
    dstate_BGfe: Tensor,
    q_BHNf: Tensor,
    k_BGNf: Tensor,
    v_BGNe: Tensor,
    decay_BGN: Tensor | None,
    state_BGfe: Tensor | None,
    lag: int,
    block: int,
    normalize: bool,
    bidirectional: bool,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, decay and state from those of y and the state after."""
    x = (q_BHNf, k_BGNf, v_BGNe, decay_BGN, state_BGfe)
    return _gradients(dy_BHNe, dstate_BGfe, x, lag, block, normalize, bidirectional)


@linear_attention_backward.register_kernel("cuda")
def _cuda_backward(
    dy: Tensor, dstate: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None,
    state: Tensor | None, lag: int, block: int, normalize: bool, bidirectional: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    launch = load_launch("reattend.kernels.linear_attention.launch")
    given = (q, k, v, decay, state)
    x = launch.Inputs(*given, lag, block, normalize).for_gradient
    configs = None if bidirectional else launch.configs_for(x)
    if configs is None:
        return _gradients(dy, dstate, given, lag, block, normalize, bidirectional)
    return _typed(launch.launch_backward(dy, dstate, x, configs), given)


def _gradients(
    dy: Tensor, dstate: Tensor, x: _Tensors, lag: int, block: int, normalize: bool,
    bidirectional: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The backward op in torch."""
    q, k, v, decay, state = _prepared(*x, normalize)
    dy = dy.to(q.dtype)
    if normalize:
        dy = undivided(dy, _sums((q, k, v, decay, state), lag, block, bidirectional)[0])
    dstate = dstate.to(q.dtype)
    if bidirectional:
        found = both_ways.backward(dy, dstate, q, k, v, state)
    elif decay is not None and decay.dim() == 4:
        found = channels.backward(dy, dstate, q, k, v, decay, state)
    else:
        found = gradient.backward(dy, dstate, q, k, v, decay, state, lag, block)
    dv = found[2][..., : x[2].shape[3]]
    return _typed((*found[:2], dv, *found[3:]), x)


def _typed(found: tuple[Tensor, ...], x: _Tensors) -> tuple[Tensor, ...]:
    """Gradients in the dtypes of what they are of."""
    likes = (*x[:3], found[3] if x[3] is None else x[3], found[4] if x[4] is None else x[4])
    return tuple(made.to(like.dtype).contiguous() for made, like in zip(found, likes, strict=True))


@linear_attention_backward.register_fake
def _fake_backward(
    dy: Tensor, dstate: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Any, state: Any, *_: Any
) -> tuple[Tensor, ...]:
    ddecay = dstate.new_empty(0) if decay is None else decay.new_empty(decay.shape)
    before = (dstate if state is None else state).new_empty(dstate.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), ddecay, before


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.scalars = inputs[5:]


def _backward(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    dq, dk, dv, ddecay, before = linear_attention_backward(dy, dstate, *tensors, *ctx.scalars)
    decay, state = tensors[3:]
    return (
        dq, dk, dv, None if decay is None else ddecay, None if state is None else before,
        None, None, None, None,
    )  # fmt: skip


linear_attention.register_autograd(_backward, setup_context=_setup_context)
register_autocast("linear_attention")


def _flops(q: Any, lag: int, block: int, columns: int, bidirectional: bool) -> int:
    """Scores and sums inside of bands, reading the state, and making it once per query head."""
    chunks = chunked.Chunks.of(q[2], lag, block)
    paired = chunks.paired and not bidirectional
    band = chunks.size * (2 if chunks.wide else 1) if paired else 0
    tokens = int(q[0] * q[1] * q[2])
    return 2 * tokens * int(band * (q[3] + columns) + 2 * q[3] * columns)


@register_flop_formula(torch.ops.reattend.linear_attention)
def linear_attention_flops(
    q: Shape, k: Shape, v: Shape, decay: Any = None, state: Any = None,
    lag: int = 0, block: int = 1, normalize: bool = False, bidirectional: bool = False,
    *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    """What `chunked.forward` or `both_ways.forward` multiplies and adds."""
    return _flops(q, lag, block, v[3] + normalize, bidirectional)


@register_flop_formula(torch.ops.reattend.linear_attention_backward)
def linear_attention_backward_flops(
    dy: Shape, dstate: Shape, q: Shape, k: Shape, v: Shape, decay: Any, state: Any,
    lag: int, block: int, normalize: bool, bidirectional: bool, *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    """Each of the three gradients is about one forward."""
    return 3 * _flops(q, lag, block, v[3] + normalize, bidirectional)
