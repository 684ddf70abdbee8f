"""What a linear block that sees everything may do beside, or in place of, one sum over all keys."""

from __future__ import annotations

from pydantic import Field

from reattend.mixers.config import Frozen

#: shares of blocks are counted in this many parts, so that rounding up is exact
PARTS = 10_000


class EverywhereConfig(Frozen):
    """Of bidirectional blocks; `flow` and `sparse_top` of causal ones too.

    Attributes:
        mlp_width: inner width of the maps that change what queries and keys are projected from
            (LinFusion, arXiv 2409.02097); 0: there are none.
        flow: weights are flows between tokens, conserved on both sides (Flowformer, arXiv
            2202.06258).
        sparse_top: share of key blocks that every query block attends to by softmax, the best by
            pooled scores; in causal blocks every query by itself; 0: none. The sum over all keys is
            added through a projection that starts at zero (SLA, arXiv 2509.24006), or see
            `lowrank`.
        sparse_block: tokens of a block.
        lowrank: keys outside of those blocks have estimated softmax weights, in one sum with the
            exact ones (Scatterbrain, arXiv 2110.15343).
        estimate: columns of keys for which a trained network estimates what each query pays;
            `sparse_top` is then of these columns, for every query by itself (SEA, arXiv
            2310.01777). 0: there is none.
    """

    mlp_width: int = Field(default=0, ge=0)
    flow: bool = False
    sparse_top: float = Field(default=0.0, ge=0.0, le=1.0)
    sparse_block: int = Field(default=64, gt=0)
    lowrank: bool = False
    estimate: int = Field(default=0, ge=0)

    @property
    def projects(self) -> bool:
        """Whether the sum over all keys is added to what the best blocks give."""
        return bool(self.sparse_top) and not self.lowrank and not self.estimate

    def top(self, blocks: int) -> int:
        """How many of so many blocks or columns are attended to, rounded up."""
        return (blocks * round(self.sparse_top * PARTS) + PARTS - 1) // PARTS
