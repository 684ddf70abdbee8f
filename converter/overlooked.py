"""Attention that runs and that nobody told of: nothing may be missed in silence.

The finder reads a graph; here the model is watched instead (`reattend.corewatch`), so what the
finder has no eye for still shows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from reattend.capture import Capture
from reattend.corewatch import cores_by_module
from reattend.host import device_of
from reattend.passes.evaluate import ancestors
from reattend.running import evaluation


def unaccounted(
    captured: Capture, told: Counter[str], ours: Collection[str]
) -> list[tuple[str, str]]:
    """(path, reason) of every core that ran inside of no module with a core already told of.

    Args:
        captured: the model and its example inputs.
        told: cores found or refused, by the path of their owner.
        ours: paths of blocks that a conversion replaced; what runs in them is known.
    """
    if device_of(captured.model).type == "meta":
        return []  # nothing runs without data
    with evaluation(captured.model):
        ran = cores_by_module(captured.model, captured.inputs)
    behind = ancestors([n for n in captured.gm.graph.nodes if n.op == "output"])
    stacks = (n.meta.get("nn_module_stack", {}).values() for n in behind)
    read = {path for stack in stacks for path, _ in stack} | {""}
    found: list[tuple[str, str]] = []
    for path, count in ran.items():
        if _around(path, ours):
            continue
        if path not in read and not _around(path, captured.left_out):
            continue  # nothing reads what it computes
        known = sum(told[p] for p in _around(path, told))
        found += [(path, _why(captured, path))] * (count - known)
    return found


def _why(captured: Capture, path: str) -> str:
    holes = _around(path, captured.left_out)
    if holes:
        hole = min(holes, key=len)
        return f"torch.export cannot follow {hole}: {captured.left_out[hole]}"
    return "a softmax averages values here, in a form that is not known as attention"


def _around(path: str, modules: Collection[str]) -> list[str]:
    """Those of some modules that are at a path or hold it."""
    return [m for m in modules if not m or path == m or path.startswith(m + ".")]
