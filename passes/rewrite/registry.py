"""Conversions by kebab-case name, imported on first use."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from reattend.errors import PlanError

if TYPE_CHECKING:
    from reattend.passes.rewrite.base import Conversion

_OWN = {
    "attn-moe": "reattend.passes.rewrite.attn_moe:ToAttnMoe",
    "dense": "reattend.passes.rewrite.dense:ToDense",
    "echo": "reattend.passes.rewrite.echo:ToEcho",
    "gqa": "reattend.passes.rewrite.gqa:ToGqa",
    "linear": "reattend.passes.rewrite.linear_hybrid:ToHybrid",
    "masa": "reattend.passes.rewrite.masa:ToMasa",
    "mla": "reattend.passes.rewrite.mla:ToMla",
    "moh": "reattend.passes.rewrite.moh:ToMoh",
    "prune-heads": "reattend.passes.rewrite.prune_heads:ToPruneHeads",
    "sparse": "reattend.passes.rewrite.sparse:ToSparse",
}
GROUP = "reattend.conversions"


def _homes() -> dict[str, str]:
    homes = {entry.name: entry.value for entry in entry_points(group=GROUP)}
    return {**homes, **_OWN}


def conversion_names() -> list[str]:
    """Every conversion a plan may name, sorted."""
    return sorted(_homes())


def conversion(name: str) -> type[Conversion]:
    """The conversion class of that name.

    Raises:
        PlanError: there is none; the nearest name is suggested.
    """
    homes = _homes()
    if name not in homes:
        from difflib import get_close_matches

        near = get_close_matches(name, [*homes, "keep"], n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise PlanError(
            f"unknown conversion {name!r}",
            next_step=f"{hint}known: {', '.join(sorted(homes))}, keep",
        )
    module, _, attribute = homes[name].partition(":")
    found: type[Conversion] = getattr(import_module(module), attribute)
    return found
