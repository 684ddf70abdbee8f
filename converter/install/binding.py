"""How a submodule's call maps to a mixer's: which argument is what, found by value.

Names differ between architectures (`layer_past`, positional hidden states, no `position_ids`);
values do not.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reattend.install.pieces import AroundConfig, FixedLeaf, HandedOn, Path
from reattend.mixers.config import Frozen


class TableRef(Frozen):
    """Where cos or sin of a pair stands: an argument's leaf, a component, columns, a factor."""

    path: Path
    part: str
    columns: tuple[int, ...]


class Binding(Frozen):
    """Paths of a call's leaves: (parameter name, index or key, ...).

    `mask_adds_bias`: the mask argument also adds the position bias, which the mixer adds itself.
    `around`: what the owner does besides its block; None where it is exactly the block.
    `mask_hides`: it is bool and True where a key is hidden (MPT), not where it is seen.
    `mask_window`: beside what it hides, the block hides later keys, and those this many tokens back
    (GPT-Neo; 0: as far back as there are). None: the mask is all that hides.
    `extras`: what the block's own steps read beside (`Context.extras`). `extras_spare`: for each
    the dtype of the ones [B, N] that it means where a call leaves it out; empty: it must be there.
    `absent`: parameters that the captured call left out, so what a tensor there does is not known.
    `layer_shift`: a number that each call adds to `layer_idx` (a module called several times).
    `whole`: the block's own steps need all tokens of a sequence in one call.
    `fixed`: arguments that must be as they were at capture, where it was of one size of image.
    `hands`: keys and values that the owner leaves in an argument for later blocks.
    `projection`: path of the module that is the block's output projection, where the owner ends
    before it; it is trained with the block.
    """

    hidden: Path
    memory: Path | None = None
    mask: Path | None = None
    mask_adds_bias: bool = False
    mask_hides: bool = False
    mask_window: int | None = None
    cos: TableRef | None = None
    sin: TableRef | None = None
    position: Path | None = None
    cache: Path | None = None
    cache_part: str | None = None
    layer_idx: int = 0
    layer_shift: Path | None = None
    output: Any = "y"
    around: AroundConfig | None = None
    extras: tuple[Path, ...] = ()
    extras_spare: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    whole: bool = False
    fixed: tuple[FixedLeaf, ...] = ()
    hands: tuple[HandedOn, ...] = ()
    projection: str = ""

    @property
    def stepwise(self) -> bool:
        """Whether a call may bring new tokens only, beside a cache of those before."""
        return not self.whole and (self.around is None or self.around.stepwise)


