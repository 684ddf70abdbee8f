"""Every site proves itself: the normal form rebuilt from the spec against the captured region.

Random weights of order one (the model's own may be degenerate), the region's down-casts
promoted to float64, its cos, sin and mask fed as the model computed them, and the mixer under
*its own* pattern: agreement is then to rounding or the site was misread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from reattend.mixers.base import Context
from reattend.mixers.scores import shown
from reattend.passes.evaluate import Evaluator, attribute, concrete_shape
from reattend.passes.find.sites import Found
from reattend.passes.find.streams import read_stream
from reattend.selfcheck_weights import alone, random_weights, validity, weight_names
from reattend.spec import Added, Alibi, Opaque, Proj, RelativeBias
from reattend.weights import build_dense

TOLERANCE = 1e-12
#: longest window for which the second length exceeds two of them (attention is quadratic here)
LONGEST_CHECK = 2048
#: in the model's own dtype: this many times the noise of reordering its sums
NOISE = 8.0


@dataclass(frozen=True)
class SelfCheck:
    """What the proof found.

    Attributes:
        error: relative error in promoted float64, the worst over lengths and paddings.
        native: largest absolute difference in the model's own dtype and weights.
        floor: the same between two orders of summation of the rebuilt block.
        scale: largest output.
        alone: why the block's own steps do not treat every token by itself; empty if they do.
    """

    error: float
    native: float
    floor: float
    scale: float
    dtype: torch.dtype
    alone: str = ""

    @property
    def reason(self) -> str:
        """Why the site is not trusted; empty if it is."""
        if not self.error <= TOLERANCE:
            return (
                f"not understood: rebuilt block differs by {self.error:.1e} (limit {TOLERANCE:g})"
            )
        if self.alone:
            return f"not understood: {self.alone}"
        limit = NOISE * max(self.floor, torch.finfo(self.dtype).eps * self.scale)
        if not self.native <= limit:
            return (
                f"not understood: in {str(self.dtype).removeprefix('torch.')} the rebuilt block "
                f"differs by {self.native:.1e}, more than {NOISE:g} x its noise ({limit:.1e})"
            )
        return ""


def self_check(
    gm: fx.GraphModule,
    found: Found,
    inputs_at: Callable[[int | None, bool], dict[fx.Node, Any]],
) -> SelfCheck:
    """Compare the rebuilt block with the region at two lengths, unpadded and padded.

    Where the model's own steps mix tokens or count them, the spec is marked `whole`.

    Args:
        gm: normalised graph.
        found: the site.
        inputs_at: placeholder values, (length or None, padded).
    """
    generator = torch.Generator().manual_seed(1)
    weights = random_weights(gm, found.spec, generator)
    trials: list[tuple[int | None, bool]] = [(None, False)]
    if found.follows_padding:
        trials.append((None, True))
    longer = second_length(found, inputs_at)
    if longer is not None:
        trials.append((longer, found.follows_padding))
    if longer is not None and found.follows_padding and _opaque(found):
        trials.append((longer, False))
    worst = 0.0
    for length, padded in trials:
        gap, scale = _compare(gm, found, inputs_at(length, padded), weights, generator)
        worst = max(worst, gap / max(scale, 1e-30))
    native, floor, scale, dtype = _native(gm, found, inputs_at(None, False), generator)
    parts = _alone(gm, found, inputs_at, weights)
    if parts:
        parts = _alone(gm, found, inputs_at, weights, True)
        found.spec = replace(found.spec, whole=True)
    return SelfCheck(worst, native, floor, scale, dtype, parts)


def _alone(
    gm: fx.GraphModule,
    found: Found,
    inputs_at: Callable[[int | None, bool], dict[fx.Node, Any]],
    weights: dict[str, Tensor],
    whole: bool = False,
) -> str:
    """Why the model's own steps in this block cannot run row by row, or token by token."""
    region, given = found.region, inputs_at(None, False)
    generator = torch.Generator().manual_seed(5)
    x = random_like(region.hidden, given, generator)
    memory = None if region.memory is None else random_like(region.memory, given, generator)
    width = 0 if memory is None else memory.shape[-1]
    mixer = build_dense(found.spec, weights.__getitem__, x.shape[-1], width)
    fixed = whole or str(region.hidden.meta["val"].shape[1]).isdigit()  # symbols are not
    run = Evaluator(gm, promote=torch.float64).run(region.extras, given)
    return alone(mixer, x, x if memory is None else memory, tuple(run), fixed)


