"""A mixer of another class around the modules of a dense one."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from reattend.mixers.dense import DenseAttention
from reattend.mixers.sparse import SparseAttention
from reattend.mixers.sparse_config import SparseConfig

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
    if hasattr(mixer, "selecting"):
        mixer.selecting.to(dense.q_proj.weight)  # what selects is where the block is, in its dtype
    return mixer