def bound(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by parameter name, defaults left out, `**kwargs` flattened."""
    return by_name(signature_of(module), args, kwargs)


def signature_of(module: nn.Module) -> inspect.Signature:
    """How a module is called; a converted block answers for the owner it replaced."""
    kept = getattr(module, "signature", None)
    return kept if isinstance(kept, inspect.Signature) else inspect.signature(module.forward)


def by_name(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """`bound` for a known signature."""
    found = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            found.update(found.pop(name, {}))
    return found


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every leaf of nested mappings, lists and tuples, with its path."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))
    else:
        yield path, value


def shared_tensors(got: Any, expected: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """What two results both hold, in order: a converted block leaves out what nothing reads."""
    if isinstance(got, Tensor) and isinstance(expected, Tensor):
        yield got, expected
    elif isinstance(got, Mapping) and isinstance(expected, Mapping):
        for key in got:
            yield from shared_tensors(got[key], expected.get(key))
    elif isinstance(got, list | tuple) and isinstance(expected, list | tuple):
        for a, b in zip(got, expected, strict=False):
            yield from shared_tensors(a, b)


def read(arguments: dict[str, Any], path: Path | None) -> Any:
    """The leaf at `path`, None where the call does not have it."""
    value: Any = arguments if path is not None else None
    for step in path or ():
        if value is None:
            return None
        if isinstance(value, Mapping):
            value = value.get(step)
        else:
            value = value[step] if int(step) < len(value) else None
    return value


def same(a: Any, b: Tensor) -> float:
    """Relative difference of two tensors of one shape and kind; infinite otherwise."""
    if not isinstance(a, Tensor) or a.shape != b.shape or a.is_complex() != b.is_complex():
        return float("inf")
    if a.is_floating_point() != b.is_floating_point():
        return float("inf")
    if not a.is_floating_point():
        return 0.0 if bool((a == b).all()) else float("inf")
    finite = b.abs() < _huge(b)
    if not bool((finite == (a.abs() < _huge(a))).all()):
        return float("inf")
    x, y = a.detach().double(), b.detach().double()
    scale = float(y[finite].abs().max()) if bool(finite.any()) else 0.0
    gap = float((x[finite] - y[finite]).abs().max()) if bool(finite.any()) else 0.0
    return gap / max(scale, 1e-30) if gap else 0.0


def _huge(value: Tensor) -> float:
    """From here on a number hides a score instead of adding to it (float16 ends at 65504)."""
    return 6e4 if value.dtype == torch.float16 else 1e30


def rounding(value: Tensor) -> float:
    """How far apart two runs of one computation may be, relative to the largest number.

    `Capture.values` is bit for bit what the model computes wherever kernels are deterministic;
    this leaves two units in the last place, or 1e-3, for where they are not.
    """
    if not value.is_floating_point():
        return 0.0
    return max(1e-3, 2 * torch.finfo(value.dtype).eps)


def equal(a: Any, b: Tensor) -> bool:
    """Whether two tensors are one value, computed twice."""
    return same(a, b) <= rounding(b)


def match(arguments: dict[str, Any], value: Tensor) -> Path | None:
    """The leaf that equals `value` best, within rounding."""
    scored = [(same(leaf, value), path) for path, leaf in leaves(arguments) if equal(leaf, value)]
    return min(scored, key=lambda s: s[0])[1] if scored else None


def match_output(
    output: Any, value: Tensor, arguments: dict[str, Any], bias_1HNM: Tensor | None = None
) -> Any | None:
    """The shape of a module's result with "y" where `value` stands, or None.

    Other tensors that are arguments passed on become their path, and what the block adds to its
    scores becomes "bias" (later layers may take it from here). The rest become None: they are
    attention weights, which a converted layer does not form.
    """
    found = 0

    def walk(part: Any) -> Any:
        nonlocal found
        if isinstance(part, Tensor):
            if equal(part, value):
                found += 1
                return "y"
            path = next((p for p, leaf in leaves(arguments) if leaf is part), None)
            if path is None and bias_1HNM is not None and equal(part, bias_1HNM):
                return "bias"
            return {"path": list(path)} if path is not None else None
        if type(part) in (tuple, list):
            return {type(part).__name__: [walk(item) for item in part]}
        path = next((p for p, leaf in leaves(arguments) if part is not None and leaf is part), None)
        return {"path": list(path)} if path is not None else None

    shape = walk(output)
    return shape if found == 1 else None


def unmatched(shape: Any, output: Any) -> list[Tensor]:
    """Tensors of a result for which `match_output` has no place."""
    if isinstance(output, Tensor):
        return [output] if shape is None else []
    if type(output) not in (tuple, list) or not isinstance(shape, dict):
        return []
    items = shape.get(type(output).__name__, ())
    return [t for s, o in zip(items, output, strict=True) for t in unmatched(s, o)]


def returns_bias(shape: Any) -> bool:
    """Whether a result's shape has a leaf for the position bias."""
    if isinstance(shape, dict) and "path" not in shape:
        return any(returns_bias(item) for items in shape.values() for item in items)
    return bool(shape == "bias")


def pack(shape: Any, y: Tensor, arguments: dict[str, Any], bias: Tensor | None = None) -> Any:
    """Build a module's result from its shape."""
    if shape == "y":
        return y
    if shape == "bias":
        return bias
    if shape is None:
        return None
    if "path" in shape:
        return read(arguments, tuple(shape["path"]))
    kind, items = next(iter(shape.items()))
    built = [pack(item, y, arguments, bias) for item in items]
    return tuple(built) if kind == "tuple" else built
