"""Which node and which state every class of sparse heads gets."""

from __future__ import annotations

from reattend.errors import RefusedError
from reattend.mixers.sparse_config import HeadClass, SparseConfig
from reattend.patterns.pattern import HeadPattern
from reattend.targets.onnx.selected_layout import selected_form
from reattend.targets.onnx.sparse_form import SparseForm

#: what the nodes know of a pattern, a class and a block; a field added later is refused by name
_PATTERN = {
    "full", "sinks", "window", "window_slope", "stride", "powers", "columns", "slashes",
}  # fmt: skip
_CLASS = {"kv_heads", "pattern"}
_BLOCK = {
    "hidden_size", "memory_size", "q", "k", "v", "rotary", "core", "out_features", "out_bias",
    "relative", "alibi", "added", "gate", "join", "kind", "classes", "evict",
}  # fmt: skip


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
    window = max(pattern.window, 1)  # a query sees itself
    if core.pattern == "sliding":
        window = min(window, core.window)
    rows = pattern.sinks + window
    saves = f"memory and reads: {rows} rows of a sequence, however long it is"
    return SparseForm("SparseAttention", rows, pattern.sinks, window, saves)


def _why_every_row(pattern: HeadPattern, config: SparseConfig) -> str:
    """Why the state keeps every row; empty where sinks and a window of rows are enough."""
    if not config.evict:
        return "of `evict: false`"
    if not pattern.monotone:
        return "a later query may see again what an earlier one did not (not KV-monotone)"
    if pattern.window_slope:
        return "the window grows with the text"
    if pattern.stride is not None or pattern.columns:
        return "what stays lies elsewhere than in first tokens and a window"
    return ""


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