def second_length(
    found: Found, inputs_at: Callable[[int | None, bool], dict[fx.Node, Any]]
) -> int | None:
    """A length above two windows and every distance; None where the graph's length is fixed."""
    before = concrete_shape(found.region.hidden, inputs_at(None, False))
    pattern = found.spec.core.pattern
    length = before[1] + 6
    if 2 * max(pattern.window, pattern.chunk) <= LONGEST_CHECK:
        length = max(length, 2 * max(pattern.window, pattern.chunk) + 3)
    bias = found.spec.core.bias
    if isinstance(bias, RelativeBias):
        length = max(length, len(bias.buckets) + 3)
    if concrete_shape(found.region.hidden, inputs_at(length, False)) == before:
        return None
    return length


def _native(
    gm: fx.GraphModule, found: Found, given: dict[fx.Node, Any], generator: torch.Generator
) -> tuple[float, float, float, torch.dtype]:
    """(difference, noise floor, scale, dtype) with the model's own weights, nothing promoted."""
    read = {n: attribute(gm, n) for n in weight_names(found.spec)}
    dtype = _dtype(read, found)
    region = found.region
    x = random_like(region.hidden, given, generator).to(dtype)
    memory = None if region.memory is None else random_like(region.memory, given, generator)
    memory = None if memory is None else memory.to(dtype)
    expected, y, rows = both(gm, found, given, None, read, x, memory)
    ctx = _context(gm, found, given, x, memory)
    floor = float((_reordered(found, read, x, memory, ctx, generator) - y)[rows].abs().max())
    gap = float((y.double() - expected.double())[rows].abs().max())
    return gap, floor, float(expected[rows].abs().max()), dtype


def _dtype(read: dict[str, Tensor], found: Found) -> torch.dtype:
    """The model's dtype: that of the query's first weight."""
    first = read.get(found.spec.q.proj.weight)
    return next(t.dtype for t in (first, *read.values()) if t is not None and t.is_floating_point())


def _reordered(
    found: Found,
    read: dict[str, Tensor],
    x: Tensor,
    memory: Tensor | None,
    ctx: Context,
    generator: torch.Generator,
) -> Tensor:
    """The rebuilt block once more with its sums in another order.

    Where the model's own steps take the hidden state its columns cannot change places, so the
    input is moved by one rounding instead.
    """
    spec = found.spec
    streams = (spec.q, spec.k, spec.v)
    if spec.join is not None or any(isinstance(s.proj, Opaque) for s in streams):
        noise = torch.randn(x.shape, generator=generator) * torch.finfo(x.dtype).eps
        return _rebuilt(found, read, x * (1 + noise.to(x.dtype)), memory, ctx)
    order = torch.randperm(x.shape[-1], generator=generator)
    shuffled = dict(read)
    for proj in (s.proj for s in streams):
        assert isinstance(proj, Proj)
        if memory is None or proj is spec.q.proj:
            weight = read[proj.weight]
            shuffled[proj.weight] = weight[order] if proj.transposed else weight[:, order]
    return _rebuilt(found, shuffled, x[..., order], memory, ctx)


def _compare(
    gm: fx.GraphModule,
    found: Found,
    given: dict[fx.Node, Any],
    weights: dict[str, Tensor],
    generator: torch.Generator,
) -> tuple[float, float]:
    """(largest difference, largest output) in promoted float64 with random weights."""
    region = found.region
    x = random_like(region.hidden, given, generator)
    memory = None if region.memory is None else random_like(region.memory, given, generator)
    expected, y, rows = both(gm, found, given, torch.float64, weights, x, memory)
    if y.shape != expected.shape:
        return float("inf"), 1.0
    return float((y - expected)[rows].abs().max()), float(expected[rows].abs().max())


def both(
    gm: fx.GraphModule,
    found: Found,
    given: dict[fx.Node, Any],
    promote: torch.dtype | None,
    weights: dict[str, Tensor],
    x: Tensor,
    memory: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output of the region, of the rebuilt block, and the rows that are real."""
    region = found.region
    outside = [*region.externals, *region.extras]
    if region.mask is not None and not isinstance(found.spec.core.bias, Added):
        outside.append(region.mask)
    run = Evaluator(gm, weights=weights).run(outside, given)
    values = dict(zip(outside, run, strict=True))
    if isinstance(found.spec.core.bias, Alibi) and promote is not None:  # slopes are not rounded
        wide = Evaluator(gm, weights=weights, promote=promote).run([region.mask], given)
        values[region.mask] = wide[0]
    growth = region.streams["q"].growth
    if growth is not None and promote is not None:  # neither is a factor by position
        wide = Evaluator(gm, weights=weights, promote=promote).run([growth.factor], given)
        values[growth.factor] = wide[0]
    values[region.hidden] = x
    if region.memory is not None:
        values[region.memory] = memory
    expected = Evaluator(gm, promote=promote, weights=weights).run(
        [region.exit.node], {**given, **values}
    )[0]
    ctx = _context(gm, found, given, x, memory)
    y, mask = _rebuilt(found, weights, x, memory, ctx), ctx.mask
    whole = torch.ones(expected.shape[:2], dtype=torch.bool)  # queries may be fewer than tokens
    if mask is None:
        return expected, y, whole
    if mask.dim() == 4:  # rows that see nothing have no attention to compare
        return expected, y, shown(mask).any(-1)[:, 0].expand(expected.shape[:2])
    return expected, y, mask.bool() if memory is None else whole


def _context(
    gm: fx.GraphModule, found: Found, given: dict[fx.Node, Any], x: Tensor, memory: Tensor | None
) -> Context:
    """What a mixer's call is told: the mask, and rotary tables as the model has them.

    The mask is the validity of tokens [B, M], so that the mixer's own pattern is on trial; only
    an opaque pattern is the model's whole mask.
    """
    region = found.region
    extras = tuple(Evaluator(gm).run(region.extras, given))
    if x.dtype == torch.float64:
        extras = tuple(t.double() if t.is_floating_point() else t for t in extras)
    own = region.mask is None or isinstance(found.spec.core.bias, Added)
    mask = None if own else Evaluator(gm).run([region.mask], given)[0]
    rotation = None
    if region.rotation is not None:
        here = read_stream(gm, region.core.args[0], given).rotation
        assert here is not None
        rotation = (here.cos_NP[None].to(x.dtype), here.sin_NP[None].to(x.dtype))
    if mask is not None and _opaque(found):
        while mask.dim() < 4:
            mask = mask[None]
        mask = shown(mask) if found.spec.core.bias is not None else mask
        return Context(mask=mask, rotation=rotation, extras=extras)
    return Context(mask=validity(mask, x, memory), rotation=rotation, extras=extras)


def _rebuilt(
    found: Found, weights: dict[str, Tensor], x: Tensor, memory: Tensor | None, ctx: Context
) -> Tensor:
    """The normal form's output under its own pattern."""
    width = 0 if memory is None else memory.shape[-1]
    mixer = build_dense(found.spec, weights.__getitem__, x.shape[-1], width)
    with torch.no_grad():
        y: Tensor = mixer(x, ctx, None, memory)
    return y


def _opaque(found: Found) -> bool:
    return found.spec.core.pattern.kind == "opaque"


def random_like(node: fx.Node, given: dict[fx.Node, Any], generator: torch.Generator) -> Tensor:
    """Random numbers of a node's shape, float64."""
    shape = concrete_shape(node, given)
    return torch.randn(shape, generator=generator, dtype=torch.float64)
