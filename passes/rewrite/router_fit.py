"""A router's start: each token's heads by the size of what they add to the block's output.

Leaving a head out of a block costs what the head would have added there. That is known of every
calibration token, and a linear map of the block's input tells much of it: the logarithms of the
sizes, less their mean over the units, are fitted by least squares. Ours; the published routers
start at zero (Jin et al., arXiv 2410.11842) or are the norms of queries.

Layout letters: n tokens, U units, H query heads, D hidden, e value width, k numbers of a unit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from reattend.mixers.dense import DenseAttention
from reattend.passes.rewrite.importance import joined

#: added to the diagonal of the inputs' second moments, of its mean
RIDGE = 1e-3


@torch.no_grad()
def sizes(dense: DenseAttention, rows: Sequence[Tensor], units: int) -> Tensor:
    """Size [n, U] of what each unit adds to the block's output for each token, float64.

    By its output projection, also where another module owns it; without one, of the heads' outputs.
    """
    heads_nHe = torch.cat(joined(dense, rows))
    unit_nUk = heads_nHe.unflatten(1, (units, -1)).flatten(2)
    weight = dense.o_proj.weight if isinstance(dense.o_proj, nn.Linear) else dense.outer
    if weight is None:
        plain: Tensor = torch.linalg.vector_norm(unit_nUk, dim=-1)
        return plain
    weight_DUk = weight.double().cpu().unflatten(1, unit_nUk.shape[1:])
    inner_Ukk = torch.einsum("duk,dul->ukl", weight_DUk, weight_DUk)
    squared: Tensor = torch.einsum("nuk,ukl,nul->nu", unit_nUk, inner_Ukk, unit_nUk)
    return squared.clamp_min(0).sqrt()


@torch.no_grad()
def fitted(dense: DenseAttention, rows: Sequence[Tensor], units: int, shared: int) -> Tensor:
    """Weight [R, D] of a router whose scores rank the units behind the `shared` first.

    Args:
        dense: the block, its units in their order.
        rows: of its input [n, D].
        units: U.
        shared: units that are always used.
    """
    target = sizes(dense, rows, units)[:, shared:].clamp_min(1e-30).log()
    target = target - target.mean(1, keepdim=True)
    x = torch.cat([row.double().cpu() for row in rows])
    moment = x.t() @ x
    moment += RIDGE * torch.diagonal(moment).mean() * torch.eye(len(moment), dtype=moment.dtype)
    weight_DR: Tensor = torch.linalg.solve(moment, x.t() @ target)
    return weight_DR.t()
