"""Cores that could not be read: refused, as what they are where that is known."""

from __future__ import annotations

import re

from reattend.depth import REASON, over_layers
from reattend.found import RefusedSite
from reattend.install.adapter import Adapter
from reattend.locate import adapter_of
from reattend.nearest import CORE_FORM, nearest_form
from reattend.passes.find.latent import read_latent
from reattend.passes.find.owners import owner_of
from reattend.passes.find.sites import Found, Missed
from reattend.search import Search

#: where a reason may name a node; elsewhere a word (`to`) only looks like one
_BEFORE = ("\\(", "by ", "reads ", "read ", "behind ", "projection ")
_NAMED = re.compile("(?:^|" + "|".join(f"(?<={word})" for word in _BEFORE) + r")\w+")


def missed(search: Search, item: Missed) -> RefusedSite:
    """A core whose streams, mask or exit are of no known form."""
    path = owner_of([item.core])
    own = adapter_of(path, search.ours)
    if own is not None and search.ours[own].mixer.kind != "dense":
        return located_at(already(own, search.ours[own]), "new", item)
    latent = read_latent(item.core)
    if latent is not None:
        return located_at(RefusedSite(own or path, latent.reason, latent), "new", item)
    if over_layers(search, item.core):
        return located_at(RefusedSite(own or path, REASON, verified=True), "read", item)
    return located_at(RefusedSite(own or path, item.reason), "read", item)


def located_at(refusal: RefusedSite, step: str, item: Found | Missed) -> RefusedSite:
    """The refusal with what failed, where, and the understood form that comes closest."""
    core = item.region.core if isinstance(item, Found) else item.core
    named = {n.name for n in core.graph.nodes}
    words = _NAMED.findall(refusal.reason) if step == "read" else []
    refusal.step, refusal.item = step, item
    refusal.node = next((w for w in words if w in named), core.name)
    if isinstance(item, Found):
        refusal.nearest = item.spec.summary()
    elif step == "read":
        refusal.nearest = nearest_form(refusal.reason, core)
    return refusal


def never_fused(search: Search) -> list[RefusedSite]:
    """What looked like a core and was not taken by the passes that normalise cores."""
    return [
        RefusedSite(
            step.paths[name], reason, step="normalise", node=name, nearest=CORE_FORM,
        )
        for step in search.passes
        if step.name in ("fuse-sdpa", "fuse-eager")
        for name, reason in step.refused
    ]  # fmt: skip


def already(path: str, block: Adapter) -> RefusedSite:
    """A block that an earlier conversion replaced."""
    return RefusedSite(path, f"already {block.mixer.kind}")


def already_converted(search: Search, refused: list[RefusedSite]) -> list[RefusedSite]:
    """The cores of one converted block (head groups) are one refusal."""
    once: dict[object, RefusedSite] = {}
    for number, r in enumerate(refused):
        once.setdefault((r.path, r.reason) if r.path in search.ours else number, r)
    return list(once.values())
