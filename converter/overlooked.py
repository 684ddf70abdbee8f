"""Attention that runs and that nobody told of: nothing may be missed in silence.

The finder reads a graph; here the model is watched instead (`reattend.corewatch`), so what the
finder has no eye for still shows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from torch import fx

from reattend.capture import Capture
from reattend.corewatch import cores_by_module
from reattend.found import FoundAttention, RefusedSite
from reattend.nearest import CORE_FORM
from reattend.passes.base import path_of
from reattend.passes.evaluate import ancestors
from reattend.passes.find.sites import Found
from reattend.passes.normalize.forms import aten, is_op
from reattend.running import evaluation
from reattend.search import Search

#: what is told of a core whose result is dropped
UNREAD = "attention whose result nothing reads that the model returns"
_CORES = (aten.softmax, aten._softmax, aten.scaled_dot_product_attention)


def overlooked(search: Search, result: FoundAttention) -> list[RefusedSite]:
    """Every core that ran inside of no module with a core already told of.

    Args:
        search: the model, its example inputs, and blocks whose inside is known.
        result: cores found or refused so far.
    """
    captured, told, ours = search.captured, _told(result), search.ours
    if search.deferred:
        return []  # nothing runs without data
    with evaluation(captured.model):
        ran = cores_by_module(captured.model, captured.inputs)
    behind = ancestors([n for n in captured.gm.graph.nodes if n.op == "output"])
    stacks = (n.meta.get("nn_module_stack", {}).values() for n in behind)
    read = {path for stack in stacks for path, _ in stack} | {""}
    found: list[RefusedSite] = []
    for path, count in ran.items():
        if _around(path, ours):
            continue
        if path not in read and not _around(path, captured.left_out):
            continue  # nothing reads what it computes
        left = count - sum(told[p] for p in _around(path, told))
        unread = min(left, _unread(captured, path, count))
        reasons = [UNREAD] * unread + [_why(captured, path)] * (left - unread)
        found += [RefusedSite(path, r, step="watch", nearest=CORE_FORM) for r in reasons]
    return found


def _told(result: FoundAttention) -> Counter[str]:
    """Cores that were found or refused, by path of a module they ran in."""
    told: Counter[str] = Counter()
    for refused in result.refused:
        item = refused.item
        core = item.region.core if isinstance(item, Found) else item and item.core
        told[refused.path if core is None else _ran_in(core, refused.path)] += 1
    for site in result.sites:
        told[_ran_in(site.region.core, site.path)] += site.cores
    return told


def _ran_in(core: fx.Node, path: str) -> str:
    """Where a core ran: in the block at `path`, or elsewhere with weights from there."""
    ran = path_of(core)
    return path if f"{ran}.".startswith(f"{path}.") else ran


def _why(captured: Capture, path: str) -> str:
    holes = _around(path, captured.left_out)
    if holes:
        hole = min(holes, key=len)
        return f"torch.export cannot follow {hole}: {captured.left_out[hole]}"
    return "a softmax averages values here, in a form that is not known as attention"


def _unread(captured: Capture, path: str, ran: int) -> int:
    """How many of the cores that ran in a module nothing reads; 0 where the graph does not tell."""
    if captured.exact is None:
        return 0
    graph = captured.exact.graph
    cores = [n for n in graph.nodes if is_op(n, *_CORES) and path_of(n) == path]
    behind = ancestors([n for n in graph.nodes if n.op == "output"])
    return sum(n not in behind for n in cores) if len(cores) == ran else 0


def _around(path: str, modules: Collection[str]) -> list[str]:
    """Those of some modules that are at a path or hold it."""
    return [m for m in modules if not m or path == m or path.startswith(m + ".")]
