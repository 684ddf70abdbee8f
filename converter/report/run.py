"""`Run`: what depends on the machine and the moment, kept out of the report.

`report.json` is the same for the same inputs; times, host, paths and measured memory are not,
so they are written to `run.json` beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field

from reattend import __version__
from reattend.report.part import Number, Part, dumps
from reattend.report.store import load_mapping, validated

SCHEMA: Final = 1


class StageRun(Part):
    """One stage as it ran."""

    name: str = Field(min_length=1)
    seconds: Number = Field(ge=0)
    peak_bytes_predicted: int | None = Field(default=None, ge=0)
    peak_bytes: int | None = Field(
        default=None, ge=0, description="measured peak memory of the stage"
    )
    reused: bool = Field(default=False, description="taken from an earlier, interrupted run")


class Run(Part):
    """When, where and how long."""

    schema_version: Literal[1] = Field(default=SCHEMA, alias="schema")
    reattend_version: str = __version__
    started: str = Field(default="", description="ISO 8601, UTC")
    finished: str = ""
    host: str = ""
    platform: str = ""
    device: str = ""
    threads: int | None = Field(default=None, ge=1)
    processes: int = Field(default=1, ge=1)
    command: tuple[str, ...] = ()
    paths: dict[str, str] = Field(default_factory=dict, description="model, data, out")
    baseline_bytes: int = Field(
        default=0, ge=0, description="memory before the first stage: Python and its packages"
    )
    stages: tuple[StageRun, ...] = ()

    @property
    def seconds(self) -> float:
        """Sum over the stages that were not reused."""
        return sum(stage.seconds for stage in self.stages if not stage.reused)

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Any]) -> Run:
        """Read `run.json`: the file, its folder, or its contents.

        Raises:
            ArgumentError: as `Report.load`.
        """
        data, where = load_mapping(source, "run.json", newest=SCHEMA)
        return validated(cls, data, where)

    def to_json(self) -> str:
        """The run as JSON."""
        return dumps(self.model_dump(mode="json", by_alias=True))

    def save(self, folder: str | Path) -> Path:
        """Write `run.json` into an existing folder and return its path."""
        path = Path(folder) / "run.json"
        path.write_bytes(self.to_json().encode("utf-8"))
        return path
