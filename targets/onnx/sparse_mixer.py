"""Sparse mixers as they are traced: every class of heads calls the op of its node.

Layout letters: B batch, N new tokens, H query heads, G key/value heads, d and e widths.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from reattend.install.adapter import Adapter
from reattend.kernels.attention import attention
from reattend.mixers.base import Context, State
from reattend.mixers.dense import DenseAttention
from reattend.mixers.flowing import FlowingAttention
from reattend.mixers.linear import LinearAttention
from reattend.mixers.mixed import MixedAttention
from reattend.mixers.recurrent import RecurrentAttention
from reattend.mixers.sparse import SparseAttention
from reattend.parts import picked, query_heads
from reattend.passes.rewrite.sparse_build import sparse_like
from reattend.targets.onnx.kept_body import KEPT
from reattend.targets.onnx.linear_mixer import traced_linear
from reattend.targets.onnx.recurrent_mixer import traced_recurrent
from reattend.targets.onnx.selected_body import SELECTED
from reattend.targets.onnx.selected_ops import selected_attention
from reattend.targets.onnx.sparse_ops import (
    kept_attention,
    pattern_attention,
    sink_window_attention,
)
from reattend.targets.onnx.state import FixedGroups, FixedState


class _New(NamedTuple):
    """Rows of new tokens, and the states that the classes' ops will write them to."""

    keys: Tensor
    values: Tensor
    states: FixedGroups


class TracedSparse(SparseAttention):
    """A SparseAttention that also takes states of fixed capacity; without one it is as before."""

    def project(
        self, x_BND: Tensor, source_BMD: Tensor | None, ctx: Context, state: State | None
    ) -> tuple[Any, Any]:
        """With a fixed state: queries; keys and values. Which are real, the state knows."""
        if not isinstance(state, FixedGroups):
            return super().project(x_BND, source_BMD, ctx, state)
        query, rows = DenseAttention.project(self, x_BND, source_BMD, ctx, state)
        assert rows is not None  # never a cross-attention block
        return query[0], rows

    def store(self, new: Any, state: State) -> Any:
        """Nothing yet: what a class writes is up to its op."""
        if not isinstance(state, FixedGroups):
            return super().store(new, state)
        keys, values = new
        return _New(keys, values, state)

    def attend(
        self, query: Any, rows: Any, ctx: Context, span: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """See `Mixer.attend`."""
        if not isinstance(rows, _New):
            return super().attend(query, rows, ctx, span)
        return self.together(
            [self._node(query, rows, i, state) for i, state in enumerate(rows.states.parts)]
        )

    def _node(self, q_BHNd: Tensor, new: _New, number: int, state: Any) -> Tensor:
        """The output of one class' query heads, [B, heads, N, e]."""
        assert isinstance(state, FixedState)
        head_class = self.config.classes[number]
        form, core, kv_heads = state.layout.sparse, self.config.core, head_class.kv_heads
        assert form is not None
        keys, values = picked(new.keys, kv_heads), picked(new.values, kv_heads)
        q = picked(q_BHNd, query_heads(core, kv_heads))
        rules = {"scale": core.scale, "sliding_window": core.window, "softcap": core.softcap}
        y: Tensor
        if form.op == "SparseAttention":
            y, first, second = sink_window_attention(
                q, keys, values, *state.past(), *state.span(),
                sinks=form.sinks, window=form.window, **rules,
            )  # fmt: skip
            state.put(first, second)
            return y
        pattern = head_class.pattern.model_dump_json(exclude_defaults=True)
        if form.op == KEPT:
            y, *written = kept_attention(
                q, keys, values, *state.past(), *state.span(), pattern=pattern, **rules
            )
            state.put(*written)
            return y
        if form.op in SELECTED:
            method, (first, second, *more) = self.selecting[str(number)], state.past()
            weights = [*method.parameters(), *method.buffers()]
            third = more[0] if more else state.noted(head_class.pattern)
            fourth = more[1] if len(more) > 1 else first
            rotary = self.config.rotary
            y, *kept = selected_attention(
                q, keys, values, first, second, first if third is None else third, fourth, weights,
                *state.span(), pattern=pattern, **rules,
                inv_freq=list(rotary.inv_freq) if rotary else [],
            )  # fmt: skip
            state.put(*kept[: 2 + len(more)])
            state.note(kept[2])
            return y
        rows = state.update(keys, values)
        if form.op == "PatternAttention":
            y = pattern_attention(q, *rows, *state.span(), pattern=pattern, **rules)
        else:
            y = attention(q, *rows, *state.span(), **rules)[0]
        return y


def make_traceable(model: nn.Module) -> None:
    """Let all blocks of a model take states of fixed capacity; changes `model`."""
    for module in model.modules():
        if isinstance(module, Adapter):
            module.mixer = _traced(module.mixer)
        elif isinstance(module, MixedAttention):
            for i, group in enumerate(module.groups):
                module.groups[i] = _traced(group)


def _traced(mixer: Any) -> Any:
    """The same modules in a mixer that can be traced; itself, where it can."""
    if isinstance(mixer, RecurrentAttention | FlowingAttention):
        return traced_recurrent(mixer)
    if isinstance(mixer, LinearAttention):
        return traced_linear(mixer)
    if not isinstance(mixer, SparseAttention):
        return mixer
    made = sparse_like(mixer, mixer.config, TracedSparse)
    made.selecting = mixer.selecting  # what chooses keeps its weights
    return made
