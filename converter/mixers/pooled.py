"""PooledAttention: a block whose projections are combinations of atoms that several blocks share.

W_l = sum over s of c_ls D_s, with atoms of their own for queries, keys, values and the output
(MASA, "Share Your Attention", arXiv 2508.04581). The first block of a group owns the atoms, which a
model therefore has, stores and trains once; the others read them. A call forms its weights anew,
so nothing but weights is saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from reattend.errors import ModelError
from reattend.mixers.base import Mixer
from reattend.mixers.config import BlockConfig
from reattend.mixers.dense import DenseAttention

#: the projections that are made of atoms
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class PooledConfig(BlockConfig):
    """The block, how many atoms each projection has, and the path of the site that owns them.

    `owner`: empty where it is this block.
    """

    kind: Literal["pooled"] = "pooled"
    atoms: int
    owner: str = ""


class Pool(nn.Module):
    """Atoms [S, out, in] of every projection, by its name."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]], atoms: int) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(atoms, *shape)))


class PooledLinear(nn.Module):
    """A linear layer whose weight is sum over s of `share[s]` times atom s."""

    def __init__(self, name: str, atoms: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.name = name
        self.share = nn.Parameter(torch.ones(atoms))
        self.bias = bias
        self.pools: tuple[Pool, ...] = ()  # in a tuple, so that it is no child of readers

    @property
    def weight(self) -> Tensor:
        """[out, in], formed anew.

        Raises:
            ModelError: the block that owns the atoms is not there.
        """
        if not self.pools:
            raise ModelError("a block was run without the one that owns its projections' atoms")
        atoms: Tensor = getattr(self.pools[0], self.name)
        return torch.einsum("s,soi->oi", self.share, atoms)

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.Linear`."""
        return nn.functional.linear(x, self.weight, self.bias)


class PooledAttention(DenseAttention):
    """A DenseAttention whose four projections are `PooledLinear`."""

    kind = "pooled"
    config: PooledConfig  # type: ignore[assignment]

    def __init__(self, config: PooledConfig) -> None:
        super().__init__(config)  # type: ignore[arg-type]
        self.begin(config)

    def begin(self, config: PooledConfig) -> None:
        """Put the projections made of atoms in place of the others; atoms and shares are empty."""
        self.config = config
        shapes: dict[str, tuple[int, int]] = {}
        for name in PROJECTIONS:
            plain: Any = getattr(self, name)
            shapes[name] = (plain.weight.shape[0], plain.weight.shape[1])
            setattr(self, name, PooledLinear(name, config.atoms, plain.bias))
        self.pool = Pool(shapes, config.atoms) if not config.owner else None
        if self.pool is not None:
            self._read(self.pool)

    @property
    def reads(self) -> str:
        """See `Mixer.reads`."""
        return self.config.owner

    def connect(self, other: Mixer) -> None:
        """See `Mixer.connect`."""
        pool = getattr(other, "pool", None)
        if not isinstance(pool, Pool):
            raise ModelError(
                f"the block at {self.config.owner} owns no atoms",
                next_step="convert or load all blocks of a group together",
            )
        self._read(pool)

    def _read(self, pool: Pool) -> None:
        for name in PROJECTIONS:
            getattr(self, name).pools = (pool,)
