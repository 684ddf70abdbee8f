"""Calibration: short distillation of a converted model from its original."""

from __future__ import annotations

from reattend.calibrate.run import StageResult, calibrate

__all__ = ["StageResult", "calibrate"]
