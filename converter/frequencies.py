"""Where a block's rotary table comes from: the owner's arguments, positions, or frequencies."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from reattend.capture import Capture
from reattend.install.binding import match
from reattend.install.tables import match_tables
from reattend.passes.evaluate import ancestors, attribute
from reattend.passes.find.reasons import NotUnderstood
from reattend.passes.find.sites import Found
from reattend.spec import Rotary, Stream


def bind_rotation(
    captured: Capture, item: Found, arguments: dict[str, Any]
) -> tuple[Any, Any, Any]:
    """The model's own tables where the owner receives them, else positions, else inv_freq."""
    rotation = item.region.rotation
    assert rotation is not None and rotation.spec is not None
    cos, sin = match_tables(arguments, rotation.cos_NP, rotation.sin_NP)
    exact_frequencies(captured, item)
    if cos is not None and sin is not None:
        if abs(cos[1] - 1) > 1e-4 or abs(sin[1] - 1) > 1e-4:
            raise NotUnderstood(f"the stream scales the model's rotary table by {cos[1]:g}")
        return cos[0], sin[0], None
    positions = torch.arange(rotation.cos_NP.shape[0])
    for batch in (1, captured.sizes.get("B", 1)):
        path = match(arguments, positions.expand(batch, -1))
        if path is not None:
            return None, None, path
    return None, None, None


def exact_frequencies(captured: Capture, item: Found) -> None:
    """Replace fitted frequencies by the stored tensor they came from, where one matches.

    They are fitted to the tables a block is given: no closer than the model's own dtype.
    """
    region = item.region
    assert region.rotation is not None and region.rotation.spec is not None
    fitted = torch.tensor(region.rotation.spec.inv_freq, dtype=torch.float64)
    dtypes = {p.dtype for p in captured.model.parameters() if p.is_floating_point()}
    room = max([1e-4, *(4 * torch.finfo(dtype).eps for dtype in dtypes)])
    for node in ancestors(region.externals):
        if node.op != "get_attr":
            continue
        value = attribute(captured.gm, str(node.target))
        if not isinstance(value, Tensor) or value.dim() != 1 or value.numel() != fitted.numel():
            continue
        exact = value.double().cpu()
        if bool(((exact - fitted).abs() <= room * fitted.abs().clamp_min(1e-6)).all()):
            frequencies = tuple(float(v) for v in exact)
            q, k = item.spec.q, item.spec.k
            item.spec = replace(
                item.spec,
                q=_with_frequencies(q, frequencies),
                k=_with_frequencies(k, frequencies),
            )
            return


def _with_frequencies(stream: Stream, frequencies: tuple[float, ...]) -> Stream:
    steps = tuple(
        replace(s, inv_freq=frequencies) if isinstance(s, Rotary) else s for s in stream.steps
    )
    return replace(stream, steps=steps)
