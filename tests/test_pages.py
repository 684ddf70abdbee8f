"""Pages of weight files: given back while nobody needs them, never one that was written to."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reattend.pages import file_bytes, give_back, given_back

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="madvise of Linux")

SIZE = 32 << 20


def mapped(folder: Path) -> torch.Tensor:
    """A tensor of 32 MiB that lies in a file."""
    file = folder / "model.safetensors"
    save_file({"x": torch.arange(SIZE // 4, dtype=torch.float32)}, file)
    return load_file(file)["x"]


def test_pages_go_and_come_back(tmp_path: Path) -> None:
    x = mapped(tmp_path)
    want = x.sum(dtype=torch.float64)
    full = file_bytes()
    give_back()
    assert file_bytes() < full - SIZE // 2
    assert x.sum(dtype=torch.float64) == want


def test_what_was_written_stays(tmp_path: Path) -> None:
    x = mapped(tmp_path)
    x[5] = -1.0  # a page of this process alone
    give_back()
    assert float(x[5]) == -1.0 and float(x[6]) == 6.0


def test_they_go_while_a_model_is_looked_at(tmp_path: Path) -> None:
    x = mapped(tmp_path)
    x.sum()
    full = file_bytes()
    with given_back(-full):  # whatever is there is too much
        until = time.monotonic() + 10
        while file_bytes() > full - SIZE // 2 and time.monotonic() < until:
            time.sleep(0.01)
        assert file_bytes() < full - SIZE // 2
    x.sum()
    time.sleep(0.1)
    assert file_bytes() > full - SIZE // 2  # nobody looks any more
