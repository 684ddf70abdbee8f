"""A softmax over what one token has, not over tokens: layers mixed by a learned query.

Attention residuals let every token average the results of earlier layers, by scores of a query
that is a weight (Inkling 2). There are no keys of other tokens, no projections and nothing to
cache, so no conversion applies; it is recognised, proven and left as it is.

Layout letters: S results to choose from, Q queries, D width; N tokens stand where heads do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from reattend.passes.evaluate import Evaluator, ancestors
from reattend.passes.find.owners import owner_of
from reattend.search import Search
from reattend.selfcheck import TOLERANCE

REASON = (
    "a learned query averages what each token has from several layers: no keys of other tokens, "
    "no projections, nothing to convert"
)


def over_layers(search: Search, core: fx.Node) -> bool:
    """Whether a core is that, and computes it at two lengths (float64, to rounding)."""
    q, k, v, mask, scale, softcap, is_causal, sinks = core.args
    if mask is not None or softcap or is_causal or sinks is not None or k is not v:
        return False
    if any(not isinstance(n, fx.Node) for n in (q, k)) or search.deferred:
        return False
    if any(n.op == "placeholder" and _counted(n) for n in _read_by(q)):
        return False  # the query is computed from the tokens
    tokens, choices = q.meta["val"].shape[1], k.meta["val"].shape[2]
    if isinstance(tokens, int) or not isinstance(choices, int) or not owner_of([core]):
        return False
    length = search.captured.sizes.get("N", 0)
    return all(_same(search, core, n) for n in (length, length + 6))


def _read_by(q: fx.Node) -> set[fx.Node]:
    """What the values of a query are made of; its sizes may follow the tokens."""
    return ancestors([q], stop=lambda n: not isinstance(n.meta.get("val"), Tensor))


def _counted(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _same(search: Search, core: fx.Node, length: int) -> bool:
    """The core against softmax averages written out, on the model's values."""
    q, k, _, _, scale, *_ = core.args
    given: dict[fx.Node, Any] = search.inputs_at(length, False)
    run = Evaluator(search.gm).run([q, k], given)
    q_BNQD, k_BNSD = (t.double() for t in run)
    (got,) = Evaluator(search.gm).run([core], {q: q_BNQD, k: k_BNSD})
    scores_BNQS = torch.einsum("bnqd,bnsd->bnqs", q_BNQD, k_BNSD) * scale
    weights = (scores_BNQS - scores_BNQS.amax(-1, keepdim=True)).exp()
    wanted = torch.einsum("bnqs,bnsd->bnqd", weights / weights.sum(-1, keepdim=True), k_BNSD)
    gap = (got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)
    return bool(gap <= TOLERANCE)
