"""Blocks of one module: several calls of it are one site, several blocks in it are numbered."""

from __future__ import annotations

from collections import Counter

from reattend.found import AttentionSite, FoundAttention, RefusedSite, cores_of
from reattend.judge import Case, site_of
from reattend.missed import located_at


def accept(result: FoundAttention, verdict: tuple[Case, RefusedSite | None]) -> None:
    """Enter a block that was judged; another call of a module joins the site of its first call."""
    case, refusal = verdict
    if refusal is not None:
        result.refused.append(refusal)
    elif case.place.number and (case.place.binding is not None or case.search.deferred):
        _again(result, case)
    else:
        result.sites.append(site_of(case))


def _again(result: FoundAttention, case: Case) -> None:
    """A later call of a module; if it differs no call can be converted: they are one module."""
    path, cores = case.place.path, cores_of(case.item)
    same = [s for s in result.sites if s.path == path]
    reason = _differs(case, same)
    if reason:
        result.sites = [s for s in result.sites if s not in same]
        calls = sum(s.cores for s in same) + cores
        result.refused += [located_at(RefusedSite(path, reason), "calls", case.item)] * calls
        return
    for site in same:
        site.cores += cores


def _differs(case: Case, same: list[AttentionSite]) -> str:
    """Why a block that is called again cannot share its first call's mixer; empty if it can."""
    first, path = next(iter(same), None), case.place.path
    if first is None or first.spec != case.item.spec or first.binding != case.place.binding:
        return f"{path} is called several times and does not do the same each time"
    if first.binding is not None and first.binding.cache and not first.binding.layer_shift:
        return f"{path} is called several times, and each call writes to the same cache"
    return ""


def numbered(sites: list[AttentionSite]) -> None:
    """Several blocks in one module get `#0`, `#1` ... in graph order."""
    counts = Counter(s.path for s in sites)
    seen: Counter[str] = Counter()
    for site in sites:
        path = site.path
        if counts[path] > 1:
            site.path = f"{path}#{seen[path]}"
            seen[path] += 1
