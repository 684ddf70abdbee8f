"""Which node and which state every class of sparse heads gets."""

from __future__ import annotations

from fractions import Fraction
from math import ceil

from reattend.errors import RefusedError
from reattend.mixers.config import CoreConfig
from reattend.mixers.sparse_config import HeadClass, SparseConfig
from reattend.patterns.pattern import HeadPattern
from reattend.targets.onnx.kept_body import KEPT
from reattend.targets.onnx.selected_layout import selected_form
from reattend.targets.onnx.sparse_form import Extra, SparseForm

#: what the nodes know of a pattern, a class and a block; a field added later is refused by name
_PATTERN = {
    "full", "sinks", "window", "window_slope", "stride", "powers", "columns", "slashes",
}  # fmt: skip
_CLASS = {"kv_heads", "pattern"}
_BLOCK = {
    "hidden_size", "memory_size", "q", "k", "v", "rotary", "core", "out_features", "out_bias",
    "relative", "alibi", "added", "gate", "join", "kind", "classes", "evict",
}  # fmt: skip
#: a state that keeps so much of a text keeps all of it, and its rows need not be found
_MOST = Fraction(3, 4)
#: tokens that rows of a growing window are counted for, at most
_BLOCK_TOKENS = 64


def sparse_form(path: str, config: SparseConfig, head_class: HeadClass) -> SparseForm:
    """The node of one class.

    Args:
        path: of the layer, for errors.
        config: the block.
        head_class: one of its classes.

    Raises:
        RefusedError: the class sees keys by something that no node has.
    """
    _check_known(path, config, head_class)
    pattern, core = head_class.pattern, config.core
    if pattern.select is not None:
        return selected_form(path, pattern, core)
    if pattern.full:
        return SparseForm("Attention")
    why = _why_every_row(pattern, config)
    if why:
        saves = f"reads: rows that the queries of a call see; no memory, because {why}"
        return SparseForm("PatternAttention", saves=saves)
    if pattern.window_slope or pattern.stride is not None or pattern.columns:
        return _kept_form(pattern, core)
    window = max(pattern.window, 1)  # a query sees itself
    if core.pattern == "sliding":
        window = min(window, core.window)
    rows = pattern.sinks + window
    saves = f"memory and reads: {rows} rows of a sequence, however long it is"
    return SparseForm("SparseAttention", rows, sinks=pattern.sinks, window=window, saves=saves)


def _why_every_row(pattern: HeadPattern, config: SparseConfig) -> str:
    """Why the state keeps every row; empty where sinks and a window of rows are enough."""
    if not config.evict:
        return "of `evict: false`"
    if not pattern.monotone:
        return "a later query may see again what an earlier one did not (not KV-monotone)"
    if sum(_shares(pattern)) > _MOST:
        return "nearly all of them may be seen again"
    return ""


def _shares(pattern: HeadPattern) -> tuple[Fraction, Fraction]:
    """Of long texts, what the window and what strides keep: as simple fractions, no less."""
    slope, stride = Fraction(pattern.window_slope), pattern.stride
    window = slope.limit_denominator(_BLOCK_TOKENS)
    if float(window) != pattern.window_slope:
        window = min(Fraction(ceil(slope * n), n) for n in range(1, _BLOCK_TOKENS + 1))
    return window, Fraction(1, stride.period) if stride else Fraction(0)


def _kept_form(pattern: HeadPattern, core: CoreConfig) -> SparseForm:
    """States of what a later query may see: a ring for the window, and what stays by its place."""
    grown, strided = _shares(pattern)
    ring = max(pattern.window, 1)  # a query sees itself
    if core.pattern == "sliding" and core.window <= ring:
        ring, grown = core.window, Fraction(0)
    stride = pattern.stride
    each = stride.block if stride else 0
    block = each * stride.period if stride else 1
    stay = pattern.sinks + len(pattern.columns) + 1
    parts = [(f"{stay - 1}", stay > 1), (f"{strided} of a sequence", bool(stride))]
    words = " + ".join(text for text, is_there in parts if is_there) or "none"
    window = f"{ring}" + (f" + {grown} of a sequence" if grown else "")
    saves = f"memory and reads: rows that stay ({words}) and a window ({window})"
    return SparseForm(
        KEPT, ring, grown.denominator, grown.numerator, ring=True, saves=saves,
        extra=tuple(
            Extra(f"kept_{name}", width, block, stay, each)
            for name, width in (("key", core.qk_head_dim), ("value", core.v_head_dim))
        ),
    )  # fmt: skip


def _check_known(path: str, config: SparseConfig, head_class: HeadClass) -> None:
    """Refuse what was added to patterns after these nodes were written."""
    given = head_class.pattern.model_dump(exclude_defaults=True)
    if head_class.pattern.select is not None:  # its nodes know less: `selected_form`
        given = {}
    unknown = [f"pattern.{name}" for name in given if name not in _PATTERN]
    unknown += [n for n in head_class.model_dump(exclude_defaults=True) if n not in _CLASS]
    unknown += [n for n in config.model_dump(exclude_defaults=True) if n not in _BLOCK]
    if unknown:
        raise RefusedError(
            "this sparse layer cannot be exported to ONNX",
            where=path,
            why=f"no node of the file knows {', '.join(sorted(set(unknown)))}",
            next_step="keep it dense for this target (`to: dense`), or use a pattern of sinks, "
            "windows, strides, powers, columns or slashes",
        )
    if not config.core.causal:
        raise RefusedError(
            "this sparse layer cannot be exported to ONNX",
            where=path,
            why="it is not causal, and a file that decodes from states is",
            next_step="keep it dense for this target (`to: dense`)",
        )
