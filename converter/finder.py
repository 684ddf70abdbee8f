"""find_attention: capture, normalise, read, locate, judge, and look for what was overlooked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from reattend.alone import frozen, judged_alone
from reattend.arguments import as_inputs
from reattend.found import AttentionSite, FoundAttention, RefusedSite
from reattend.host import inputs_on_host, on_host
from reattend.inside import inside_holes
from reattend.judge import judged
from reattend.missed import already_converted, missed, never_fused
from reattend.overlooked import overlooked
from reattend.pages import given_back
from reattend.passes.find.sites import Found, Missed, find
from reattend.repeated import accept, numbered
from reattend.search import Search
from reattend.source_empty import readable
from reattend.unwieldy import FIXED, has_images

__all__ = ["AttentionSite", "FoundAttention", "RefusedSite", "find_attention"]


def find_attention(
    model: nn.Module | str | Path, inputs: dict[str, Any] | None = None
) -> FoundAttention:
    """Find, understand and prove the attention blocks of a model.

    Args:
        model: any module torch.export can capture; not changed. Or a model folder, or the id of a
            model on this machine. One that is not on the CPU is
            read through a copy there. One without weights (parameters on the meta device) is read
            and not proven: its sites are `deferred`.
        inputs: example keyword arguments, batch and length >= 2 and distinct; None makes them
            up for transformers models.

    Raises:
        CaptureError: the model cannot be captured.
        ArgumentError: inputs are needed.
        ModelError: a buffer has no data, or the folder cannot be loaded.
    """
    with given_back():
        return _found(on_host(readable(model)), inputs_on_host(as_inputs(inputs)))


def _found(model: nn.Module, inputs: dict[str, Any] | None) -> FoundAttention:
    """`find_attention` for a module on the CPU."""
    search, seen = _read(model, inputs)
    search.locate([item for item in seen if isinstance(item, Found)])
    result = FoundAttention(search.captured)
    for item in seen:
        if isinstance(item, Missed):
            result.refused.append(missed(search, item))
        else:
            verdict = judged(search, item)
            accept(result, judged_alone(search, item) or verdict if frozen(verdict) else verdict)
    inside_holes(search, result)
    result.refused += never_fused(search)
    result.refused += overlooked(search, result)
    result.refused = already_converted(search, result.refused)
    numbered(result.sites)
    return result


def _read(model: nn.Module, inputs: dict[str, Any] | None) -> tuple[Search, list[Found | Missed]]:
    """The captured model and its cores; of one size of image if more can be read then."""
    search = Search(model, inputs)
    seen = find(search.gm, search.captured.placeholders(), search.inputs_at)
    symbolic = has_images(search.captured.inputs) and not search.gm.meta.get(FIXED)
    if not symbolic or not _missed(seen):
        return search, seen
    fixed = Search(model, inputs, images=False)
    again = find(fixed.gm, fixed.captured.placeholders(), fixed.inputs_at)
    return (fixed, again) if _missed(again) < _missed(seen) else (search, seen)


def _missed(seen: list[Found | Missed]) -> int:
    return sum(isinstance(item, Missed) for item in seen)
