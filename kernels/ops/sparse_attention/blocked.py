"""The torch implementation of the op: gathers the key blocks a query block reads, N x M nowhere.

It looks at the values of the layout and of the lengths, so it lives inside the opaque op.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reattend.kernels.core import Rule, average_backward, compute_dtype, products
from reattend.kernels.sparse_attention.schedule import schedule

SCORES_PER_STEP = 1 << 18  # 1 MiB of fp32 scores: they stay in the processor's cache
SCORES_OF_A_RUN = 1 << 16  # from here on one pair is a step: its keys need no gathering


@dataclass(frozen=True)
class Inputs:
    """Arguments of the op."""

    q_BHNd: Tensor
    k_BGMd: Tensor
    v_BGMe: Tensor
    layout: tuple[Tensor, ...]
    rows: tuple[Tensor, Tensor]
    block: int
    first: int

    def contiguous(self) -> Inputs:
        """Queries, keys and values in one piece, so that rows can be numbered."""
        names = ("q_BHNd", "k_BGMd", "v_BGMe")
        return replace(self, **{name: getattr(self, name).contiguous() for name in names})


@dataclass(frozen=True)
class Step:
    """J pairs of a query block and a KV head, with h query heads each.

    Attributes:
        query: places (J, h, queries) in q_BHNd, counted over its first three axes.
        key: places (J, K) in k_BGMd, likewise; keys that do not exist name others.
        run: there is one pair, and its keys follow each other.
        hidden: (first column, (1 or J, 1, 1, queries or 1, columns)): scores to hide, as bools, or
            -inf to add.
    """

    query: Tensor
    key: Tensor
    run: bool
    hidden: list[tuple[int, Tensor]]


def _heads(head_layout: list[int], group: int, layout: int) -> list[tuple[Tensor, Tensor]]:
    """KV heads (G,) and their query heads (G, h) of a layout, one pair per number h."""
    found: dict[int, list[list[int]]] = {}
    for g in range(0, len(head_layout), group):
        mine = [h for h in range(g, g + group) if head_layout[h] == layout]
        found.setdefault(len(mine), []).append(mine)
    return [
        (torch.tensor([heads[0] // group for heads in many]), torch.tensor(many))
        for h, many in found.items()
        if h
    ]


def _steps(x: Inputs) -> Iterator[Step]:
    (_, heads, n, _), (groups, m) = x.q_BHNd.shape, x.k_BGMd.shape[1:3]
    start_B, end_B = (t.long().cpu() for t in x.rows)
    last_B = end_B.clamp(max=m) - 1
    head_layout = x.layout[4].tolist()
    for batch in schedule(x.layout, x.rows, n, x.block, x.first):
        row_I = batch.row_I
        key_IK = batch.key_IK + start_B[row_I, None]
        # where all items share what is hidden, adding -inf is faster than filling
        hidden = [(c, _added(x) if len(x) == 1 else x) for c, x in batch.hidden]
        hidden = [(column, pairs[:, None, None]) for column, pairs in hidden]
        beyond_IK = key_IK > last_B[row_I, None]
        run = bool((key_IK[:, -1] - key_IK[:, 0] == key_IK.shape[1] - 1).all())
        if bool(beyond_IK.any()):
            run = False
            key_IK = key_IK.minimum(last_B[row_I, None])
            hidden.append((0, beyond_IK[:, None, None, None]))
        query_IN = batch.query_I[:, None] + torch.arange(batch.queries)
        for kv_head, query_heads in _heads(head_layout, heads // groups, batch.layout):
            # (KV heads, items) -> pairs: neighbours read nearly the same keys
            key = (row_I * groups + kv_head[:, None])[..., None] * m + key_IK
            query = (row_I[:, None] * heads + query_heads[:, None])[..., None] * n
            query = (query + query_IN[:, None]).flatten(0, 1)
            key = key.flatten(0, 1)
            scores_each = query.shape[1] * query.shape[2] * key.shape[1]
            alone = run and scores_each >= SCORES_OF_A_RUN
            size = 1 if alone else max(SCORES_PER_STEP // scores_each, 1)
            for i in range(0, len(key), size):
                j = min(i + size, len(key))
                part = [
                    (c, pairs if len(pairs) == 1 else pairs[torch.arange(i, j) % len(row_I)])
                    for c, pairs in hidden
                ]
                yield Step(query[i:j], key[i:j], alone, part)


def _added(hidden: Tensor) -> Tensor:
    """What hides these scores when it is added to them; they are of keys that exist."""
    return torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))


def _gather(x: Tensor, place: Tensor, dtype: torch.dtype, run: bool = False) -> Tensor:
    """Rows of the last axis at places counted over the other axes; a run of them is a view."""
    rows = x.reshape(-1, x.shape[-1])
    if run:
        rows = rows.narrow(0, int(place.flatten()[0]), place.numel())
    else:
        rows = rows.index_select(0, place.flatten().to(x.device))
    return rows.view(*place.shape, x.shape[-1]).to(dtype)


def _read(x: Inputs, step: Step, rule: Rule) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Masked scores (J, 1, h, rows, keys), queries (J, 1, h, rows, d), keys and values."""
    dtype = compute_dtype(x.q_BHNd.dtype)
    q = _gather(x.q_BHNd, step.query, dtype)[:, None]
    k = _gather(x.k_BGMd, step.key, dtype, step.run)[:, None]
    v = _gather(x.v_BGMe, step.key, dtype, step.run)[:, None]
    s = products((q,), (k,), rule)
    for column, hidden in step.hidden:
        part = s[..., column : column + hidden.shape[-1]]
        if hidden.dtype == torch.bool:
            part.masked_fill_(hidden.to(s.device), float("-inf"))
        else:
            part.add_(hidden.to(s))
    return s, q, k, v


