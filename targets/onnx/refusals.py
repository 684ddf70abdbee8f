"""Which blocks no ONNX node computes, and why."""

from __future__ import annotations

from reattend.errors import RefusedError
from reattend.install.binding import Binding
from reattend.mixers.config import BlockConfig
from reattend.mixers.linear_config import LinearConfig
from reattend.mixers.recurrent_config import RecurrentConfig
from reattend.mixers.sparse_linear_config import SparseLinearConfig

#: the way out for a kind of layer that has no node
STAY_DENSE = "keep it dense for this target (`to: dense`)"


def scores_beside(config: BlockConfig) -> str:
    """What a block does to its scores that no node has an input for; empty: nothing."""
    if config.core.sinks:
        return "its logit sinks have no input in the ONNX node yet"
    if config.q.growth is not None:
        return "its queries grow with position, which has no place in the ONNX node yet"
    if config.alibi is not None or config.relative is not None or config.added is not None:
        return "what it adds to its scores has no input in the ONNX node yet"
    return ""


def check_block(path: str, config: object, binding: Binding) -> None:
    """Refuse a block that no node computes.

    Raises:
        RefusedError: with the reason.
    """
    if not isinstance(config, BlockConfig):
        raise RefusedError(
            "this layer has no ONNX form yet",
            where=path,
            why=f"{type(config).__name__} has no node",
            next_step=STAY_DENSE,
        )
    why, next_step = "", "run this model in torch, from its Hugging Face folder"
    if config.cross:
        why = "it attends to another stream (cross-attention)"
    elif not binding.stepwise:
        why = "what the original module does besides attention needs the whole sequence"
    elif binding.cache is None:
        why = "it keeps no cache, and other layers of the model do"
    elif isinstance(config, SparseLinearConfig):
        why = "it chooses blocks of keys beside a sum of all of them, for which there is no node"
        next_step = "convert it as the preset moba does, which chooses alike, without the sum"
    elif isinstance(config, RecurrentConfig):
        if config.window and config.window_form == "terraced":
            why = "a window that is averaged with a state has a node only where it slides"
            next_step = "convert it with window_form: sliding"
    elif isinstance(config, LinearConfig) and config.window and config.rope != "before":
        why = "its state is made of keys that are not rotated, for which the node has no window"
        next_step = "convert it with rope: before, or with window: 0"
    elif config.core.pattern == "chunked":
        why = "chunked attention has no ONNX form yet"
    elif config.core.pattern == "opaque":
        why = "what it attends to is a mask of the model's own, which the ONNX graph does not make"
    why = why or scores_beside(config)
    if why:
        raise RefusedError(
            "this layer cannot be exported to ONNX", where=path, why=why, next_step=next_step
        )
