"""`Report`: every site, what was done or why not, what it cost, and the evidence.

The JSON file is the source; Markdown and HTML are views of it. Nothing in here depends on time,
host, path or memory: the same plan and seed on the same machine type give the same bytes. What
does depend on them lives in `run.json` (`reattend.report.run`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import Field, JsonValue, computed_field, field_validator, model_validator

from reattend import __version__
from reattend.report.evidence import Calibration, Gate, ParityCheck, Provenance, Quality
from reattend.report.part import Number, Part, dumps
from reattend.report.site import ModelInfo, SiteEntry
from reattend.report.store import load_mapping, validated

if TYPE_CHECKING:
    from rich.console import RenderableType

SCHEMA: Final = 1


class Totals(Part):
    """Sums over the sites; derived, never written by hand."""

    found: int = Field(description="sites that were understood")
    verified: int = Field(description="sites that passed the self-check")
    converted: int
    kept: int = Field(description="left alone by the plan: rule `keep`, or no rule")
    refused: int
    not_understood: int
    cache_bytes_per_token_before: Number | None = Field(
        default=None, description="sites with a cost"
    )
    cache_bytes_per_token_after: Number | None = None
    cache_ratio: Number | None = Field(default=None, description="after / before")
    parameters_before: int | None = Field(default=None, description="whole model")
    parameters_after: int | None = None


class Report(Part):
    """The record of one conversion.

    Every optional part may be absent: a run without data has no quality, a dry run no parity.
    """

    schema_version: Literal[1] = Field(default=SCHEMA, alias="schema", description="of this file")
    reattend_version: str = __version__
    model: ModelInfo
    plan: dict[str, JsonValue] = Field(default_factory=dict, description="as resolved")
    sites: tuple[SiteEntry, ...] = Field(
        default=(), description="sorted by path, numbers as numbers"
    )
    parity: tuple[ParityCheck, ...] = ()
    quality: Quality | None = None
    calibration: Calibration | None = None
    gates: tuple[Gate, ...] = ()
    provenance: Provenance = Field(default_factory=Provenance)
    notes: tuple[str, ...] = Field(default=(), description="what the reader must also know")

    @model_validator(mode="before")
    @classmethod
    def _drop_derived(cls, data: Any) -> Any:
        """Totals are always computed from the sites, so a stored copy is not read."""
        if isinstance(data, Mapping) and "totals" in data:
            return {key: value for key, value in data.items() if key != "totals"}
        return data

    @field_validator("sites")
    @classmethod
    def _sorted_unique(cls, sites: tuple[SiteEntry, ...]) -> tuple[SiteEntry, ...]:
        ordered = sorted(sites, key=lambda site: _natural(site.path))
        for one, two in zip(ordered, ordered[1:], strict=False):
            if one.path == two.path:
                raise ValueError(f"site {one.path!r} is listed twice")
        return tuple(ordered)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def totals(self) -> Totals:
        """Sums over the sites."""
        count = dict.fromkeys(("converted", "kept", "refused", "not-understood"), 0)
        for site in self.sites:
            count["kept" if site.action == "unmatched" else site.action] += 1
        costs = [site.cost for site in self.sites if site.cost is not None]
        before = _total(cost.before.cache_bytes_per_token for cost in costs)
        after = _total(cost.after.cache_bytes_per_token for cost in costs)
        return Totals(
            found=len(self.sites) - count["not-understood"],
            verified=sum(site.verified is True for site in self.sites),
            converted=count["converted"],
            kept=count["kept"],
            refused=count["refused"],
            not_understood=count["not-understood"],
            cache_bytes_per_token_before=before,
            cache_bytes_per_token_after=after,
            cache_ratio=after / before if before and after is not None else None,
            parameters_before=self.model.parameters_before,
            parameters_after=self.model.parameters_after,
        )

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Any]) -> Report:
        """Read a report.

        Args:
            source: `report.json`, the folder it lies in, or its contents as a mapping.

        Returns:
            The report.

        Raises:
            ArgumentError: there is no such file, it is not JSON, it was written by a newer
                reattend, or it does not follow the schema.
        """
        data, where = load_mapping(source, "report.json", newest=SCHEMA)
        return validated(cls, data, where)

    def save(self, folder: str | Path) -> tuple[Path, ...]:
        """Write `report.json`, `report.md` and `report.html` into an existing folder.

        Returns:
            The paths of the three files.

        Raises:
            OSError: the folder does not exist, is read-only or full.
        """
        texts = {
            "report.json": self.to_json(),
            "report.md": self.to_markdown(),
            "report.html": self.to_html(),
        }
        paths = []
        for name, text in texts.items():
            paths.append(Path(folder) / name)
            paths[-1].write_bytes(text.encode("utf-8"))
        return tuple(paths)

    def to_json(self) -> str:
        """The report as JSON: sorted keys, fixed float format, one newline at the end."""
        data = self.model_dump(mode="json", by_alias=True)
        for site in data["sites"]:
            for name in ("groups", "head_use"):
                if not site[
                    name
                ]:  # written where there are any: files from before keep their bytes
                    del site[name]
        return dumps(_without_new(data))

    def to_markdown(self) -> str:
        """The report as GitHub Markdown, without plots."""
        from reattend.report.markdown import to_markdown

        return to_markdown(self)

    def to_html(self) -> str:
        """The report as one self-contained page, with plots where matplotlib is installed."""
        from reattend.report.html import to_html

        return to_html(self)

    def summary(self) -> RenderableType:
        """The report for the console, as a rich renderable."""
        from reattend.report.console import summary

        return summary(self)

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """JSON Schema of `report.json`; the committed copy is `schema-1.json`."""
        return cls.model_json_schema(by_alias=True, mode="serialization")


def _without_new(data: dict[str, Any]) -> dict[str, Any]:
    """Fields of `quality` that are younger than the schema are written where they say something."""
    quality = data["quality"]
    if quality is None:
        return data
    rows = [row if row["gain"] else _less(row, "gain") for row in quality["rows"]]
    empty = [name for name in ("peers", "recall_data") if not quality[name]]
    return {**data, "quality": {**_less(quality, *empty), "rows": rows}}


def _less(data: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key not in names}


def _total(values: Iterable[float]) -> float | None:
    listed = list(values)
    return sum(listed) if listed else None


def _natural(path: str) -> list[tuple[bool, int, str]]:
    """Sort key that puts `layers.10` after `layers.9`."""
    pieces = re.split(r"(\d+)", path)
    return [(p.isdigit(), int(p) if p.isdigit() else 0, p) for p in pieces]
