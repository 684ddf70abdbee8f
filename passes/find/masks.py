"""Classify a mask by running it: on small inputs, padded and not, at two lengths.

A mask that depends on weights is a bias; one that depends on hidden states is data-dependent;
both are reported as not understood here (they stay opaque).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from reattend.passes.evaluate import Evaluator, ancestors
from reattend.passes.find.reasons import NotUnderstood
from reattend.spec import Pattern

#: Longest length a mask is probed at (a window of w needs 2 w + 3).
LONGEST = 16400


@dataclass(frozen=True)
class FoundMask:
    """The pattern, and whether padding in the model's own mask input changes it."""

    pattern: Pattern
    follows_padding: bool


def classify(allowed_NM: Tensor) -> Pattern:
    """The pattern of one boolean matrix [N, M] (True: visible); `opaque` if none fits."""
    n, m = allowed_NM.shape
    if bool(allowed_NM.all()):
        return Pattern("full")
    if n != m:
        return Pattern("opaque")
    i = torch.arange(n, device=allowed_NM.device)[:, None]
    j = torch.arange(m, device=allowed_NM.device)[None, :]
    causal = j <= i
    if bool((allowed_NM == causal).all()):
        return Pattern("causal")
    window = int(allowed_NM[-1].sum())
    if bool((allowed_NM == (causal & (j > i - window))).all()):
        return Pattern("sliding", window=window)
    first = int(allowed_NM[:, 0].sum())
    if first and bool((allowed_NM == (causal & (i // first == j // first))).all()):
        return Pattern("chunked", chunk=first)
    return Pattern("opaque")


def visible(mask: Tensor) -> Tensor:
    """Boolean [B, h, N, M] of a bool or additive mask.

    Raises:
        NotUnderstood: an additive mask that also carries a bias.
    """
    if mask.dtype == torch.bool:
        return mask
    allowed = mask > -1e30 if mask.dtype != torch.float16 else mask > -6e4
    if bool((mask[allowed] != 0).any()):
        raise NotUnderstood("the mask also adds a bias (relative positions, ALiBi)")
    return allowed


def read_mask(
    gm: fx.GraphModule,
    mask: fx.Node | None,
    is_causal: bool,
    inputs_at: Callable[[int | None, bool], dict[fx.Node, Any]],
) -> FoundMask:
    """Probe the mask argument of a core.

    Args:
        gm: normalised graph.
        mask: the argument, None if there is none.
        is_causal: the core hides later keys itself.
        inputs_at: (length or None for the captured one, padded) -> placeholder values.

    Raises:
        NotUnderstood: it is a bias, or depends on hidden states, or differs between heads.
    """
    if mask is None:
        return FoundMask(Pattern("causal" if is_causal else "full"), False)
    if is_causal:
        raise NotUnderstood("a mask beside is_causal")
    slice_nodes = ancestors([mask])
    run = Evaluator(gm)

    def at(length: int | None, padded: bool) -> Tensor:
        return visible(run.run([mask], inputs_at(length, padded))[0])

    base = _one(at(None, False))
    pattern = classify(base)
    longest = max(_constants(slice_nodes), default=0)
    if pattern.kind != "full" and 2 * longest + 3 <= LONGEST:
        pattern = classify(_one(at(max(2 * longest + 3, base.shape[0] + 6), False)))
    if pattern.kind == "opaque":
        raise NotUnderstood("the mask is not full, causal, sliding or chunked")
    padded = at(None, True)
    return FoundMask(pattern, not bool((padded == base).all()))


def _one(allowed: Tensor) -> Tensor:
    """[N, M] of a mask that is the same for every row and head."""
    while allowed.dim() < 4:
        allowed = allowed[None]
    if not bool((allowed == allowed[:1, :1]).all()):
        raise NotUnderstood("the mask differs between rows or heads")
    return allowed[0, 0]


def _constants(nodes: set[fx.Node]) -> list[int]:
    """Positive whole numbers written in the mask's arithmetic: windows and chunks."""
    found = []
    for node in nodes:
        if node.op == "call_function":
            for value in node.args:
                if isinstance(value, int) and 1 < abs(value) <= LONGEST // 2:
                    found.append(abs(value))
    return found
