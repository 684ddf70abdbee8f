"""Which argument of a module's call is the mask of its block, by what it hides."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reattend.install.binding import leaves, match
from reattend.install.pieces import Path
from reattend.mixers.scores import shown


def match_mask(arguments: dict[str, Any], mask_BhNM: Tensor) -> tuple[Path | None, bool]:
    """The leaf that hides what the core's mask hides, and whether it also adds a bias.

    The core may see more than the owner is given: a bool mask made additive, a bias added, one
    row for all queries expanded. So where no leaf equals the mask, visibility decides. A mask
    without a batch axis is a pattern, and no argument is needed for it.
    """
    if mask_BhNM.dim() != 4:
        return None, False
    exact = match(arguments, mask_BhNM)
    seen = shown(mask_BhNM)
    if exact is not None:
        return exact, adds_bias(mask_BhNM)
    if bool(seen.all()):
        return None, False
    for path, leaf in leaves(arguments):
        if not isinstance(leaf, Tensor) or leaf.dim() != 4 or leaf.is_complex():
            continue
        if leaf.dtype != torch.bool and (not leaf.is_floating_point() or adds_bias(leaf)):
            continue
        pairs = zip(leaf.shape, seen.shape, strict=True)
        if all(a in (1, b) for a, b in pairs) and bool((shown(leaf) == seen).all()):
            return path, False
    return None, False


def match_hiding(arguments: dict[str, Any], mask_BhNM: Tensor) -> Path | None:
    """The bool leaf that is True where the core's mask hides."""
    seen = shown(mask_BhNM)
    if mask_BhNM.dim() != 4 or bool(seen.all()):
        return None
    for path, leaf in leaves(arguments):
        if isinstance(leaf, Tensor) and leaf.dtype == torch.bool and leaf.dim() == 4:
            pairs = zip(leaf.shape, seen.shape, strict=True)
            if all(a in (1, b) for a, b in pairs) and bool((~leaf == seen).all()):
                return path
    return None


def match_wider(arguments: dict[str, Any], mask_BhNM: Tensor, window: int) -> Path | None:
    """The leaf that hides what the core's mask hides among the keys of a causal window."""
    seen = shown(mask_BhNM)
    if mask_BhNM.dim() != 4:
        return None
    for path, leaf in leaves(arguments):
        if isinstance(leaf, Tensor) and leaf.dim() == 4 and not leaf.is_complex():
            if leaf.dtype != torch.bool and (not leaf.is_floating_point() or adds_bias(leaf)):
                continue
            near = within(leaf, seen.shape[-2], window)
            pairs = zip(near.shape, seen.shape, strict=True)
            if all(a in (1, b) for a, b in pairs) and bool((near == seen).all()):
                return path
    return None


def within(mask_BhNM: Tensor, n: int, window: int) -> Tensor:
    """What a mask shows, as bool, up to each of n queries, which end with the keys.

    Args:
        mask_BhNM: bool or additive; one row may stand for all queries.
        n: queries.
        window: and no further back than this many tokens; 0: as far as there are keys.
    """
    m = mask_BhNM.shape[-1]
    i = torch.arange(m - n, m, device=mask_BhNM.device)[:, None]
    j = torch.arange(m, device=mask_BhNM.device)
    near_NM = (j <= i) & (j > i - window) if window else j <= i
    return shown(mask_BhNM) & near_NM


def adds_bias(mask: Tensor) -> bool:
    """Whether an additive mask changes scores that it does not hide."""
    return mask.dtype != torch.bool and bool((mask[shown(mask)] != 0).any())
