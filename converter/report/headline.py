"""What a reader must know after ten seconds, computed once for all three views.

What was converted, how much cache that saves, what it cost in quality, and whether every gate
and every parity check passed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from reattend.report.model import Report
from reattend.report.numbers import fixed, percent, plain, plural, signed_percent, size

State = Literal["good", "bad", "open"]
#: perplexity that grows by no more than this share holds
HOLDS = 0.1
#: what a block's facts have that was compared, and lost (`reattend.passes.rewrite.sparse_baseline`)
BEHIND = "does_not_beat"
#: share of the original's score that a recall task may lose without a warning
FALLS = 0.2
#: what conversions say of themselves whose cache is no fixed number of bytes per token
BY_LENGTH = {"kv_density", "held_in_tokens"}
MARKS: dict[State, str] = {"good": "✓", "bad": "✗", "open": "–"}


@dataclass(frozen=True)
class Fact:
    """One of the four figures: a label, the figure, one line below it, and how it stands."""

    label: str
    figure: str
    detail: str
    state: State = "open"


@dataclass(frozen=True)
class Headline:
    """Title, one sentence, four facts."""

    title: str
    sentence: str
    facts: tuple[Fact, ...]
    state: State


def headline(report: Report) -> Headline:
    """The first screen of the report."""
    facts = (_converted(report), _cache(report), _quality(report), _checks(report))
    sentence = " ".join(fact for fact in _sentences(report) if fact)
    return Headline(report.model.name or report.model.architecture, sentence, facts, facts[3].state)


def ppl_change(report: Report) -> float | None:
    """Relative change of perplexity, published model against original."""
    if report.quality is None:
        return None
    before, after = report.quality.last("original"), report.quality.last("converted")
    if before is None or after is None or not before.ppl or after.ppl is None:
        return None
    return after.ppl / before.ppl - 1


def recall_change(report: Report) -> tuple[str, str] | None:
    """The recall task that lost most, and by how much: averages hide recall damage."""
    if report.quality is None:
        return None
    before, after = report.quality.last("original"), report.quality.last("converted")
    if before is None or after is None:
        return None
    changes = [
        (after.recall[task] - before.recall[task], task)
        for task in report.quality.recall_tasks()
        if task in before.recall and task in after.recall
    ]
    if not changes:
        return None
    change, task = min(changes)
    points = signed_percent(change).removesuffix(" %")
    return task.replace("_", "-"), f"{points} points"


def recall_lost(report: Report) -> str:
    """A warning where perplexity holds and recall does not; "" otherwise.

    Perplexity is an average over tokens that mostly need no looking up; attention over a bounded
    state can keep it and forget what it read.
    """
    change = ppl_change(report)
    if report.quality is None or change is None or not change <= HOLDS:
        return ""
    before, after = report.quality.last("original"), report.quality.last("converted")
    assert before is not None
    assert after is not None
    found = [
        f"{task.replace('_', '-')} {fixed(was)} → {fixed(after.recall[task])}"
        for task, was in before.recall.items()
        if task in after.recall and after.recall[task] < (1 - FALLS) * was and was > 0
    ]
    if not found:
        return ""
    return f"Perplexity holds, and recall does not ({', '.join(found)}): judge by min_recall."


def beaten(report: Report) -> str:
    """A warning where a trained choice of keys keeps less attention than an untrained one."""
    sites = [s for s in report.sites if s.action == "converted"]
    facts = [[s.options, *(g.options for g in s.groups)] for s in sites]
    behind = [next((f[BEHIND] for f in some if BEHIND in f), None) for some in facts]
    found = [name for name in behind if name is not None]
    if not found:
        return ""
    return (
        f"In {len(found)} of {plural(len(sites), 'block')} what was trained to choose keys does "
        f"not beat {found[0]}, reading as many: see the blocks."
    )


def conversions(report: Report) -> str:
    """Names of the conversions applied: `mla`, `mla and sparse`, `mla (some heads)`."""
    found: set[str] = set()
    for site in report.sites:
        if site.action == "converted" and site.groups:
            found |= {
                f"{g.conversion} (some heads)" for g in site.groups if g.conversion != "dense"
            }
        elif site.action == "converted" and site.conversion:
            found.add(site.conversion)
    names = sorted(found)
    if len(names) < 2:
        return names[0] if names else "another form"
    return ", ".join(names[:-1]) + " and " + names[-1]


def _sites_total(report: Report) -> int:
    return len(report.sites)


def _converted(report: Report) -> Fact:
    total = report.totals
    rest = [
        f"{number} {word}"
        for number, word in (
            (total.kept, "kept"),
            (total.refused, "refused"),
            (total.not_understood, "not understood"),
        )
        if number
    ]
    detail = ", ".join([f"to {conversions(report)}" if total.converted else "none", *rest])
    bad = total.refused + total.not_understood > 0
    state: State = "open" if bad or not total.converted else "good"
    return Fact("Sites converted", f"{total.converted} of {_sites_total(report)}", detail, state)


def _cache(report: Report) -> Fact:
    total = report.totals
    before, after = total.cache_bytes_per_token_before, total.cache_bytes_per_token_after
    if before is None or after is None or not before:
        return Fact("Cache per token", "not counted", "no site has a cost")
    detail = f"{size(before)} → {size(after)} per token{_counted_at(report)}"
    change = after / before - 1
    state: State = "good" if change < 0 else "bad" if change > 0 else "open"
    return Fact("Cache per token", signed_percent(change), detail, state)


def _counted_at(report: Report) -> str:
    """At which length the cache was counted, where its bytes per token depend on that."""
    lengths = {
        site.cost.after.context
        for site in report.sites
        if site.cost is not None
        for options in (site.options, *(g.options for g in site.groups))
        if BY_LENGTH & options.keys()
    }
    return f" at {max(n or 0 for n in lengths):,} tokens" if lengths else ""


def _quality(report: Report) -> Fact:
    change = ppl_change(report)
    if change is None or report.quality is None:
        return Fact("Perplexity", "not measured", "no held-out text was given")
    before, after = report.quality.last("original"), report.quality.last("converted")
    assert before is not None
    assert after is not None
    detail = f"{fixed(before.ppl)} → {fixed(after.ppl)}"
    recall = recall_change(report)
    if recall is not None:
        detail += f"; worst recall change {recall[1]} ({recall[0]})"
    state: State = "bad" if not math.isfinite(change) else "open"
    return Fact("Perplexity", signed_percent(change), detail, state)


def _checks(report: Report) -> Fact:
    gates, parity = report.gates, report.parity
    failed = [g.name for g in gates if g.verdict == "fail"]
    broken = [c.name for c in parity if c.verdict == "fail"]
    verdicts = [*(g.verdict for g in gates), *(c.verdict for c in parity)]
    skipped = verdicts.count("not-run")
    passed = len(gates) - len(failed) - sum(g.verdict == "not-run" for g in gates)
    agreed = sum(c.verdict == "pass" for c in parity)
    detail = f"{agreed} of {plural(len(parity), 'parity check')} passed" if parity else ""
    if failed or broken:
        named = ", ".join((*failed, *broken))
        return Fact("Gates", f"{passed} of {len(gates)}", f"failed: {named}", "bad")
    if not gates:
        return Fact("Gates", "none set", detail or "the plan sets no limit")
    if skipped:
        detail = ", ".join(x for x in (detail, f"{skipped} did not run") if x)
    state: State = "open" if skipped else "good"
    return Fact("Gates passed", f"{passed} of {len(gates)}", detail, state)


def _sentences(report: Report) -> list[str]:
    total, number = report.totals, _sites_total(report)
    if not number:
        return ["No attention site was found."]
    if not total.converted:
        parts = [f"None of the {plural(number, 'attention site')} was converted."]
    else:
        every = "Every" if total.converted == number > 1 else None
        subject = (
            f"{every} one of the {number} attention sites was"
            if every
            else f"{total.converted} of {plural(number, 'attention site')} "
            + ("was" if total.converted == 1 else "were")
        )
        parts = [f"{subject} converted to {conversions(report)}."]
    ratio = total.cache_ratio
    if ratio is not None and total.converted:
        if ratio < 1:
            at = _counted_at(report)
            parts.append(f"The cache shrinks to {percent(ratio)} of the original bytes{at}.")
        elif ratio == 1:
            parts.append("The cache needs as many bytes as before.")
        else:
            parts.append(f"The cache grows to {plain(ratio, 3)} times the original bytes.")
    change = ppl_change(report)
    if change is not None:
        recall = recall_change(report)
        also = f", recall by {recall[1]} in the worst task ({recall[0]})" if recall else ""
        parts.append(f"Perplexity changes by {signed_percent(change)}{also}.")
    parts += [recall_lost(report), beaten(report)]
    checks = _checks(report)
    state = checks.state
    if report.gates or state == "bad":
        parts.append(
            {
                "good": "Every gate passed.",
                "bad": f"F{checks.detail[1:]}.",
                "open": "Some checks did not run.",
            }[state]
        )
    return parts
