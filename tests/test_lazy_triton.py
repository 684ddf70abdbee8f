"""Importing the ops stays light, and a missing Triton is a clear error."""

from __future__ import annotations

import subprocess
import sys

import pytest

from reattend.errors import EXIT_MISSING, MissingExtraError
from reattend.kernels.lazy_triton import load_launch

SCRIPT = """
import sys
import reattend.kernels
assert not {"torch", "triton"} & set(sys.modules)
import reattend.kernels.attention, reattend.kernels.latent_attention, reattend.kernels.cache_put
import reattend.kernels.sparse_attention
loaded = {name for name in sys.modules if name.startswith("reattend.kernels")}
assert not {n for n in loaded if "triton_" in n or n.endswith(("launch", "launching"))}, loaded
"""


def test_importing_the_ops_imports_no_kernel() -> None:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n == "triton" or n.startswith("triton.")]:
        monkeypatch.delitem(sys.modules, name)
    for name in [n for n in sys.modules if n.startswith("reattend.kernels.") and "tri" in n]:
        if name != "reattend.kernels.lazy_triton":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "reattend.kernels.attention.launch", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(MissingExtraError, match="not installed") as caught:
        load_launch("reattend.kernels.attention.launch")
    assert caught.value.exit_code == EXIT_MISSING
    assert "reattend[gpu]" in str(caught.value)


def test_other_import_errors_are_not_hidden() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        load_launch("reattend.kernels.no_such_module")
