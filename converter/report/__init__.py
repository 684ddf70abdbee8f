"""The record of a conversion: `Report` (what and how well) and `Run` (when and where)."""

from __future__ import annotations

from reattend.report.model import Report
from reattend.report.run import Run

__all__ = ["Report", "Run"]
