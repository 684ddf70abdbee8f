"""Attention inside of modules that torch.export could not follow, each read from its own module.

A model may cut its text by what it predicts, and ask for sizes while it runs (BLT's patches): the
hole in the graph is then most of the model. The attention in there is called with tensors, and is
captured alone (`reattend.alone`), the model making its inputs.
"""

from __future__ import annotations

from reattend.alone import read_alone
from reattend.corewatch import cores_by_module
from reattend.found import FoundAttention
from reattend.repeated import accept
from reattend.running import evaluation
from reattend.search import Search


def inside_holes(search: Search, result: FoundAttention) -> None:
    """Add the blocks that pass every gate; of the others `reattend.overlooked` tells.

    Args:
        search: the model with its holes.
        result: blocks found so far; changed.
    """
    captured = search.captured
    if search.deferred or not captured.left_out:
        return
    with evaluation(captured.model):
        ran = cores_by_module(captured.model, captured.inputs)
    for path, count in ran.items():
        if count != 1 or not any(f"{path}.".startswith(f"{h}.") for h in captured.left_out):
            continue
        owners = (p for p in (path, path.rpartition(".")[0]) if p)
        case = next(filter(None, (read_alone(search, p) for p in owners)), None)
        if case is not None:
            accept(result, (case, None))
