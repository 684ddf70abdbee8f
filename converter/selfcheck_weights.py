"""What the self-check feeds a block: random weights, and tokens one at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from reattend.mixers.block import OpaqueProjection
from reattend.mixers.dense import DenseAttention
from reattend.mixers.scores import shown
from reattend.passes.evaluate import attribute
from reattend.spec import Added, AttentionSpec, Gate, Norm, Opaque, RelativeBias

#: float64 results of one computation on the same numbers in other shapes
_SAME = 1e-11


def random_weights(
    gm: fx.GraphModule, spec: AttentionSpec, generator: torch.Generator
) -> dict[str, Tensor]:
    """Fresh tensors for every weight of the site: O(1) logits, gains near one, real biases."""
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

    def near(sources: tuple[tuple[str, str], ...]) -> None:
        """Weights whose meaning is not known: the model's own, each moved by a tenth."""
        for _, name in sources:
            value = attribute(gm, name).detach()
            if not value.is_floating_point():
                weights[name] = value
                continue
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            weights[name] = value.double() * (1 + 0.1 * noise) + 0.01 * noise

    for stream in (spec.q, spec.k, spec.v):
        if isinstance(stream.proj, Opaque):
            near(stream.proj.sources)
        else:
            matrix(stream.proj.weight, stream.proj.transposed)
            vector(stream.proj.bias, 0.0)
        norm = stream.first(Norm)
        if isinstance(norm, Norm):
            vector(norm.gain, 1.0 - norm.gain_offset)
            vector(norm.bias, 0.0)
    if isinstance(spec.join, Gate):
        matrix(spec.join.weight, spec.join.transposed)
        vector(spec.join.bias, 0.0)
    elif spec.join is not None:
        near(spec.join.sources)
    if spec.out is not None:
        matrix(spec.out.weight, spec.out.transposed)
        vector(spec.out.bias, 0.0)
    vector(spec.core.sinks, 0.0)
    if isinstance(spec.core.bias, Added):
        near(spec.core.bias.sources)
    # sixteenths are exact in every dtype a mask may pass through
    if isinstance(spec.core.bias, RelativeBias):
        shape = attribute(gm, spec.core.bias.weight).shape
        sixteenths = torch.randint(-32, 33, shape, generator=generator)
        weights[spec.core.bias.weight] = sixteenths.double() / 16
    return weights


def weight_names(spec: AttentionSpec) -> list[str]:
    """Every stored tensor the site reads."""
    names: list[str | None] = []
    for stream in (spec.q, spec.k, spec.v):
        norm = stream.first(Norm)
        if isinstance(stream.proj, Opaque):
            names += [source for _, source in stream.proj.sources]
        else:
            names += [stream.proj.weight, stream.proj.bias]
        names += [norm.gain, norm.bias] if isinstance(norm, Norm) else []
    if isinstance(spec.join, Gate):
        names += [spec.join.weight, spec.join.bias]
    elif spec.join is not None:
        names += [source for _, source in spec.join.sources]
    names += [spec.out.weight, spec.out.bias] if spec.out is not None else []
    if isinstance(spec.core.bias, Added):
        names += [source for _, source in spec.core.bias.sources]
    names += [spec.core.bias.weight] if isinstance(spec.core.bias, RelativeBias) else []
    names.append(spec.core.sinks)
    return [n for n in names if n]


def alone(
    mixer: DenseAttention,
    x_BND: Tensor,
    source_BMD: Tensor,
    extras: tuple[Tensor, ...],
    fixed: bool,
) -> str:
    """Why the model's own steps mix tokens or rows of the batch; empty if they do not.

    Cached decoding runs them on new tokens only, so halves and single tokens must give the same
    as all together.

    Args:
        mixer: the rebuilt block in float64.
        x_BND, source_BMD: what queries, and keys and values, are made from.
        extras: further inputs of the block's own steps.
        fixed: the model has one length only, so tokens never come in parts.
    """
    for name, source in (("q", x_BND), ("k", source_BMD), ("v", source_BMD)):
        module = getattr(mixer, f"{name}_proj")
        if not isinstance(module, OpaqueProjection):
            continue
        inputs = (source, *(extras[i] for i in module.extras))
        if not _splits(module.program, inputs, fixed):
            return f"the model's own steps of {name} mix tokens, or know their position"
    if mixer.joint is None:
        return ""
    generator = torch.Generator().manual_seed(6)
    core = mixer.config.core
    shape = (x_BND.shape[0], x_BND.shape[1], core.heads, core.v_head_dim)
    y_BNHe = torch.randn(shape, generator=generator, dtype=x_BND.dtype)

    def joined(y: Tensor, x: Tensor) -> Tensor:
        return mixer.join(y.transpose(1, 2), x)

    if not _splits(joined, (y_BNHe, x_BND), fixed):
        return "what follows the core mixes tokens, or knows their position"
    return ""


def _splits(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], fixed: bool) -> bool:
    """Whether a function of [B, N, ..] gives the same in parts, along batch and tokens."""
    with torch.no_grad():
        whole = function(*inputs)
        sizes = inputs[0].shape
        for axis, cuts in ((0, (1,)), (1, (1, sizes[1] // 2, sizes[1] - 1))):
            if fixed and axis == 1:
                continue
            for at in cuts:
                if not 0 < at < sizes[axis]:
                    continue
                try:
                    parts = [
                        function(*(_piece(t, sizes, axis, start, stop) for t in inputs))
                        for start, stop in ((0, at), (at, sizes[axis]))
                    ]
                except RuntimeError:  # a size of the captured example is written into it
                    return False
                again = torch.cat(parts, axis)
                if again.shape != whole.shape or not bool(
                    ((again - whole).abs() <= _SAME * whole.abs().max()).all()
                ):
                    return False
    return True


def _piece(t: Tensor, sizes: torch.Size, axis: int, start: int, stop: int) -> Tensor:
    """Part of a tensor along an axis, whole where nothing in it is as long.

    Beside the first input, tokens may be another axis (a factor [B, 1, N, 1]).
    """
    axes = [0] if axis == 0 else range(1, t.dim())
    at = next((i for i in axes if i < t.dim() and t.shape[i] == sizes[axis]), None)
    return t if at is None else t.narrow(at, start, stop - start)


def validity(mask: Tensor | None, x: Tensor, memory: Tensor | None) -> Tensor | None:
    """Which keys are real, [B, M]: the diagonal of a self mask, any row of a cross one."""
    if mask is None:
        return None
    allowed = shown(mask)
    while allowed.dim() < 4:
        allowed = allowed[None]
    allowed = allowed.expand(x.shape[0], -1, x.shape[1], -1)[:, 0]
    if memory is None:
        return torch.diagonal(allowed, dim1=-2, dim2=-1).contiguous()
    return allowed.any(1)
