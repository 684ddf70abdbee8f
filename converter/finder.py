"""find_attention: capture, normalise, read, locate, judge, and look for what was overlooked."""

from __future__ import annotations

from typing import Any

from torch import nn

from reattend.found import AttentionSite, FoundAttention, RefusedSite
from reattend.host import inputs_on_host, on_host
from reattend.judge import judged
from reattend.missed import already_converted, missed, never_fused
from reattend.overlooked import overlooked
from reattend.passes.find.sites import Found, Missed, find
from reattend.repeated import accept, numbered
from reattend.search import Search

__all__ = ["AttentionSite", "FoundAttention", "RefusedSite", "find_attention"]


def find_attention(model: nn.Module, inputs: dict[str, Any] | None = None) -> FoundAttention:
    """Find, understand and prove the attention blocks of a model.

    Args:
        model: any module torch.export can capture; not changed. One that is not on the CPU is
            read through a copy there. One without weights (parameters on the meta device) is read
            and not proven: its sites are `deferred`.
        inputs: example keyword arguments, batch and length >= 2 and distinct; None makes them
            up for transformers models.

    Raises:
        CaptureError: the model cannot be captured.
        ArgumentError: inputs are needed.
        ModelError: a buffer has no data.
    """
    search = Search(on_host(model), inputs_on_host(inputs))
    seen = find(search.gm, search.captured.placeholders(), search.inputs_at)
    search.locate([item for item in seen if isinstance(item, Found)])
    result = FoundAttention(search.captured)
    for item in seen:
        if isinstance(item, Missed):
            result.refused.append(missed(search, item))
        else:
            accept(result, judged(search, item))
    result.refused += never_fused(search)
    result.refused += overlooked(search, result)
    result.refused = already_converted(search, result.refused)
    numbered(result.sites)
    return result
