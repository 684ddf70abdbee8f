"""Peers: the original converted by other presets to the same cache, untrained, beside ours."""

from __future__ import annotations

from typing import Any

from reattend.allocation import allocate
from reattend.errors import ReattendError
from reattend.finder import FoundAttention
from reattend.materials import Materials
from reattend.mixers.dense import DenseConfig
from reattend.moments import site_moments
from reattend.passes.rewrite.mla_options import MlaOptions
from reattend.passes.rewrite.mla_sizes import full_rank
from reattend.plan import Plan
from reattend.plan_sections import Verify
from reattend.preflight import Choice, preflight
from reattend.rewriting import rewrite
from reattend.source import Source
from reattend.statistics import Need
from reattend.verify.quality import Quality, measure


def measured_peers(
    source: Source,
    found: FoundAttention,
    converted: list[Choice],
    wanted: Verify,
    materials: Materials,
    batch_size: int,
    settings: dict[str, Any],
) -> tuple[list[tuple[str, Quality, int]], list[str]]:
    """What each preset makes of the same sites, from the same calibration rows.

    Args:
        source: the original.
        found: where its blocks are.
        converted: the sites that the plan converted; their caches together are the budget.
        wanted: the presets, and other sizes than that budget.
        materials: statistics are collected once for all of them.
        batch_size: rows per call while they are.
        settings: of `measure`.

    Returns:
        Name, quality and numbers cached per token by those sites; and why others are missing.
    """
    assert materials.statistics is not None and materials.held_out is not None
    share = sum(c.after.cache for c in converted) / sum(c.before.cache for c in converted)
    sizes = {f" at {100 * keep:g} %": ("kv_keep", keep) for keep in wanted.peer_keep}
    sizes |= {f" at {pairs:g} of the pairs": ("pairs", pairs) for pairs in wanted.peer_pairs}
    choices: dict[str, list[Choice]] = {}
    notes = []
    for label, (kind, size) in (sizes or {"": ("kv_keep", share)}).items():
        for name in wanted.peers:
            rules: dict[str, dict[str, Any]] = {}  # sites of one rule share its budget
            for c in converted:
                rule = sized(name, c.config, **{kind: size})
                rules.setdefault(str(rule), {**rule, "sites": []})["sites"].append(c.site.path)
            try:
                choices[name + label] = _chosen(found, list(rules.values()))
            except ReattendError as refusal:
                notes.append(f"peer {name}{label} left out: {refusal.where or refusal.what}")
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
    for label, chosen in choices.items():
        allocate(source.model, source.state, chosen, moments, materials.statistics)
        made = rewrite(source.model, chosen, moments, capture=found.capture, owned=True)  # run only
        quality = measure(made.model.eval(), materials.held_out, source.model, **settings)
        rows.append((label, quality, sum(c.after.cache for c in chosen)))
    return rows, notes


def sized(
    name: str, config: DenseConfig, kv_keep: float | None = None, pairs: float | None = None
) -> dict[str, Any]:
    """The rule of a preset of `to: mla` at another size.

    Args:
        name: of the preset.
        config: a block.
        kv_keep: share of the cache; or
        pairs: share of the rotary pairs, everything else kept.
    """
    given = Plan.load(name).rules[0].to_dict()
    if pairs is None:
        return {**given, "kv_keep": kv_keep}
    turned = config.rotary.pairs * config.core.kv_heads if config.rotary else 0
    rope = 2 * int(pairs * turned)
    given = {k: v for k, v in given.items() if k not in ("kv_keep", "sites", "to")}
    given |= {"qk_rope_head_dim": rope, "kv_lora_rank": 1, "allow_growth": True}
    rank = full_rank(config, MlaOptions(**given), rope)
    return {"sites": "*", "to": "mla", **given, "kv_lora_rank": max(1, rank)}  # 0: refused below


def _chosen(found: FoundAttention, rules: list[dict[str, Any]]) -> list[Choice]:
    """The sites that these rules convert."""
    choices = preflight(found, Plan.load({"rules": rules}))
    return [c for c in choices if c.action == "converted"]
