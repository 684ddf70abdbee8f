"""How much each head matters: what decides which heads every token keeps.

- `input-norm`: what the output projection reads of the head, over tokens and rows as Minitron does
  (Muralidharan et al., arXiv 2407.14679): the norm over channels of sqrt(sum over rows of
  (mean over tokens of |u|)^2).
- `output-norm`: what the head adds to the block's output, the root of the mean of |u_h W_o,h|^2
  over tokens. It is also the error of leaving the head out of the block.
- `first-order`: |dL/dg_h|, g_h the weight of the head's output, at 1; L the loss of the model's own
  answers on text that repeats itself (Michel et al., arXiv 1905.10650, averaged with its sign).
- `leave-one-out`: what the model's output moves by without the head or KV group, one run each.

Layout letters: H query heads, G KV groups, D hidden, n tokens of a row, e value width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from reattend.errors import PlanError
from reattend.mixers.base import Context
from reattend.mixers.dense import DenseAttention
from reattend.passes.rewrite.base import Measure, Subject
from reattend.passes.rewrite.sparse_watch import Look, answering, watched

#: Rows that `first-order` takes gradients of.
ROWS = 8


@torch.no_grad()
def input_norms(dense: DenseAttention, rows: Sequence[Tensor]) -> Tensor:
    """Minitron's score [H] from rows of the block's input [n, D]."""
    squares = [heads.abs().mean(0).square() for heads in joined(dense, rows)]
    channel_He = torch.stack(squares).sum(0).sqrt()
    scores: Tensor = torch.linalg.vector_norm(channel_He, dim=-1)
    return scores


@torch.no_grad()
def output_norms(dense: DenseAttention, rows: Sequence[Tensor]) -> Tensor:
    """Size [H] of what each head adds to the block's output."""
    heads_nHe = torch.cat(joined(dense, rows))
    assert isinstance(dense.o_proj, nn.Linear)
    weight_DHe = dense.o_proj.weight.double().cpu().unflatten(1, heads_nHe.shape[1:])
    # |W u|^2 summed over tokens = <W^T W, sum of u u^T>
    gram = torch.einsum("nhe,nhf->hef", heads_nHe, heads_nHe)
    inner = torch.einsum("dhe,dhf->hef", weight_DHe, weight_DHe)
    return ((gram * inner).sum((1, 2)) / len(heads_nHe)).clamp_min(0).sqrt()


LOCAL: dict[str, Callable[[DenseAttention, Sequence[Tensor]], Tensor]] = {
    "input-norm": input_norms,
    "output-norm": output_norms,
}


def first_order(
    sites: Sequence[Subject], measure: Measure, conversion: str = "moh"
) -> dict[str, Tensor]:
    """|dL/dg_h| [H] of every site by path, nats per token.

    Args:
        sites: the blocks.
        measure: runs the model.
        conversion: that asks.

    Raises:
        PlanError: no causal language model that runs with its blocks replaced.
    """
    gates = {s.path: torch.ones(s.dense.config.core.heads, requires_grad=True) for s in sites}
    blocks = {s.path: watched(s.dense, partial(_weighed, gates[s.path])) for s in sites}
    count = 0
    told = answering(
        "importance: first-order", sites, measure, blocks, measure.length, ROWS,
        where=f"to: {conversion}", instead="use importance: output-norm",
    )  # fmt: skip
    with told as runs:
        runs = iter(runs)
        while True:
            with torch.enable_grad():
                run = next(runs, None)
            if run is None:
                break
            run.loss.backward(inputs=list(gates.values()))
            count += 1
    found = {path: gate.grad for path, gate in gates.items()}
    return {path: g.abs().double() / max(1, count) for path, g in found.items() if g is not None}


def leave_one_out(
    sites: Sequence[Subject], measure: Measure, units: Mapping[str, int]
) -> dict[str, Tensor]:
    """The model's divergence without each unit of every site, by path.

    Args:
        sites: the blocks.
        measure: runs the model.
        units: of each site: its KV groups, or its query heads.

    Raises:
        PlanError: the model cannot run with one of its blocks replaced.
    """
    found = {}
    for site in sites:
        count, moved = units[site.path], []
        for unit in range(count):
            gate = torch.ones(site.dense.config.core.heads)
            gate.unflatten(0, (count, -1))[unit] = 0
            far = measure(site.path, watched(site.dense, partial(_weighed, gate)))
            if far is None:
                raise PlanError(
                    "importance: leave-one-out needs a model that can run with one of its blocks "
                    "replaced",
                    where=site.path,
                    next_step="use importance: output-norm",
                )
            moved.append(far)
        found[site.path] = torch.tensor(moved, dtype=torch.float64)
    return found


def ranked(scores: Tensor, units: int) -> tuple[int, ...]:
    """Units from the most to the least important; heads of a KV group count by their norm."""
    each = scores.double().cpu().unflatten(0, (units, -1)).norm(dim=-1)
    return tuple(each.argsort(descending=True, stable=True).tolist())


def joined(dense: DenseAttention, rows: Sequence[Tensor]) -> list[Tensor]:
    """What the output projection reads of every row, by head [n, H, e], float64."""
    like, heads = next(dense.parameters()), dense.config.core.heads
    found = []
    for row in rows:
        x = row[None].to(like)
        query, new = dense.project(x, x, Context(), None)
        assert new is not None
        joined = dense.join(dense.attend(query, new, Context(), None), x)
        found.append(joined[0].unflatten(-1, (heads, -1)).double().cpu())
    return found


def _weighed(gate_H: Tensor, look: Look, y_BHNe: Tensor) -> Tensor:
    return y_BHNe * gate_H.to(y_BHNe)[:, None, None]
