"""Sites that no submodule holds: the rewritten graph becomes the model.

Attention written inline in a block has no owner to swap. The captured, normalised graph is then
the model: the site's region is one `call_module` of a `GraphSite`. Such a model computes outputs
and gradients; it has no `generate` and no cache, and the report says so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from reattend.errors import ModelError
from reattend.install.binding import TableRef
from reattend.install.tables import component, match_table
from reattend.mixers.base import Context, Mixer
from reattend.mixers.scores import shown
from reattend.passes.base import drop_dead
from reattend.passes.evaluate import Evaluator
from reattend.passes.find.sites import Region

#: what a graph model cannot do
LACKS = ("generate", "train()", "KV cache", "positional arguments")


class GraphSite(nn.Module):
    """Calls a mixer from a graph: hidden states, encoder states, mask and rotary tables."""

    def __init__(self, path: str, mixer: Mixer, cos: TableRef | None, sin: TableRef | None) -> None:
        super().__init__()
        self.path, self.mixer, self.cos, self.sin = path, mixer, cos, sin

    def forward(
        self, x: Tensor, memory: Tensor | None, mask: Tensor | None, cos: Any, sin: Any,
        *extras: Tensor,
    ) -> Tensor:  # fmt: skip
        """[B, N, D] -> [B, N, out]."""
        rotation = None
        if self.cos is not None and self.sin is not None:
            rotation = (_columns(cos, self.cos), _columns(sin, self.sin))
        if mask is not None and self.mixer.adds_bias:
            mask = shown(mask)  # the mixer adds the bias itself
        y: Tensor = self.mixer(
            x, Context(mask=mask, rotation=rotation, extras=extras), None, memory
        )
        return y


def _columns(leaf: Tensor, ref: TableRef) -> Tensor:
    picked = component(leaf, ref.part)[..., list(ref.columns)]
    return picked.reshape(-1, *picked.shape[-2:])


def site_module(path: str) -> str:
    """Name of the site's module in the graph model."""
    return "reattend_sites." + path.replace(".", "_").replace("#", "_")


def replace_region(
    gm: fx.GraphModule, path: str, region: Region, mixer: Mixer, given: dict[fx.Node, Any],
    takes_mask: bool,
) -> fx.Node:  # fmt: skip
    """Put one call of `mixer` in place of the region; the dead nodes go. Returns the call.

    Args:
        gm: the captured, normalised graph; changed.
        path: the site's path.
        region: its region in `gm`.
        mixer: the replacement.
        given: placeholder values, to find the rotary tables by value.
        takes_mask: the model's own mask must be passed on.
    """
    cos = sin = None
    cos_node: fx.Node | None = None
    sin_node: fx.Node | None = None
    if region.rotation is not None:
        sin, sin_node = _table(gm, region, region.rotation.sin_NP, given)
        columns = () if sin is None else sin.columns
        cos, cos_node = _table(gm, region, region.rotation.cos_NP, given, columns)
    name = site_module(path)
    gm.add_submodule(name, GraphSite(path, mixer, cos, sin))
    last = region.exit.node
    if last.graph is not gm.graph:
        raise ModelError("the site belongs to another capture of the model", where=path)
    with gm.graph.inserting_before(last):
        new = gm.graph.call_module(
            name,
            (
                region.hidden,
                region.memory,
                region.mask if takes_mask else None,
                cos_node,
                sin_node,
                *region.extras,
            ),
        )
    new.meta["val"] = last.meta.get("val")
    last.replace_all_uses_with(new)
    gm.graph.erase_node(last)
    drop_dead(gm.graph)
    gm.graph.lint()
    return new


def _table(
    gm: fx.GraphModule,
    region: Region,
    table_NP: Tensor,
    given: dict[fx.Node, Any],
    beside: tuple[int, ...] = (),
) -> tuple[TableRef | None, fx.Node | None]:
    """The external value that holds a rotary table; None where positions are counted instead."""
    values = dict(zip(region.externals, Evaluator(gm).run(region.externals, given), strict=True))
    for node, value in values.items():
        hit = match_table({"value": value}, table_NP, beside)
        if hit is not None and abs(hit[1] - 1) < 1e-4:
            return hit[0], node
    return None, None


def drop_unused(gm: fx.GraphModule) -> None:
    """Remove parameters that no node reads any more, so they are neither trained nor saved."""
    used = {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}
    for name, _ in [*gm.named_parameters(), *gm.named_buffers()]:
        if name in used or name.startswith("reattend_sites."):
            continue
        parent, _, attribute = name.rpartition(".")
        delattr(gm.get_submodule(parent) if parent else gm, attribute)
    gm.recompile()


def hidden_values(
    gm: fx.GraphModule, regions: dict[str, Region], given: dict[fx.Node, Any]
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """What enters each region under these inputs: hidden states and encoder states."""
    wanted = [r.hidden for r in regions.values()]
    wanted += [r.memory for r in regions.values() if r.memory is not None]
    with torch.no_grad():
        values = dict(zip(wanted, Evaluator(gm).run(wanted, given), strict=True))
    return {
        path: (values[r.hidden], None if r.memory is None else values[r.memory])
        for path, r in regions.items()
    }
