"""`reattend verify`: is a converted folder still what its report says?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from reattend.errors import ArgumentError, ModelError
from reattend.inputs import is_hf, made_up
from reattend.install.adapter import Adapter
from reattend.outdir import damaged, inputs_of
from reattend.publishing import load_folder
from reattend.report import Report
from reattend.source import open_source
from reattend.source_check import check_weights
from reattend.verify.parity import block_errors, decode_checks, exact_check


@dataclass(frozen=True)
class Finding:
    """One check: `pass`, `fail`, or `info` where nothing can be judged."""

    name: str
    verdict: str
    detail: str


def recheck(folder: Path, original: str | None = None, **opening: Any) -> list[Finding]:
    """Check a folder that `convert(out=...)` wrote.

    Args:
        folder: the converted model.
        original: the model it was made from; None compares the converted model with itself only.
        opening: how to open the original (`trust_remote_code`, ...).

    Returns:
        Every check, in order: files, report, provenance, weights, sites, cached decode; with the
        original also its hashes and the error of every converted block.

    Raises:
        ArgumentError: there is no report, or a newer one.
        ModelError: the weights cannot be loaded.
    """
    if not folder.is_dir():
        raise ModelError(
            "no such folder",
            where=str(folder),
            next_step="give the folder that `reattend convert --out` wrote",
        )
    report = Report.load(folder)
    findings = [_files(folder), _provenance(report)]
    model = load_folder(folder, None)
    check_weights(model)
    findings += [_sites(model, report), _size(model, report)]
    findings += _decode(model, report)
    if original is not None:
        findings += _against(model, report, original, opening)
    return findings


def _finding(name: str, good: bool, detail: str) -> Finding:
    return Finding(name, "pass" if good else "fail", detail)


def _files(folder: Path) -> Finding:
    if inputs_of(folder) is None:
        return Finding("files", "fail", "no fingerprint.json: not written by convert")
    broken = damaged(folder)
    text = f"missing or changed: {', '.join(broken)}" if broken else "complete"
    return _finding("files", not broken, text)


def _provenance(report: Report) -> Finding:
    told = report.provenance
    missing = [n for n in ("weights", "plan", "data", "versions") if not getattr(told, n)]
    if missing:
        return Finding("provenance", "fail", f"the report names no {', '.join(missing)}")
    return Finding("provenance", "pass", f"{len(told.weights)} weight files, plan, data, versions")


def _converted(report: Report) -> list[str]:
    return sorted(s.path for s in report.sites if s.action == "converted")


def _sites(model: nn.Module, report: Report) -> Finding:
    there = sorted(p for p, m in model.named_modules() if isinstance(m, Adapter))
    said = _converted(report)
    if there == said:
        return Finding("converted blocks", "pass", f"{len(there)}, as the report says")
    differ = ", ".join(sorted({*there} ^ {*said})[:3])
    return Finding("converted blocks", "fail", f"model and report differ: {differ}")


def _size(model: nn.Module, report: Report) -> Finding:
    count, said = sum(p.numel() for p in model.parameters()), report.model.parameters_after
    return _finding(
        "weights", count == said, f"{count:,} parameters loaded, finite ({said:,} said)"
    )


def _decode(model: nn.Module, report: Report) -> list[Finding]:
    """Cached decode, allowed what the report allowed: ten times the original's own noise."""
    if not is_hf(model):
        return []
    floors = {p.name: p.noise_floor for p in report.parity if p.noise_floor is not None}
    seed = int(report.provenance.seeds.get("run", 0))
    return [
        _finding(c.name, c.verdict == "pass", f"{c.max_abs:.3g} (limit {c.tolerance:.3g})")
        for c in decode_checks(None, model, seed, floors)
    ]


def _against(
    model: nn.Module, report: Report, original: str, opening: dict[str, Any]
) -> list[Finding]:
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    source = open_source(original, dtype=dtype, **opening)
    same = source.hashes == dict(report.provenance.weights)
    text = "the hashes are those of the report" if same else "other weights than in the report"
    findings = [_finding("original", same, text)]
    paths = _converted(report)
    known = dict(source.model.named_modules())
    if any(p not in known for p in paths):
        raise ArgumentError(
            "this is not the model that was converted",
            where=original,
            why=f"it has no block {next(p for p in paths if p not in known)}",
            next_step="give the original's folder",
        )
    sample = made_up(source.model)
    said = {s.path: s for s in report.sites}
    for path, error in block_errors(source.model, model, paths, sample).items():
        before = said[path].error
        recorded = None if before is None else before.output_relative
        text = f"{error:.2e} relative on random tokens"
        if recorded is not None:
            text += f", {recorded:.2e} at conversion"
        verdict = "info" if math.isfinite(error) else "fail"
        findings.append(Finding(f"error of {path}", verdict, text))
    if all(said[p].exactness == "exact" for p in paths):
        check = exact_check(source.model, model, sample)
        detail = f"{check.max_abs:.3g} (limit {check.tolerance:.3g})"
        findings.append(_finding(check.name, check.verdict == "pass", detail))
    return findings
