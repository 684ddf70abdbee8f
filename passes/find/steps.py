"""Read a stream step by step, from where it starts to its core: rows, norms, rotation, scale.

Nothing is matched by spelling. The subgraph between the two is *run*: an index tensor pushed
through it shows which row of the weight lands where, unit vectors show how it rotates with
position. Only norms, which are not linear, are recognised as nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from reattend.passes.evaluate import (
    Evaluator,
    ancestors,
    attribute,
    concrete_shape,
    on_paths,
    parameter_only,
)
from reattend.passes.find.growth import FoundGrowth, factors, read_growth
from reattend.passes.find.opaque import Start, unit_axis
from reattend.passes.find.reasons import NotUnderstood
from reattend.passes.find.rotary import Rotation, fit_rotation
from reattend.passes.normalize.forms import aten, is_op, is_projection, rms_norm
from reattend.spec import Norm, Opaque, Proj, Scale, Step


@dataclass
class FoundStream:
    """A stream and the graph nodes it was read from.

    `carried`: all of it is the model's own steps, and what they read is not known yet. `site`: path
    of the block whose keys or values these are, `projection` where they enter; empty: its own.
    `growth`: a factor by position, and what it is computed from.
    """

    projection: fx.Node
    hidden: fx.Node
    nodes: set[fx.Node]
    externals: list[fx.Node]
    steps: tuple[Step, ...]
    rotation: Rotation | None
    heads_first: bool = False
    carried: bool = False
    site: str = ""
    growth: FoundGrowth | None = None


def read_from(
    gm: fx.GraphModule,
    core_input: fx.Node,
    given: dict[fx.Node, Any],
    start: Start,
    make: Callable[[int, tuple[int, ...]], Proj | Opaque],
    grows: bool = True,
) -> FoundStream:
    """Read what follows `start`: a linear layer, or the end of the model's own steps.

    Args:
        gm, core_input, given: as in `read_stream`.
        start: its value is [B, N, p]; or [B, N, h, d], or, `heads_first`, [B, h, N, d].
        make: the first step, from heads and rows of p.
        grows: a factor by position is understood.
    """
    projection = start.node
    nodes = on_paths(core_input, start.parts)
    externals = sorted(
        {
            i
            for n in nodes - set(start.parts)
            for i in n.all_input_nodes
            if i not in nodes and not parameter_only(i)
        },
        key=list(gm.graph.nodes).index,
    )
    plain = Evaluator(gm)
    values = dict(zip(externals, plain.run(externals, given), strict=True))
    after = nodes - set(start.parts)
    norms = [n for n in gm.graph.nodes if n in after and is_op(n, rms_norm, aten.layer_norm)]
    skip: Callable[..., Any] = lambda x, *_a, **_k: x  # noqa: E731
    linear = Evaluator(gm, promote=torch.float64, replace=dict.fromkeys(norms, skip))
    like, shaped = _flat_like(start, given)

    growth = _growth(gm, core_input, linear, values, shaped, like, norms, given)
    if growth is not None and not grows:
        raise NotUnderstood(f"a stream is multiplied by {growth.factor.name}")

    def run(node: fx.Node, y_BNp: Tensor) -> Tensor:
        out: Tensor = linear.run([node], {**values, **shaped(y_BNp)})[0]
        return out

    def push(y_BNp: Tensor) -> Tensor:
        return run(core_input, y_BNp)

    heads, rows, scale_Hd = _row_map(push, like)
    proj = make(heads, rows)
    coarse = any(
        getattr(v, "dtype", None) in (torch.bfloat16, torch.float16) for v in values.values()
    )
    rotation = fit_rotation(push, like, proj, scale_Hd, 1e-2 if coarse else 1e-5)
    steps: list[Step] = [proj]
    if norms:
        steps += _norm_steps(gm, norms, proj)
    if rotation is not None and rotation.spec is not None:
        before = bool(norms) and _rotates_before(norms[0], run, like)
        steps.insert(1 if before else len(steps), rotation.spec)
    constant = rotation.constant if rotation is not None else _uniform(scale_Hd)
    by_position = growth.spec if growth is not None else None
    if constant != 1.0 or by_position is not None:
        if norms and constant != 1.0:
            raise NotUnderstood("a constant factor beside a norm in the same stream")
        steps.append(Scale(constant, by_position))
    hidden = projection.args[0]  # of a layer; where own steps begin, their caller knows
    hidden = hidden if isinstance(hidden, fx.Node) else projection
    first = start.heads_first
    return FoundStream(
        projection, hidden, nodes, externals, tuple(steps), rotation, first,
        growth=growth if by_position is not None else None,
    )  # fmt: skip


def _growth(
    gm: fx.GraphModule,
    core_input: fx.Node,
    linear: Evaluator,
    values: dict[fx.Node, Any],
    shaped: Callable[[Tensor], dict[fx.Node, Tensor]],
    like: Tensor,
    norms: list[fx.Node],
    given: dict[fx.Node, Any],
) -> FoundGrowth | None:
    """The factor by position of a stream; from here on it is one in `values`."""
    noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(3), dtype=like.dtype)

    def push(other: dict[fx.Node, Any]) -> Tensor:
        out: Tensor = linear.run([core_input], {**values, **other, **shaped(noise)})[0]
        return out

    found = factors(values, (like.shape[0], like.shape[1]), push)
    if not found:
        return None
    if len(found) > 1 or found[0] in ancestors(norms):
        raise NotUnderstood("a stream is multiplied by position more than once, or before a norm")
    growth = read_growth(gm, found[0], like.shape[1], given)
    values[found[0]] = torch.ones_like(values[found[0]])
    return growth


def _flat_like(
    start: Start, given: dict[fx.Node, Any]
) -> tuple[Tensor, Callable[[Tensor], dict[fx.Node, Tensor]]]:
    """Zeros [B, N, p] in fp64, and what makes of such a tensor the values of the stream's start."""
    sizes = concrete_shape(start.node, given)
    shapes = [concrete_shape(n, given) for n in start.parts]
    if all(
        len(s) == 3 or (is_projection(n) and unit_axis(n))
        for s, n in zip(shapes, start.parts, strict=True)
    ):
        widths = [s[-1] for s in shapes]
        tokens = sizes[1] * (sizes[2] if len(sizes) == 4 else 1)

        def side_by_side(y_BNp: Tensor) -> dict[fx.Node, Tensor]:
            pieces = zip(start.parts, y_BNp.split(widths, -1), shapes, strict=True)
            return {n: y.reshape(shape) for n, y, shape in pieces}

        return torch.zeros(sizes[0], tokens, sum(widths), dtype=torch.float64), side_by_side
    if len(sizes) != 4 or is_projection(start.node):
        raise NotUnderstood(
            f"projection {start.node.name} has {len(sizes)} axes, not batch, token, row"
        )
    batch, one, two, width = sizes
    heads, tokens = (one, two) if start.heads_first else (two, one)

    def shaped(y_BNp: Tensor) -> dict[fx.Node, Tensor]:
        y = y_BNp.unflatten(-1, (heads, width))
        return {start.node: y.transpose(1, 2) if start.heads_first else y}

    return torch.zeros(batch, tokens, heads * width, dtype=torch.float64), shaped


def _row_map(push: Callable[[Tensor], Tensor], like: Tensor) -> tuple[int, tuple[int, ...], Tensor]:
    """Which row lands in (head, dimension), at position 0 where nothing rotates: H, rows, scale."""
    rows = torch.arange(like.shape[-1], dtype=torch.float64)
    scale_BHNd = push(torch.ones_like(like))
    index_BHNd = push((rows + 1).expand_as(like).clone())
    if scale_BHNd.dim() != 4 or scale_BHNd.shape[0] != like.shape[0]:
        raise NotUnderstood(
            f"core input has shape {tuple(scale_BHNd.shape)}, not batch, head, token, width"
        )
    if scale_BHNd.shape[2] != like.shape[1]:
        more = int(scale_BHNd.shape[2]) - int(like.shape[1])
        if 0 < more < int(like.shape[1]):
            raise NotUnderstood(
                f"{more} of its rows come from no token: a learned or empty key beside the tokens'"
            )
        raise NotUnderstood("tokens are regrouped between projection and core (windows, chunks)")
    scale, index = scale_BHNd[:, :, 0], index_BHNd[:, :, 0]
    if (scale.abs() < 1e-12).any():
        raise NotUnderstood("a head dimension that reads no single projection row")
    row_Hd = (index / scale - 1).round()
    exact = (index - (row_Hd + 1) * scale).abs() <= 1e-6 * index.abs().clamp_min(1)
    generator = torch.Generator().manual_seed(2)
    y_BNp = 30 * torch.randn(like.shape, generator=generator, dtype=torch.float64)
    picked = torch.stack([y[row_Hd[0].long().clamp(0, like.shape[-1] - 1)] for y in y_BNp[:, 0]])
    exact &= (push(y_BNp)[:, :, 0] - picked * scale).abs() <= 1e-9 * y_BNp.abs().max()
    if not bool(exact.all()) or not bool((row_Hd == row_Hd[:1]).all()):
        raise NotUnderstood("between projection and core stands something that is not a row map")
    flat = tuple(int(r) for r in row_Hd[0].reshape(-1).tolist())
    return row_Hd.shape[1], flat, scale[0]


def _uniform(scale_Hd: Tensor) -> float:
    if bool((scale_Hd - scale_Hd.flatten()[0]).abs().max() > 1e-12):
        raise NotUnderstood("a stream is scaled per head or per dimension")
    return float(scale_Hd.flatten()[0])


def _norm_steps(gm: fx.GraphModule, norms: list[fx.Node], proj: Proj | Opaque) -> list[Step]:
    """Norm nodes as steps: over one head, or over the whole stream."""
    if len(norms) > 1:
        raise NotUnderstood("more than one norm in a stream")
    node = norms[0]
    size = int(node.meta["val"].shape[-1])
    if size == proj.width:
        scope = "head"
    elif size == len(set(proj.rows)):
        scope = "full"
    else:
        raise NotUnderstood(f"a norm over {size} dimensions, neither a head nor the stream")
    if is_op(node, rms_norm):
        gain, eps = node.args[1], float(node.args[2])
        name, offset = _gain(gm, gain)
        return [Norm("rms", scope, eps, name, offset)]  # type: ignore[arg-type]
    arguments = list(node.args) + [None] * 5
    name, _ = _gain(gm, arguments[2])
    bias, _ = _gain(gm, arguments[3])
    eps = float(arguments[4]) if arguments[4] is not None else 1e-5
    return [Norm("layer", scope, eps, name, 0.0, bias)]  # type: ignore[arg-type]


def _gain(gm: fx.GraphModule, node: Any) -> tuple[str | None, float]:
    """(attribute, offset) of a gain: `w`, or `offset + w`, seen through casts."""
    offset = 0.0
    while isinstance(node, fx.Node) and node.op != "get_attr":
        if is_op(node, aten.to, aten._to_copy, aten.type_as):
            node = node.args[0]
        elif is_op(node, aten.add):
            left, right = node.args[:2]
            number, node = (left, right) if isinstance(left, int | float) else (right, left)
            if not isinstance(number, int | float):
                raise NotUnderstood("a norm's gain is computed")
            offset += float(number)
        else:
            raise NotUnderstood("a norm's gain is computed")
    if node is None:
        return None, offset
    if attribute(gm, str(node.target)).dim() != 1:
        raise NotUnderstood("a norm's gain has more than one axis")
    return str(node.target), offset


def _rotates_before(norm: fx.Node, run: Callable[[fx.Node, Tensor], Tensor], like: Tensor) -> bool:
    """Whether the norm's input already depends on position."""
    source = norm.args[0]
    assert isinstance(source, fx.Node)
    out = run(source, torch.ones_like(like))
    tokens = out.movedim([i for i, s in enumerate(out.shape) if s == like.shape[1]][0], 0)
    return bool((tokens - tokens[:1]).abs().max() > 1e-9)
