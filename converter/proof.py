"""The numbers of one block's self-check, and what can be read of it part by part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from reattend.capture import Capture
from reattend.passes.find.exits import read_exit
from reattend.passes.find.masks import read_mask
from reattend.passes.find.owners import owner_of
from reattend.passes.find.reasons import NotUnderstood
from reattend.passes.find.sites import Found, Missed
from reattend.passes.find.streams import read_stream
from reattend.selfcheck import TOLERANCE, both, random_like, self_check
from reattend.selfcheck_weights import random_weights
from reattend.spec import Norm, Opaque, Pattern, Proj, Rotary, Scale, Step, Stream


@dataclass(frozen=True)
class Numbers:
    """The self-check in numbers; relative errors in promoted float64 with random weights.

    Attributes:
        error, limit: the worst relative error over lengths and padding, and what is allowed.
        native, floor, dtype: difference with the model's own weights in its dtype, and the noise
            between two orders of summation.
        first: [batch, token, feature] of the first output apart by more than the limit, if any.
        expected, got: what the model and the rebuilt block have there.
        problem: why the check could not run.
    """

    error: float | None = None
    limit: float = TOLERANCE
    native: float | None = None
    floor: float | None = None
    dtype: str = ""
    first: tuple[int, ...] | None = None
    expected: float | None = None
    got: float | None = None
    problem: str = ""


def numbers_of(captured: Capture, found: Found) -> Numbers:
    """The self-check of a block, run again."""

    def inputs_at(length: int | None, padded: bool) -> dict[fx.Node, Any]:
        return captured.placeholders(captured.probe(length, padded))

    try:
        proof = self_check(captured.gm, found, inputs_at)
        first = _first_difference(captured.gm, found, inputs_at(None, False))
    except RuntimeError as problem:
        return Numbers(problem=(str(problem).splitlines() or [""])[0])
    place, expected, got = (None, None, None) if first is None else first
    return Numbers(
        proof.error, TOLERANCE, proof.native, proof.floor,
        str(proof.dtype).removeprefix("torch."), place, expected, got,
    )  # fmt: skip


def _first_difference(
    gm: fx.GraphModule, found: Found, given: dict[fx.Node, Any]
) -> tuple[tuple[int, ...], float, float] | None:
    """Place of the first output that differs, the region's value and the rebuilt block's."""
    generator = torch.Generator().manual_seed(1)
    weights = random_weights(gm, found.spec, generator)
    region = found.region
    x = random_like(region.hidden, given, generator)
    memory = None if region.memory is None else random_like(region.memory, given, generator)
    expected, y, rows = both(gm, found, given, torch.float64, weights, x, memory)
    if y.shape != expected.shape:
        return (), float("nan"), float("nan")
    apart = (y - expected).abs() > TOLERANCE * expected[rows].abs().max()
    apart[~rows] = False
    places = apart.nonzero()
    if not len(places):
        return None
    at = tuple(int(i) for i in places[0])
    return at, float(expected[at]), float(y[at])


def parts_of(captured: Capture, item: Found | Missed) -> dict[str, str]:
    """The spec so far: each part in words, or why it is not understood."""
    if isinstance(item, Found):
        spec = item.spec
        told = {n: described(s) for n, s in (("q", spec.q), ("k", spec.k), ("v", spec.v))}
        told["from"] = "one tensor" if spec.kind == "self" else "queries from one, the rest another"
        told["mask"] = pattern_text(spec.core.pattern) + _added(spec.core.bias)
        told["join"] = "nothing" if spec.join is None else type(spec.join).__name__.lower()
        told["out"] = "outside of the block" if spec.out is None else spec.out.weight
        return told
    gm, given, core = captured.gm, captured.placeholders(), item.core
    told = {}
    hidden: fx.Node | None = None
    read = [core]
    for name, node in zip("qkv", core.args[:3], strict=True):
        assert isinstance(node, fx.Node)
        try:
            stream = read_stream(gm, node, given)
        except (NotUnderstood, RuntimeError) as why:
            told[name] = f"not understood: {_line(why)}"
            continue
        told[name] = described(Stream("hidden", stream.steps))
        hidden = hidden or stream.hidden
        read.append(stream.projection)
    told["mask"] = _mask_text(captured, core)
    try:
        exit_ = read_exit(gm, core, hidden or core, given, owner_of(read))
        told["out"] = "outside of the block" if exit_.out is None else exit_.out.weight
    except (NotUnderstood, RuntimeError) as why:
        told["out"] = f"not understood: {_line(why)}"
    return told


def _mask_text(captured: Capture, core: fx.Node) -> str:
    def inputs_at(length: int | None, padded: bool) -> dict[fx.Node, Any]:
        return captured.placeholders(captured.probe(length, padded))

    mask: Any = core.args[3]
    try:
        found = read_mask(captured.gm, mask, bool(core.args[6]), inputs_at)
    except (NotUnderstood, RuntimeError) as why:
        return f"not understood: {_line(why)}"
    return pattern_text(found.pattern) + _added(found.bias)


def _line(problem: Exception) -> str:
    return (str(problem).splitlines() or [type(problem).__name__])[0][:160]


def _added(bias: Any) -> str:
    return "" if bias is None else f", plus {type(bias).__name__}"


def pattern_text(pattern: Pattern) -> str:
    """`causal`, `sliding 4096`, ..."""
    size = pattern.window or pattern.chunk
    return f"{pattern.kind} {size}" if size else pattern.kind


def described(stream: Stream) -> str:
    """A stream's steps in order, in words."""
    return " > ".join(_step(step) for step in stream.steps)


def _step(step: Step) -> str:
    if isinstance(step, Proj):
        return f"{step.weight} ({step.heads} x {step.width}{', bias' if step.bias else ''})"
    if isinstance(step, Opaque):
        return f"the model's own steps ({step.heads} x {step.width})"
    if isinstance(step, Norm):
        return f"{step.kind} norm over the {step.scope}"
    if isinstance(step, Rotary):
        scaled = f", scaled {step.scaling:.4g}" if step.scaling != 1.0 else ""
        return f"rotary {step.width} ({step.pairing}{scaled})"
    assert isinstance(step, Scale)
    return f"times {step.value:.6g}"
