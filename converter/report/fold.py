"""Sites that received the same treatment, as one row: `layers 0–5`.

Two sites are in one group when their path differs in numbers only and kind, spec, action,
conversion, head groups, reason, exactness, owner class and the names of their options agree.
Values of options, cost and error may differ inside a group; the row shows their range.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pydantic import JsonValue

from reattend.report.numbers import plain
from reattend.report.site import SiteEntry


@dataclass(frozen=True)
class SiteGroup:
    """Sites of equal treatment, in the order of the report."""

    sites: tuple[SiteEntry, ...]

    @property
    def first(self) -> SiteEntry:
        """The site that stands for the group."""
        return self.sites[0]

    @property
    def path(self) -> str:
        """The common path, `*` where the members differ."""
        pieces = [site.path.split(".") for site in self.sites]
        return ".".join(
            column[0] if len(set(column)) == 1 else "*" for column in zip(*pieces, strict=True)
        )

    @property
    def layers(self) -> str:
        """`layers 0–5`, `layer 3`; `2 sites` where a site has no layer number."""
        numbers = [site.layer for site in self.sites if site.layer is not None]
        if len(numbers) != len(self.sites):
            return "1 site" if len(self.sites) == 1 else f"{len(self.sites)} sites"
        return ("layer " if len(numbers) == 1 else "layers ") + ranges(numbers)

    @property
    def options(self) -> dict[str, str]:
        """Options as text; numbers that differ between the members become a range."""
        shown = _shown([site.options for site in self.sites])
        for i, group in enumerate(self.first.groups):
            inner = _shown([site.groups[i].options for site in self.sites])
            text = ", ".join(f"{key} {value}" for key, value in inner.items())
            done = f"{group.conversion} ({text})" if text else group.conversion
            shown[f"heads {ranges(group.heads)}:"] = done
        return shown

    def collect(self, read: Callable[[SiteEntry], float | None]) -> list[float]:
        """What `read` finds on the members that have it."""
        values = [read(site) for site in self.sites]
        return [value for value in values if value is not None]


def _shown(given: Sequence[Mapping[str, JsonValue]]) -> dict[str, str]:
    """One text per option: its value, or the range of its numbers over the sites."""
    shown = {}
    for key in sorted(given[0]):
        values = [options[key] for options in given]
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        if all(value == values[0] for value in values):
            shown[key] = option_text(values[0])
        elif len(numbers) == len(values):
            shown[key] = f"{option_text(min(numbers))}–{option_text(max(numbers))}"
        else:
            shown[key] = "varies"
    return shown


def option_text(value: object) -> str:
    """One option value as YAML would spell it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return plain(value)
    return str(value)


def fold(sites: Sequence[SiteEntry]) -> list[SiteGroup]:
    """Group `sites`; groups are in the order of their first member."""
    groups: dict[tuple[object, ...], list[SiteEntry]] = {}
    for site in sites:
        key = (
            re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", site.path),
            site.kind,
            site.layer is None,
            site.spec,
            site.action,
            site.verified,
            site.conversion,
            tuple(sorted(site.options)),
            tuple((g.heads, g.conversion, tuple(sorted(g.options))) for g in site.groups),
            site.reason,
            site.exactness,
            None if site.owner is None else (site.owner.kind, site.owner.class_name),
        )
        groups.setdefault(key, []).append(site)
    return [SiteGroup(tuple(members)) for members in groups.values()]


def ranges(numbers: Sequence[int]) -> str:
    """`0–5, 8, 10–12`; a stride of two or more that holds throughout reads `0–24 in steps of 2`."""
    ordered = sorted(set(numbers))
    steps = {b - a for a, b in zip(ordered, ordered[1:], strict=False)}
    if len(ordered) > 3 and len(steps) == 1 and steps != {1}:
        return f"{ordered[0]}–{ordered[-1]} in steps of {steps.pop()}"
    runs: list[list[int]] = []
    for number in ordered:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}–{r[-1]}" for r in runs)
