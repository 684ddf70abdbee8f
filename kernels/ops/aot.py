"""Ahead-of-time compile of every shipped kernel, without a GPU.

For each target and each entry of `reattend.kernels.configs` the kernel is compiled to machine
code and its resources are read: shared memory from Triton's metadata, registers and stack (spill)
from the binary itself (cuobjdump for NVIDIA, the assembly's directives for AMD). The compiler
accepts kernels that can never be launched, so the limits are checked here.

Run in a process without ``TRITON_INTERPRET``: the interpreter replaces the decorator.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
import warnings
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from reattend.kernels.aot_forms import Form
from reattend.kernels.aot_source import source_of
from reattend.kernels.spills import SPILLS
from reattend.kernels.targets import SMALL_SHARED_LIMIT, Target

AMD_SPILL_LIMIT = 64  # vector registers


@dataclass(frozen=True)
class Compiled:
    """Resources of one compiled kernel.

    Attributes:
        target: name of the target.
        kernel, width, width_class, block, variant: see `Form`.
        element_bytes: 2 (bf16) or 4 (fp32).
        config: tile sizes.
        source: fingerprint of all that the machine code depends on.
        shared: bytes of shared memory per program.
        registers: registers per thread (AMD: vector registers).
        spill: bytes of stack per thread (AMD: vector registers spilled).
        matrix_ops: matrix instructions in the code.
        seconds: time to compile.
        problems: what breaks the limits; empty when it may ship.
    """

    target: str
    kernel: str
    width: int
    width_class: int
    element_bytes: int
    variant: str
    block: int
    config: dict[str, int]
    source: str
    shared: int
    registers: int
    spill: int
    matrix_ops: int
    seconds: float
    problems: list[str]


def _nvidia_resources(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes) of a cubin, by the bundled cuobjdump."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        run = [tool, "-res-usage", str(path)]
        text = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text[:300]}")
    return int(found[1]), int(found[2])


def _amd_resources(assembly: str) -> tuple[int, int]:
    """(vector registers, spilled vector registers) from the assembly's metadata."""

    def read(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", assembly)
        if found is None:
            raise RuntimeError(f"the assembly has no .{key}")
        return int(found[1])

    # on CDNA3 the vector and accumulation registers are one file: vgpr_count is the sum
    return read("vgpr_count"), read("vgpr_spill_count")


def _spill_limit(target: Target, form: Form) -> int:
    if target.backend != "cuda":
        return AMD_SPILL_LIMIT
    return SPILLS[target.name].get((form.kernel, form.size, form.width_class), 0)


def _problems(
    target: Target, shared: int, registers: int, spill: int, spill_limit: int, matrix: int
) -> list[str]:
    limit = SMALL_SHARED_LIMIT if target.name == "sm_80" else target.shared_limit
    found = []
    if shared > limit:
        found.append(f"shared memory {shared} B is over {limit} B")
    if registers > target.register_limit:
        found.append(f"{registers} registers are over {target.register_limit}")
    if spill > spill_limit:
        found.append(f"spills {spill}")
    if not matrix:
        found.append("no matrix instruction")
    return found


def _options(form: Form) -> dict[str, Any]:
    return {**form.config.launch, "enable_fp_fusion": True}


def fingerprint(target: Target, form: Form) -> str:
    """Of a form's sources, constants, options, target and compiler: equal ones compile equally."""
    parts = (source_of(form).hash(), sorted(_options(form).items()), target.arch)
    return sha256(repr((*parts, triton.__version__)).encode()).hexdigest()[:16]


def compile_form(target: Target, form: Form) -> Compiled:
    """Compile a form of a kernel for one target and read its resources."""
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = triton.compile(
            source_of(form),
            target=GPUTarget(target.backend, target.arch, target.warp_size),
            options=_options(form),
        )
    seconds = round(time.perf_counter() - began, 2)
    if target.backend == "cuda":
        registers, spill = _nvidia_resources(compiled.asm["cubin"])
        text, pattern = compiled.asm["ptx"], r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)"
    else:
        text, pattern = compiled.asm["amdgcn"], r"\bv_mfma"
        registers, spill = _amd_resources(text)
    matrix = len(re.findall(pattern, text))
    # exact fp32 products have no matrix instruction on NVIDIA, and one token needs none
    needed = (form.size == 2 or target.backend == "hip") and form.kernel != "linear_step"
    shared, expected = int(compiled.metadata.shared), matrix if needed else 1
    limit = _spill_limit(target, form)
    # fmt: off
    return Compiled(
        target.name, form.kernel, form.wide, form.width_class, form.size, form.variant, form.block,
        form.config.told, fingerprint(target, form), shared, registers, spill, matrix, seconds,
        _problems(target, shared, registers, spill, limit, expected),
    )
    # fmt: on
