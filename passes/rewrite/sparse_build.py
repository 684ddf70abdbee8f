"""A mixer of another class around the modules of a dense one, and which heads share a pattern."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from reattend.mixers.dense import DenseAttention, DenseConfig
from reattend.mixers.sparse import SparseAttention
from reattend.mixers.sparse_config import HeadClass, SparseConfig
from reattend.patterns.pattern import HeadPattern

Dense = TypeVar("Dense", bound=DenseAttention)
Made = TypeVar("Made", bound=SparseAttention)


def like(dense: DenseAttention, kind: type[Dense]) -> Dense:
    """A mixer of a class derived from DenseAttention that holds the modules of `dense`."""
    mixer = kind.__new__(kind)
    nn.Module.__init__(mixer)
    mixer.__dict__.update({k: v for k, v in dense.__dict__.items() if not k.startswith("_")})
    for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        getattr(mixer, name).update(getattr(dense, name))
    return mixer.train(dense.training)


def sparse_like(dense: DenseAttention, config: SparseConfig, kind: type[Made]) -> Made:
    """A SparseAttention, or a subclass of it, that holds the modules of `dense`."""
    mixer = like(dense, kind)
    mixer.begin(config)
    mixer.selecting.to(dense.q_proj.weight)  # what selects is where the block is, in its dtype
    return mixer


def head_classes(config: DenseConfig, options: Any) -> tuple[HeadClass, ...]:
    """KV heads by pattern, heads of one pattern together."""
    heads = config.core.kv_heads
    found: dict[HeadPattern, list[int]] = {}
    given = {h: c.pattern for c in options.head_patterns for h in c.kv_heads}
    given |= dict.fromkeys(options.heads_full, HeadPattern(full=True))
    for h in range(heads):
        pattern = given[h] if h in given else options.pattern.for_head(h, heads)
        found.setdefault(pattern, []).append(h)
    return tuple(HeadClass(kv_heads=tuple(v), pattern=p) for p, v in found.items())
