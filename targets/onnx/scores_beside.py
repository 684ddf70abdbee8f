"""What stands beside a block's scores and has no place in a node, of any kind of file."""

from __future__ import annotations

from reattend.mixers.config import BlockConfig


def scores_beside(config: BlockConfig) -> str:
    """What a block does to its scores that no node has an input for; empty: nothing."""
    if config.core.sinks:
        return "its logit sinks have no input in the ONNX node yet"
    if config.q.growth is not None:
        return "its queries grow with position, which has no place in the ONNX node yet"
    if config.alibi is not None or config.relative is not None or config.added is not None:
        return "what it adds to its scores has no input in the ONNX node yet"
    return ""
