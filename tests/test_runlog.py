"""What goes to `run.json`: stages, reuse, predictions and this process's own memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from reattend.runlog import RunLog, peak_memory
from reattend.source import Source


def source() -> Source:
    return Source(nn.Linear(2, 2), None, "m", None, False, {})


def test_stages_reuse_and_predictions(tmp_path: Path) -> None:
    log = RunLog()
    for name in ("open", "statistics"):
        with log.stage(name):
            pass
    log.reused("statistics")
    log.predicted = {"open": 1000}
    run = log.finish(source(), tmp_path / "out")
    opened, statistics = run.stages
    assert (opened.reused, statistics.reused) == (False, True)
    assert opened.peak_bytes_predicted == log.baseline + 1000
    assert statistics.peak_bytes_predicted is None
    assert run.seconds == opened.seconds
    assert run.paths == {"out": str(tmp_path / "out")}


def test_a_stage_that_fails_is_not_recorded() -> None:
    log = RunLog()
    with pytest.raises(ValueError, match="x"), log.stage("find"):
        raise ValueError("x")
    assert log.finish(source(), None).stages == ()


def test_memory_is_seen_when_it_was_used_and_is_this_processs_own() -> None:
    before = peak_memory()
    block = torch.ones(120_000_000, dtype=torch.uint8)
    assert peak_memory() >= block.numel()
    del block
    assert peak_memory() >= before
    code = (
        "import importlib.util as u, sys\n"
        "sys.modules['torch'] = type(sys)('torch')\n"
        "import types; r = types.ModuleType('reattend.report'); r.Run = object\n"
        "n = types.ModuleType('reattend.report.run'); n.StageRun = object\n"
        "s = types.ModuleType('reattend.source'); s.Source = object\n"
        "sys.modules |= {'reattend.report': r, 'reattend.report.run': n, 'reattend.source': s}\n"
        "from reattend.runlog import peak_memory; print(peak_memory())"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(told.stdout) < 60_000_000  # bytes; this process holds several times as much
