"""Assemble the report from what the stages measured."""

from __future__ import annotations

import platform
from typing import Any

import torch

from reattend.data import Dataset
from reattend.finder import AttentionSite
from reattend.install.graph import LACKS
from reattend.materials import Materials
from reattend.plan import Plan
from reattend.preflight import Choice
from reattend.report import Report
from reattend.report.evidence import (
    Calibration,
    Provenance,
    Quality,
    Stage,
)  # fmt: skip
from reattend.report.site import (
    Cost,
    HeadGroup,
    ModelInfo,
    Owner,
    SiteCost,
    SiteEntry,
    SiteError,
    SpecSummary,
)
from reattend.rewriting import Rewritten
from reattend.source import Source
from reattend.spec import Norm, Rotary
from reattend.verify.evidence import Evidence
from reattend.verify.subject import Subject


def build_report(subject: Subject, evidence: Evidence) -> Report:
    """The whole record; nothing in it depends on time, host or path."""
    source, done, materials = subject.source, subject.done, subject.materials
    size = next(source.model.parameters()).element_size()
    sites = [_site(c, done, evidence, size) for c in subject.choices]
    sites += [
        SiteEntry(path=_unique(r.path, i), action="not-understood", reason=r.reason)
        for i, r in enumerate(subject.found.refused)
    ]
    data = materials.held_out
    return Report(
        model=ModelInfo(
            architecture=type(source.model).__name__,
            dtype=str(next(source.model.parameters()).dtype).removeprefix("torch."),
            name=source.name,
            parameters_before=_parameters(source.model),
            parameters_after=_parameters(done.model),
            source_hash=next(iter(source.hashes.values()), ""),
        ),
        plan=subject.plan.to_dict(),
        sites=tuple(sites),
        parity=tuple(evidence.parity),
        quality=None
        if not evidence.rows
        else Quality(
            rows=tuple(evidence.rows),
            peers=tuple(evidence.peers),
            data=data.description if data is not None else "",
            tokens=data.tokens if data is not None else None,
            context=subject.plan.calibrate.seq_len,
            recall_data=_length(materials.recall),
        ),
        calibration=_calibration(materials, evidence),
        gates=tuple(evidence.gates),
        provenance=_provenance(source, subject.plan, materials, subject.seed),
        notes=(*materials.notes, *evidence.notes),
    )


def _length(rows: Dataset | None) -> str:
    if rows is None:
        return ""
    count, length = rows.packed[0].shape
    return f"{count} x {length} tokens of the same text"


def _unique(path: str, number: int) -> str:
    return f"{path or 'model'}#{number}"


def _parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def _site(choice: Choice, done: Rewritten, evidence: Evidence, size: int) -> SiteEntry:
    site, path = choice.site, choice.site.path
    built = done.built.get(path)
    facts: dict[str, Any] = {}
    error = None
    if built is not None:
        facts, error = _evidence(
            built.evidence, evidence.errors.get(path), evidence.bounds.get(path)
        )
    after = choice.after if built is not None else choice.before
    groups = facts.pop("groups", ())
    trained = bool(evidence.stages)
    return SiteEntry(
        path=path,
        action=choice.action,  # type: ignore[arg-type]
        kind=site.spec.kind,  # type: ignore[arg-type]
        layer=choice.layer,
        spec=spec_summary(site),
        verified=site.verified,
        conversion=choice.conversion.name if choice.conversion is not None else "",
        options=facts,
        groups=tuple(_group(g) for g in groups),
        reason=choice.reason,
        exactness=None if built is None else ("learned" if trained else built.exactness),
        cost=SiteCost(before=_cost(choice.before, size), after=_cost(after, size)),
        error=error,
        head_use=evidence.used.get(path, ()),
        owner=Owner(
            kind="graph" if built is not None and done.graph else "module",
            path=path,
            lacks=_lacks(site, done.graph) if built is not None else (),
        ),
    )


def _lacks(site: AttentionSite, graph: bool) -> tuple[str, ...]:
    """What the converted block cannot do that the original could."""
    if graph:
        return LACKS
    if site.binding is None:
        return ()
    found = ("KV cache",) if site.binding.cache is not None and not site.binding.stepwise else ()
    dropout = site.binding.around is not None and site.binding.around.dropout
    return (*found, "dropout while training") if dropout else found


def _evidence(
    given: dict[str, Any], output_relative: float | None = None, output_bound: float | None = None
) -> tuple[dict[str, Any], SiteError]:
    """What a conversion said about its result: the settings it resolved, and what was lost."""
    facts = dict(given)
    kept, total = [], 0.0
    for share in facts.pop("energy", ()):
        total += share
        kept.append(min(1.0, total))
    error = SiteError(
        output_relative=output_relative,
        output_bound=output_bound,
        discarded_energy=facts.pop("discarded_energy", None),
        rank=facts.get("kv_lora_rank"),
        energy_kept=tuple(kept),
        rotary_energy_kept=facts.pop("rotary_energy", None),
    )
    return facts, error


def _group(part: dict[str, Any]) -> HeadGroup:
    facts, error = _evidence(part["evidence"])
    return HeadGroup(
        heads=part["heads"], conversion=part["to"], options=facts, exactness=part["exactness"],
        cache_numbers_per_token=part["cache"], error=error,
    )  # fmt: skip


def _cost(cost: Any, size: int) -> Cost:
    return Cost(
        cache_numbers_per_token=cost.cache, cache_bytes_per_token=cost.cache * size,
        parameters=cost.parameters, flops_per_token=cost.flops_per_token, context=cost.context,
    )  # fmt: skip


def spec_summary(site: AttentionSite) -> SpecSummary:
    """A site's spec in the numbers a reader asks for."""
    spec, core = site.spec, site.spec.core
    rotary = spec.q.first(Rotary)
    named = (("q", spec.q), ("k", spec.k), ("v", spec.v))
    pattern = core.pattern.kind
    if core.pattern.window or core.pattern.chunk:
        pattern += f"({core.pattern.window or core.pattern.chunk})"  # type: ignore[assignment]
    bias = [n for n, s in named if s.proj.bias]
    return SpecSummary(
        heads=core.heads,
        kv_heads=core.kv_heads,
        hidden=site.hidden_size,
        qk_width=core.qk_head_dim,
        v_width=core.v_head_dim,
        rotary_width=rotary.width if isinstance(rotary, Rotary) else 0,
        pattern=pattern,
        norms=tuple(n for n, s in named if s.first(Norm) is not None),
        bias=(*bias, *(["o"] if spec.out is not None and spec.out.bias else [])),
        extras=(f"softcap {core.softcap:g}",) if core.softcap else (),
    )


def _calibration(materials: Materials, evidence: Evidence) -> Calibration | None:
    data = materials.statistics
    if data is None:
        return None
    stages = [Stage(name="statistics", tokens=data.tokens, loss_name="none")]
    stages += [
        Stage(name=s.name, tokens=s.tokens, loss=tuple(s.loss), loss_name=s.loss_name)
        for s in evidence.stages
    ]
    return Calibration(
        stages=tuple(stages),
        data="self" if materials.own else data.description,
        note=materials.notes[0] if materials.notes else "",
    )


def _provenance(source: Source, plan: Plan, materials: Materials, seed: int) -> Provenance:
    import transformers

    from reattend import __version__

    return Provenance(
        weights=source.hashes,
        plan="sha256:" + plan.fingerprint(),
        data={"calibration": materials.fingerprint},
        seeds={"run": seed},
        versions={
            "python": platform.python_version(),
            "reattend": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )
