"""The library of `kernels/csrc`, built once per test process, and tools to run single nodes."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import pytest

CSRC = Path(__file__).parents[1] / "kernels/csrc"
_FOLDER = tempfile.TemporaryDirectory(prefix="reattend-library-")


def build_script() -> Any:
    spec = importlib.util.spec_from_file_location("reattend_csrc_build", CSRC / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def built() -> Path:
    """The library, made by today's sources; skips the test where it cannot be built."""
    script = build_script()
    if why := script.missing():
        pytest.skip(f"the ONNX kernels cannot be built: {why}")
    out = Path(_FOLDER.name, script.LIBRARY.name)
    script.build(script.find_headers(), out)
    return out


class InstructionSets:
    """Which kernels of the loaded library run."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.ReattendTarget.restype = ctypes.c_char_p
        self.library.ReattendUse.restype = ctypes.c_bool
        self.best = self.library.ReattendTarget()

    def use(self, name: str) -> None:
        if not self.library.ReattendUse(name.encode()):
            pytest.skip(f"this processor has no {name}")
        assert self.library.ReattendTarget() == name.encode()

    def reset(self) -> None:
        assert self.library.ReattendUse(self.best)
