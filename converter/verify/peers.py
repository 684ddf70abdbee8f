"""Peers: the original converted by other presets to the same cache, untrained, beside ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reattend.allocation import allocate
from reattend.errors import ReattendError
from reattend.finder import FoundAttention
from reattend.materials import Materials
from reattend.moments import site_moments
from reattend.plan import Plan
from reattend.preflight import Choice, preflight
from reattend.rewriting import rewrite
from reattend.source import Source
from reattend.statistics import Need
from reattend.verify.quality import Quality, measure


def measured_peers(
    source: Source,
    found: FoundAttention,
    converted: list[Choice],
    names: Sequence[str],
    materials: Materials,
    batch_size: int,
    settings: dict[str, Any],
) -> tuple[list[tuple[str, Quality, int]], list[str]]:
    """What each preset makes of the same sites, from the same calibration rows.

    Args:
        source: the original.
        found: where its blocks are.
        converted: the sites that the plan converted; their caches together are the budget.
        names: presets of `to: mla`.
        materials: statistics are collected once for all of them.
        batch_size: rows per call while they are.
        settings: of `measure`.

    Returns:
        Name, quality and numbers cached per token by those sites; and why others are missing.
    """
    assert materials.statistics is not None and materials.held_out is not None
    share = sum(c.after.cache for c in converted) / sum(c.before.cache for c in converted)
    choices: dict[str, list[Choice]] = {}
    notes = []
    for name in names:
        try:
            choices[name] = _chosen(found, name, [c.site.path for c in converted], share)
        except ReattendError as refusal:
            notes.append(f"peer {name} left out: {refusal.where or refusal.what}")
    needs: dict[str, frozenset[Need]] = {}
    for choice in (c for chosen in choices.values() for c in chosen):
        needs[choice.site.path] = needs.get(choice.site.path, frozenset()) | choice.needs
    rows: list[tuple[str, Quality, int]] = []
    if not choices:
        return rows, notes
    moments, _ = site_moments(
        source.model, source.state, found, next(iter(choices.values())), materials.statistics,
        batch_size, None, lambda tokens: None, needs,
    )  # fmt: skip
    for name, chosen in choices.items():
        allocate(source.model, source.state, chosen, moments, materials.statistics)
        made = rewrite(source.model, chosen, moments, capture=found.capture, owned=True)  # run only
        quality = measure(made.model.eval(), materials.held_out, source.model, **settings)
        rows.append((name, quality, sum(c.after.cache for c in chosen)))
    return rows, notes


def _chosen(found: FoundAttention, name: str, paths: list[str], share: float) -> list[Choice]:
    """The converted sites under a preset at this share of their caches."""
    rule = {**Plan.load(name).rules[0].to_dict(), "sites": paths, "kv_keep": share}
    choices = preflight(found, Plan.load({"rules": [rule]}))
    return [c for c in choices if c.action == "converted"]
