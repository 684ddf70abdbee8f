"""Peers: the original converted by other presets to the same cache, untrained, beside ours."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from typing import Any

from reattend.allocation import allocate
from reattend.mixers.dense import DenseConfig
from reattend.moments import site_moments
from reattend.outdir import read_json
from reattend.passes.rewrite.mla_options import MlaOptions
from reattend.passes.rewrite.mla_sizes import full_rank
from reattend.plan import Plan
from reattend.plan_sections import Verify
from reattend.preflight import Choice, choose
from reattend.report.evidence import PeerCell
from reattend.report.part import dumps
from reattend.rewriting import rewrite
from reattend.statistics import Need, SiteStatistics
from reattend.verify.quality import measure, row_of
from reattend.verify.subject import Subject
from reattend.workdir import digest


def measured_peers(subject: Subject, settings: dict[str, Any]) -> list[PeerCell]:
    """What each preset makes of the sites that were converted, from the same calibration rows.

    Args:
        subject: the conversion. The caches of its sites together are the budget where the plan
            names no other sizes; what a killed run had measured is read again from its folder.
        settings: of `measure`.

    Returns:
        Sizes in the plan's order, and the presets of each; refused ones with the reason.
    """
    verify, materials, source = subject.plan.verify, subject.materials, subject.source
    assert materials.statistics is not None and materials.held_out is not None
    rows, held_out = materials.statistics, materials.held_out
    changed = [c for c in subject.choices if c.action == "converted"]
    element = next(source.model.parameters()).element_size()
    kept = element * sum(c.after.cache for c in subject.choices if c.action != "converted")
    moments: dict[str, SiteStatistics] = {}
    asked = [
        (name, label, _rules(name, changed, sizes))
        for label, sizes in _sizes(verify, changed).items()
        for name in verify.peers
    ]
    wanted = {(name, label): _chosen(subject, rules) for name, label, rules in asked}
    read = [source.state, rows.fingerprint, materials.fingerprint, subject.seed, verify.sized]
    cells: list[PeerCell] = []
    for number, (name, label, rules) in enumerate(asked):
        chosen = wanted[name, label]
        if isinstance(chosen, str):
            cells.append(PeerCell(preset=name, size=label, refused=chosen))
            continue
        key = digest([*read, rules])
        stage, work = f"peer-{number}", subject.work
        if work is not None and work.has(stage, key):
            cells.append(PeerCell.model_validate(read_json(work.path(f"work/{stage}.json"))))
            continue
        subject.tell(f"{name} at {label}")
        moments = moments or _moments(subject, wanted.values())
        allocate(source.model, source.state, chosen, moments, rows)
        made = rewrite(
            source.model, chosen, moments, capture=subject.found.capture, owned=True
        )  # only ever run
        teacher = None if verify.sized else source.model  # a table of presets shows no divergence
        quality = measure(made.model.eval(), held_out, teacher, **settings)
        cache = kept + element * sum(c.after.cache for c in chosen)
        facts = [built.evidence for built in made.built.values()]
        cell = PeerCell(
            preset=name, size=label, row=row_of(f"{name}, untrained", "yardstick", quality, cache),
            widths=tuple((f["qk_rope_head_dim"], f["kv_lora_rank"]) for f in facts),
        )  # fmt: skip
        if work is not None:
            text = dumps(cell.model_dump(mode="json"))
            work.publish_bytes(f"work/{stage}.json", text.encode())
            work.mark(stage, key)
        cells.append(cell)
    return cells


def _sizes(verify: Verify, changed: list[Choice]) -> dict[str, dict[str, float]]:
    """Every size by its name in the report."""
    if not verify.sized:
        share = sum(c.after.cache for c in changed) / sum(c.before.cache for c in changed)
        return {"the same cache": {"kv_keep": share}}
    found = {f"{100 * keep:g} %": {"kv_keep": keep} for keep in verify.peer_keep}
    for pairs in verify.peer_pairs:
        found[f"{Fraction(pairs).limit_denominator(64)} of pairs"] = {"pairs": pairs}
    return found


def _rules(name: str, changed: list[Choice], size: dict[str, float]) -> list[dict[str, Any]]:
    """The preset at a size, for these sites; sites of one rule share its budget."""
    rules: dict[str, dict[str, Any]] = {}
    for c in changed:
        rule = sized(name, c.config, **size)
        rules.setdefault(str(rule), {**rule, "sites": []})["sites"].append(c.site.path)
    return list(rules.values())


def _chosen(subject: Subject, rules: list[dict[str, Any]]) -> list[Choice] | str:
    """The sites that these rules convert, or why they cannot."""
    choices = choose(subject.found, Plan.load({"rules": rules}))
    if reasons := dict.fromkeys(c.reason for c in choices if c.action == "refused"):
        return "; ".join(reasons)
    return [c for c in choices if c.action == "converted"]


def _moments(subject: Subject, wanted: Iterable[list[Choice] | str]) -> dict[str, SiteStatistics]:
    """Everything that any of them reads, collected once."""
    needs: dict[str, frozenset[Need]] = {}
    made = [chosen for chosen in wanted if not isinstance(chosen, str)]
    for choice in (c for chosen in made for c in chosen):
        needs[choice.site.path] = needs.get(choice.site.path, frozenset()) | choice.needs
    rows = subject.materials.statistics
    assert rows is not None
    found, _ = site_moments(
        subject.source.model, subject.source.state, subject.found, made[0], rows,
        subject.plan.calibrate.batch_size, None, lambda tokens: None, needs,
    )  # fmt: skip
    return found


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