def _average(s: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """`average` by torch's own softmax, which is faster than its parts; no gradient."""
    top, p = s.amax(-1, keepdim=True), torch.softmax(s, -1, out=s)
    blind = top == float("-inf")
    if bool(blind.any()):
        p = p.masked_fill(blind, 0)
    b, g, h, n, m = p.shape
    y = torch.matmul(p.reshape(b, g, h * n, m), values).view(b, g, h, n, values.shape[-1])
    lse = torch.where(blind, top, top - p.amax(-1, keepdim=True).log())  # the largest is 1 / mass
    return y, lse.squeeze(-1)


def forward(x: Inputs, rule: Rule) -> tuple[Tensor, Tensor]:
    """y_BHNe in the dtype of q and lse_BHN in the compute dtype, both contiguous."""
    x = x.contiguous()
    q, e = x.q_BHNd, x.v_BGMe.shape[-1]
    y = q.new_zeros(*q.shape[:3], e)
    lse = q.new_full(q.shape[:3], float("-inf"), dtype=compute_dtype(q.dtype))
    for step in _steps(x):
        s, _, _, v = _read(x, step, rule)
        out, log_sum = _average(s, v)
        place = step.query.flatten().to(q.device)
        y.view(-1, e).index_copy_(0, place, out.reshape(-1, e).to(y.dtype))
        lse.view(-1).index_copy_(0, place, log_sum.reshape(-1))
    return y, lse


def backward(
    grads: tuple[Tensor, Tensor], outputs: tuple[Tensor, Tensor], x: Inputs, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """Closed-form gradients of q, k and v, in their shapes and dtypes.

    Args:
        grads: of y_BHNe and lse_BHN.
        outputs: y_BHNe and lse_BHN.
        x: what the op was given.
        rule: scale and softcap.
    """
    x = x.contiguous()
    dtype = compute_dtype(x.q_BHNd.dtype)
    given = (x.q_BHNd, x.k_BGMd, x.v_BGMe)
    dq, dk, dv = (torch.zeros(t.shape, dtype=dtype, device=t.device) for t in given)
    (dy, dlse), (y, lse) = grads, outputs
    for step in _steps(x):
        s, q, k, v = _read(x, step, rule)
        dy_J, y_J = (_gather(t, step.query, dtype)[:, None] for t in (dy, y))
        dlse_J, lse_J = (
            _gather(t[..., None], step.query, dtype)[:, None, ..., 0] for t in (dlse, lse)
        )
        pair = ((dy_J, dlse_J), (y_J, lse_J))
        (dq_J,), (dk_J,), dv_J = average_backward(*pair, s, (q,), (k,), v, rule)
        place, key = (t.flatten().to(dq.device) for t in (step.query, step.key))
        dq.view(-1, dq.shape[-1]).index_copy_(0, place, dq_J.flatten(0, 3))
        dk.view(-1, dk.shape[-1]).index_add_(0, key, dk_J.flatten(0, 2))
        dv.view(-1, dv.shape[-1]).index_add_(0, key, dv_J.flatten(0, 2))
    return dq.to(given[0].dtype), dk.to(given[1].dtype), dv.to(given[2].dtype)
