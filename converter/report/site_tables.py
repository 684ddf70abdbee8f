"""The tables about attention sites: what was done with each, and what it costs."""

from __future__ import annotations

from collections.abc import Callable

from reattend.report.fold import SiteGroup, fold
from reattend.report.model import Report
from reattend.report.numbers import (
    ABSENT,
    count,
    percent,
    plain,
    share,
    signed_percent,
    size,
    spread,
)
from reattend.report.site import SiteEntry
from reattend.report.table import Column, Table, table


def _range(values: list[float], write: Callable[[float | None], str]) -> str:
    ends = spread(values)
    if ends is None:
        return ABSENT
    low, high = write(ends[0]), write(ends[1])
    return low if low == high else f"{low} – {high}"


def _cache_before(site: SiteEntry) -> float | None:
    return site.cost.before.cache_bytes_per_token if site.cost else None


def _cache_after(site: SiteEntry) -> float | None:
    return site.cost.after.cache_bytes_per_token if site.cost else None


def _output_error(site: SiteEntry) -> float | None:
    return site.error.output_relative if site.error else None


def options_text(group: SiteGroup) -> str:
    """`kv_lora_rank 48, qk_rope_head_dim 16`."""
    return ", ".join(f"{key} {value}" for key, value in group.options.items())


def done_text(group: SiteGroup) -> str:
    """What was done with a group: `to mla`, `kept`, `refused`."""
    site = group.first
    if site.action == "converted":
        return f"to {site.conversion}" if site.conversion else "converted"
    return {"unmatched": "kept (no rule)", "not-understood": "not understood"}.get(
        site.action, site.action
    )


def sites_table(report: Report) -> Table | None:
    """One row per group of equal treatment."""
    columns = (
        Column("Sites"),
        Column("Path", "code"),
        Column("Attention"),
        Column("Done"),
        Column("Options or reason"),
        Column("Exactness"),
        Column("Cache", "number", "bytes/token, per site"),
        Column("Output error", "number", "relative"),
    )
    rows = []
    for group in fold(report.sites):
        site = group.first
        before = _range(group.collect(_cache_before), plain)
        after = _range(group.collect(_cache_after), plain)
        rows.append(
            (
                group.layers + (" (cross)" if site.kind == "cross" else ""),
                group.path,
                site.spec.text() if site.spec else ABSENT,
                done_text(group),
                "; ".join(x for x in (options_text(group), site.reason) if x) or ABSENT,
                site.exactness or ABSENT,
                before if before == after else f"{before} → {after}",
                _range(group.collect(_output_error), share),
            )
        )
    return table("Sites that were treated alike share a row", columns, rows)


def all_sites_table(report: Report) -> Table | None:
    """One row per site, with the measured error."""
    columns = (
        Column("Site", "code"),
        Column("Done"),
        Column("Options", "text"),
        Column("Self-check"),
        Column("Cache", "number", "bytes/token"),
        Column("Output error", "number", "relative"),
        Column("Bound", "number", "relative"),
        Column("Energy lost", "number", "share"),
        Column("Rotary energy kept", "number", "share"),
        Column("Carried by", "code"),
    )
    rows = []
    for site in report.sites:
        group, error, cost = SiteGroup((site,)), site.error, site.cost
        checked = {True: "✓ equal", False: "✗ differs", None: ABSENT}[site.verified]
        rows.append(
            (
                site.path,
                done_text(group),
                options_text(group) or ABSENT,
                checked,
                plain(cost.after.cache_bytes_per_token) if cost else ABSENT,
                share(error.output_relative) if error else ABSENT,
                share(error.output_bound) if error else ABSENT,
                percent(error.discarded_energy, 2) if error else ABSENT,
                percent(error.rotary_energy_kept) if error else ABSENT,
                (site.owner.class_name or site.owner.kind) if site.owner else ABSENT,
            )
        )
    return table("Measured at each site", columns, rows)


def cost_table(report: Report) -> Table | None:
    """Before and after, summed over the sites that have a cost."""
    costs = [site.cost for site in report.sites if site.cost is not None]
    total, rows = report.totals, []

    def row(
        name: str,
        before: float | None,
        after: float | None,
        write: Callable[[float | None], str],
    ) -> None:
        if before is None or after is None:
            return
        change = signed_percent(after / before - 1) if before else ABSENT
        rows.append((name, write(before), write(after), change))

    if costs:
        row(
            "Numbers cached per token",
            sum(c.before.cache_numbers_per_token for c in costs),
            sum(c.after.cache_numbers_per_token for c in costs),
            count,
        )
        row(
            "Cache bytes per token",
            total.cache_bytes_per_token_before,
            total.cache_bytes_per_token_after,
            size,
        )
        flops = [
            (c.before.flops_per_token, c.after.flops_per_token)
            for c in costs
            if c.before.flops_per_token is not None and c.after.flops_per_token is not None
        ]
        contexts = sorted({c.after.context for c in costs if c.after.context is not None})
        if len(flops) == len(costs):
            at = f", context {contexts[0]:,}" if len(contexts) == 1 else ""
            row(
                f"Attention FLOPs per token{at}",
                sum(b for b, _ in flops),
                sum(a for _, a in flops),
                count,
            )
        row(
            "Attention parameters",
            sum(c.before.parameters for c in costs),
            sum(c.after.parameters for c in costs),
            count,
        )
    row("Model parameters", total.parameters_before, total.parameters_after, count)
    columns = (
        Column("Cost"),
        Column("Before", "number"),
        Column("After", "number"),
        Column("Change", "number"),
    )
    return table("Sums over all attention sites, batch 1", columns, rows)


def lacking(report: Report) -> list[tuple[str, str]]:
    """Sites, equal ones as one path, and what no longer works there."""
    found = []
    for group in fold(report.sites):
        kinds = dict.fromkeys(s.owner.lacks for s in group.sites if s.owner and s.owner.lacks)
        for lacks in kinds:
            alike = tuple(s for s in group.sites if s.owner and s.owner.lacks == lacks)
            found.append((SiteGroup(alike).path, f"no longer has: {', '.join(lacks)}"))
    return found
