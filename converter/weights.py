"""From a spec and the model's tensors to the normal form: gather rows, never multiply.

`lookup(name) -> Tensor` reads the original model's parameter; verification passes a lookup
that returns random tensors instead, so degenerate weights cannot hide a mistake.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from reattend.mixers.config import (
    AddedConfig,
    CoreConfig,
    GateConfig,
    GrowthConfig,
    JoinConfig,
    NormConfig,
    OpaqueConfig,
    RelativeConfig,
    RotaryConfig,
    StreamConfig,
)
from reattend.mixers.dense import DenseAttention, DenseConfig
from reattend.spec import (
    Added,
    Alibi,
    AttentionSpec,
    Gate,
    Joined,
    Norm,
    Opaque,
    Proj,
    RelativeBias,
    Rotary,
    Scale,
    Stream,
)

Lookup = Callable[[str], Tensor]


def dense_config(spec: AttentionSpec, hidden: int, memory: int) -> DenseConfig:
    """The mixer description of a spec; `hidden`, `memory`: input widths (memory 0: self)."""
    rotary = spec.q.first(Rotary)
    core = spec.core
    return DenseConfig(
        hidden_size=hidden,
        memory_size=memory,
        q=_stream_config(spec.q, head_order(spec)[0]),
        k=_stream_config(spec.k, head_order(spec)[1]),
        v=_stream_config(spec.v, head_order(spec)[1]),
        rotary=RotaryConfig(inv_freq=rotary.inv_freq, scaling=rotary.scaling)
        if isinstance(rotary, Rotary)
        else None,
        core=CoreConfig(
            heads=core.heads, kv_heads=core.kv_heads, qk_head_dim=core.qk_head_dim,
            v_head_dim=core.v_head_dim, scale=core.scale, softcap=core.softcap,
            pattern=core.pattern.kind, window=core.pattern.window, chunk=core.pattern.chunk,
            unmasked=core.pattern.unmasked, sinks=core.sinks is not None,
        ),
        out_features=spec.out.features if spec.out else None,
        out_bias=bool(spec.out and spec.out.bias),
        relative=RelativeConfig(buckets=core.bias.buckets, rows=core.bias.rows)
        if isinstance(core.bias, RelativeBias)
        else None,
        alibi=tuple(core.bias.slopes[h] for h in head_order(spec)[0])
        if isinstance(core.bias, Alibi)
        else None,
        added=AddedConfig(
            program=core.bias.program, heads=tuple(head_order(spec)[0]), extras=core.bias.extras
        )
        if isinstance(core.bias, Added)
        else None,
        gate=GateConfig(act=spec.join.act, per_head=spec.join.per_head, bias=bool(spec.join.bias))
        if isinstance(spec.join, Gate)
        else None,
        join=_join_config(spec.join, head_order(spec)[0])
        if isinstance(spec.join, Joined)
        else None,
    )  # fmt: skip


def dense_state(spec: AttentionSpec, lookup: Lookup) -> dict[str, Tensor]:
    """The state dict of `DenseAttention` for a spec.

    A gather that would be the identity returns the original tensor itself, so unchanged weights
    are shared with the model, not copied.
    """
    q_heads, kv_heads = head_order(spec)
    state: dict[str, Tensor] = {}
    for name, stream, heads in (
        ("q", spec.q, q_heads),
        ("k", spec.k, kv_heads),
        ("v", spec.v, kv_heads),
    ):
        order = _dimension_order(stream)
        rows = _rows(stream.proj, heads, order)
        if isinstance(stream.proj, Opaque):
            state |= _own(f"{name}_proj.program", stream.proj.sources, lookup)
        else:
            state[f"{name}_proj.weight"] = _gather(_matrix(stream.proj, lookup), rows)
            if stream.proj.bias:
                state[f"{name}_proj.bias"] = _gather(lookup(stream.proj.bias), rows)
        norm = stream.first(Norm)
        if isinstance(norm, Norm):
            index = torch.tensor(order) if norm.scope == "head" else _ranks(rows)
            if norm.gain:
                state[f"{name}_norm.weight"] = _gather(lookup(norm.gain), index)
            if norm.bias:
                state[f"{name}_norm.bias"] = _gather(lookup(norm.bias), index)
    if spec.core.sinks:
        state["sinks"] = lookup(spec.core.sinks)[q_heads]
    elif spec.core.sinks is not None:
        state["sinks"] = next(iter(state.values())).new_zeros(len(q_heads))
    if isinstance(spec.core.bias, RelativeBias):  # blocks share one table; each gets its own copy
        state["relative.weight"] = lookup(spec.core.bias.weight)[:, q_heads].clone()
    if isinstance(spec.core.bias, Added):
        state |= _own("added", spec.core.bias.sources, lookup)
    state |= _join_state(spec, q_heads, lookup)
    if spec.out is not None:
        weight = lookup(spec.out.weight)
        weight = weight.t() if spec.out.transposed else weight
        columns = torch.tensor(spec.out.columns)
        if not isinstance(spec.join, Joined):
            columns = columns.reshape(spec.core.heads, -1)[q_heads].flatten()
        state["o_proj.weight"] = _gather(weight.t(), columns).t()
        if spec.out.bias:
            state["o_proj.bias"] = lookup(spec.out.bias)
    return state


def _join_state(spec: AttentionSpec, q_heads: list[int], lookup: Lookup) -> dict[str, Tensor]:
    """Weights of what stands between core and output projection."""
    if isinstance(spec.join, Joined):
        return _own("joint", spec.join.sources, lookup)
    if spec.join is None:
        return {}
    rows = torch.tensor(spec.join.rows).reshape(spec.core.heads, -1)[q_heads].flatten()
    state = {"g_proj.weight": _gather(_matrix(spec.join, lookup), rows)}
    if spec.join.bias:
        state["g_proj.bias"] = _gather(lookup(spec.join.bias), rows)
    return state


def _own(prefix: str, sources: tuple[tuple[str, str], ...], lookup: Lookup) -> dict[str, Tensor]:
    """Weights of a program. Several programs may hold one tensor; each gets its own copy."""
    return {f"{prefix}.{name}": lookup(source).clone() for name, source in sources}


def build_dense(
    spec: AttentionSpec, lookup: Lookup, hidden: int, memory: int, *, copy: bool = False
) -> DenseAttention:
    """The normal form of a site, holding (or sharing) the model's weights."""
    config = dense_config(spec, hidden, memory)
    with torch.device("meta"):
        mixer = DenseAttention(config)
    state = {k: (v.clone() if copy else v) for k, v in dense_state(spec, lookup).items()}
    mixer.load_state_dict(state, strict=True, assign=True)
    for parameter in mixer.parameters():
        parameter.requires_grad_(True)
    return mixer.eval()


def _join_config(join: Joined, q_heads: list[int]) -> JoinConfig:
    """`heads[h]`: where the normal form has the model's head h."""
    heads = tuple(q_heads.index(h) for h in range(len(q_heads)))
    return JoinConfig(program=join.program, heads=heads, width=join.width)


def _stream_config(stream: Stream, heads: list[int]) -> StreamConfig:
    norm, scale = stream.first(Norm), stream.first(Scale)
    order = stream.order()
    after = "norm" in order and "rotary" in order and order.index("norm") > order.index("rotary")
    own = stream.proj
    opaque = None
    if isinstance(own, Opaque):
        rows = tuple(_rows(own, heads, _dimension_order(stream)).tolist())
        opaque = OpaqueConfig(
            program=own.program, rows=rows, extras=own.extras, regroups=own.regroups
        )
    return StreamConfig(
        bias=own.bias is not None,
        opaque=opaque,
        norm=NormConfig(
            kind=norm.kind, scope=norm.scope, eps=norm.eps, gain=norm.gain is not None,
            gain_offset=norm.gain_offset, bias=norm.bias is not None, after_rotary=after,
        )
        if isinstance(norm, Norm)
        else None,
        scale=scale.value if isinstance(scale, Scale) else 1.0,
        handed=bool(stream.site),
        growth=GrowthConfig(
            beta=scale.growth.beta, offset=scale.growth.offset, period=scale.growth.period,
            smooth=scale.growth.smooth,
        )
        if isinstance(scale, Scale) and scale.growth is not None
        else None,
    )  # fmt: skip


def head_order(spec: AttentionSpec) -> tuple[list[int], list[int]]:
    """Query heads sorted by group, and one representative key head of each group."""
    group = spec.core.kv_head_of
    q_heads = sorted(range(spec.core.heads), key=lambda h: (group[h], h))
    kv_heads = [group.index(g) for g in range(spec.core.kv_heads)]
    return q_heads, kv_heads


def stream_rows(spec: AttentionSpec, name: Literal["k", "v"]) -> list[int]:
    """For every number of the mixer's keys or values [G d], the row of the projection it is."""
    stream = spec.k if name == "k" else spec.v
    rows: list[int] = _rows(stream.proj, head_order(spec)[1], _dimension_order(stream)).tolist()
    return rows


def _dimension_order(stream: Stream) -> list[int]:
    """[rotary real | rotary imaginary | rest]."""
    rotary = stream.first(Rotary)
    if not isinstance(rotary, Rotary):
        return list(range(stream.proj.width))
    first = [a for a, _ in rotary.pairs] + [b for _, b in rotary.pairs]
    return first + [i for i in range(stream.proj.width) if i not in set(first)]


def _rows(proj: Proj | Opaque, heads: list[int], order: list[int]) -> Tensor:
    return torch.tensor(proj.rows).reshape(proj.heads, proj.width)[heads][:, order].flatten()


def _ranks(rows: Tensor) -> Tensor:
    """Where each row stands among the stream's own rows, for a norm over the whole stream."""
    return torch.searchsorted(rows.sort().values, rows)


def _matrix(proj: Proj | Gate, lookup: Lookup) -> Tensor:
    weight = lookup(proj.weight)
    return weight.t() if proj.transposed else weight


def _gather(tensor: Tensor, index: Tensor) -> Tensor:
    whole = index.numel() == tensor.shape[0] and bool((index == torch.arange(len(index))).all())
    return tensor if whole else tensor[index.to(tensor.device)]
