"""Every site proves itself: the normal form rebuilt from the spec against the captured region.

Random weights of order one (the model's own may be degenerate), the region's down-casts
promoted to float64, its cos, sin and mask fed as the model computed them, and the mixer under
*its own* pattern: agreement is then to rounding or the site was misread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from reattend.mixers.base import Context
from reattend.passes.evaluate import Evaluator, attribute
from reattend.passes.find.masks import visible
from reattend.passes.find.sites import Found
from reattend.spec import Norm
from reattend.weights import build_dense

TOLERANCE = 1e-12


def self_check(
    gm: fx.GraphModule, found: Found, inputs_at: Callable[[int | None, bool], dict[fx.Node, Any]]
) -> float:
    """Relative error of the rebuilt block's output, the worst of unpadded and padded inputs.

    Args:
        gm: normalised graph.
        found: the site.
        inputs_at: placeholder values, (length or None, padded).
    """
    generator = torch.Generator().manual_seed(1)
    weights = _random_weights(gm, found, generator)
    worst = 0.0
    for padded in (False, True) if found.follows_padding else (False,):
        worst = max(worst, _compare(gm, found, inputs_at(None, padded), weights, generator))
    return worst


def _random_weights(
    gm: fx.GraphModule, found: Found, generator: torch.Generator
) -> dict[str, Tensor]:
    """Fresh tensors for every weight of the site: O(1) logits, gains near one, real biases."""
    spec = found.spec
    weights: dict[str, Tensor] = {}

    def matrix(name: str, transposed: bool, fan_in_gain: float = 1.0) -> None:
        shape = attribute(gm, name).shape
        fan_in = shape[0] if transposed else shape[-1]
        weights[name] = (
            torch.randn(shape, generator=generator, dtype=torch.float64) * fan_in_gain / fan_in**0.5
        )

    def vector(name: str | None, centre: float) -> None:
        if name:
            shape = attribute(gm, name).shape
            noise = torch.randn(shape, generator=generator, dtype=torch.float64)
            weights[name] = centre + 0.2 * noise

    for stream in (spec.q, spec.k, spec.v):
        matrix(stream.proj.weight, stream.proj.transposed)
        vector(stream.proj.bias, 0.0)
        norm = stream.first(Norm)
        if isinstance(norm, Norm):
            vector(norm.gain, 1.0 - norm.gain_offset)
            vector(norm.bias, 0.0)
    if spec.out is not None:
        matrix(spec.out.weight, spec.out.transposed)
        vector(spec.out.bias, 0.0)
    return weights


def _compare(
    gm: fx.GraphModule,
    found: Found,
    given: dict[fx.Node, Any],
    weights: dict[str, Tensor],
    generator: torch.Generator,
) -> float:
    region, spec = found.region, found.spec
    outside = [*region.externals, *([region.mask] if region.mask is not None else [])]
    values = dict(zip(outside, Evaluator(gm).run(outside, given), strict=True))
    x = _random_like(region.hidden, gm, given, generator)
    memory = None if region.memory is None else _random_like(region.memory, gm, given, generator)
    values[region.hidden] = x
    if region.memory is not None:
        values[region.memory] = memory
    expected = Evaluator(gm, promote=torch.float64, weights=weights).run(
        [region.exit.node], {**given, **values}
    )[0]
    mixer = build_dense(
        spec, weights.__getitem__, x.shape[-1], 0 if memory is None else memory.shape[-1]
    )
    valid = _validity(values.get(region.mask) if region.mask is not None else None, x, memory)
    rotation = None
    if region.rotation is not None:
        rotation = (region.rotation.cos_NP[None], region.rotation.sin_NP[None])
    with torch.no_grad():
        y = mixer(x, Context(mask=valid, rotation=rotation), None, memory)
    if y.shape != expected.shape:
        return float("inf")
    rows = (
        valid.bool()
        if valid is not None and memory is None
        else torch.ones(x.shape[:2], dtype=torch.bool)
    )
    gap = (y - expected)[rows].abs().max()
    return float(gap / expected[rows].abs().max().clamp_min(1e-30))


def _validity(mask: Tensor | None, x: Tensor, memory: Tensor | None) -> Tensor | None:
    """Which keys are real, [B, M]: the diagonal of a self-attention mask, any row of a cross one."""
    if mask is None:
        return None
    allowed = visible(mask)
    while allowed.dim() < 4:
        allowed = allowed[None]
    allowed = allowed.expand(x.shape[0], -1, x.shape[1], -1)[:, 0]
    if memory is None:
        return torch.diagonal(allowed, dim1=-2, dim2=-1).contiguous()
    return allowed.any(1)


def _random_like(
    node: fx.Node, gm: fx.GraphModule, given: dict[fx.Node, Any], generator: torch.Generator
) -> Tensor:
    shape = [int(getattr(getattr(s, "node", None), "hint", s)) for s in node.meta["val"].shape]
    return torch.randn(shape, generator=generator, dtype=torch.float64)
