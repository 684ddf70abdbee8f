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
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from reattend.kernels.attention import triton_dkv as attention_dkv_kernels
from reattend.kernels.attention import triton_dq as attention_dq_kernels
from reattend.kernels.attention import triton_kernel as attention_kernels
from reattend.kernels.configs import WHOLE, KernelConfig, shipped, variants
from reattend.kernels.latent_attention import triton_dkv as latent_dkv_kernels
from reattend.kernels.latent_attention import triton_dq as latent_dq_kernels
from reattend.kernels.latent_attention import triton_kernel as latent_kernels
from reattend.kernels.linear_attention import triton_backward as linear_kernels
from reattend.kernels.linear_attention import triton_channels as channel_kernels
from reattend.kernels.linear_attention import triton_kernel as linear_read_kernels
from reattend.kernels.linear_attention import triton_state as linear_state_kernels
from reattend.kernels.routed_attention import triton_kernel as routed_kernels
from reattend.kernels.sparse_attention import triton_backward as sparse_backward_kernels
from reattend.kernels.sparse_attention import triton_kernel as sparse_kernels
from reattend.kernels.spills import SPILLS
from reattend.kernels.targets import SMALL_SHARED_LIMIT, Target

ROPE_WIDTH = 64
AMD_SPILL_LIMIT = 64  # vector registers
SPARSE_BLOCK = 64
_POINTERS = {"lse": "fp32", "kv_start": "i64", "kv_len": "i64", "table": "i32"}
_POINTERS |= dict.fromkeys(("row_ptr", "col", "tile", "head_layout", "col_ptr", "rows"), "i32")
_POINTERS |= {"preceding": "i32", "active": "i8"}
_POINTERS |= {"tiles": "i64", "shift": "fp32", "top": "fp32"}
_FLOATS = ("scale", "softcap")
_POINTERS |= dict.fromkeys(
    ("state", "before", "after", "decay", "later", "within", "added", "mass"), "fp32"
)
_DATA = ("q", "k", "v", "y", "q_nope", "q_rope", "latent", "rope", "dy", "dq", "dk", "dv",
         "du", "dq_nope", "dq_rope", "d_latent", "d_rope")  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """Resources of one compiled kernel.

    Attributes:
        target: name of the target.
        kernel: name of the kernel.
        width: head width, or latent rank (with a rotary part of `ROPE_WIDTH`).
        element_bytes: 2 (bf16) or 4 (fp32).
        variant: ``plain`` (causal only) or ``full`` (window, softcap and pages as well, of linear
            kernels decay and a denominator); which are compiled, `variants` says.
        config: tile sizes.
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
    element_bytes: int
    variant: str
    config: dict[str, int]
    shared: int
    registers: int
    spill: int
    matrix_ops: int
    seconds: float
    problems: list[str]


def _kernel(name: str) -> Any:
    if name.startswith("linear"):
        every = (linear_kernels, linear_read_kernels, linear_state_kernels, channel_kernels)
        return getattr(next(m for m in every if name in vars(m)), name)
    modules = {"attention": attention_kernels, "latent": latent_kernels, "sparse": sparse_kernels}
    modules["routed"] = routed_kernels
    modules |= {"attention_dq": attention_dq_kernels, "attention_dkv": attention_dkv_kernels}
    modules |= {"latent_dq": latent_dq_kernels, "latent_dkv": latent_dkv_kernels}
    if name in ("routed_dq", "routed_dkv"):  # the same kernels, over lists
        name = name.replace("routed", "attention")
    module = modules.get(name, modules[name.partition("_")[0]])
    if name.startswith("sparse_d") and not name.endswith("decode"):
        module = sparse_backward_kernels
    return getattr(module, name.removesuffix("_wide").removesuffix("_tall"))


def _constants(kernel: str, width: int, config: KernelConfig, full: bool) -> dict[str, Any]:
    block = triton.next_power_of_2(width)
    constants: dict[str, Any] = {
        "HAS_SOFTCAP": full,
        "UPCAST": False,
        "PRECISION": "ieee",
        "BLOCK_ROWS": config.rows,
        "BLOCK_KEYS": config.keys,
    }
    if not kernel.startswith("sparse"):
        constants |= {"CAUSAL": True, "HAS_WINDOW": full, "PAGED": full}
        constants |= {"ROUTED": kernel.startswith("routed")}
    else:
        constants |= {"BLOCK": SPARSE_BLOCK}
    if not kernel.startswith("latent"):
        constants |= {"D": width, "E": width, "BLOCK_D": block, "BLOCK_E": block}
    else:
        spread = config.spread_keys if kernel == "latent_dkv" else config.spread
        constants |= {"RANK": width, "ROPE": ROPE_WIDTH, "SPREAD": spread}
        constants |= {"BLOCK_RANK": block, "BLOCK_ROPE": triton.next_power_of_2(ROPE_WIDTH)}
        constants |= {"p_kept": None, "ds_kept": None, "SLICE": config.slice or WHOLE}
    return constants


def _linear_constants(width: int, config: KernelConfig, full: bool, names: Any) -> dict[str, Any]:
    whole = "BLOCK_ROWS" not in names  # all features are one tile
    return {
        "F": width, "E": width, "HAS_DECAY": full, "ONES": full, "ADDED": full, "OWN": True,
        "UPCAST": False, "PRECISION": "ieee", "BLOCK_ROWS": config.rows,
        "BLOCK_F": triton.next_power_of_2(width) if whole else config.keys,
        "BLOCK_E": config.keys, "BACK": full, "FEATURED": full,
        "WHOLE_F": triton.next_power_of_2(width),
    }  # fmt: skip


def _source(kernel: str, width: int, size: int, config: KernelConfig, full: bool) -> ASTSource:
    """Signature as the launcher's arguments specialise it: aligned pointers and strides."""
    function = _kernel(kernel)
    if kernel.startswith("linear"):
        every = _linear_constants(width, config, full, function.arg_names)
    else:
        every = _constants(kernel, width, config, full)
    constants = {name: every[name] for name in function.arg_names if name in every}
    data = "bf16" if size == 2 else "fp32"
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in _FLOATS:
            signature[name] = "fp32"
        elif name in _DATA or name in _POINTERS:
            kind = "fp32" if name == "y" and "decode" in kernel else data
            signature[name] = "*" + _POINTERS.get(name, kind)
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
            if "_" in name and name != "table_b":  # strides of the big tensors
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(function, signature, constants, attributes)


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


def _spill_limit(target: Target, kernel: str, width: int, size: int) -> int:
    if target.backend != "cuda":
        return AMD_SPILL_LIMIT
    return SPILLS[target.name].get((kernel, size, width), 0)


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


def compile_config(
    target: Target,
    kernel: str,
    width: int,
    size: int,
    config: KernelConfig,
    variant: str = "full",
) -> Compiled:
    """Compile one kernel for one target and read its resources.

    Args:
        target: what to compile for.
        kernel: kernel of the table in `reattend.kernels.configs`.
        width: head width, or latent rank.
        size: bytes per element, 2 or 4.
        config: tile sizes.
        variant: one of `variants`.
    """
    options = {**config.launch, "enable_fp_fusion": True}
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = triton.compile(
            _source(kernel, width, size, config, variant == "full"),
            target=GPUTarget(target.backend, target.arch, target.warp_size),
            options=options,
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
    needed = (size == 2 or target.backend == "hip") and kernel != "linear_step"
    expected = matrix if needed else 1
    shared = int(compiled.metadata.shared)
    limit = _spill_limit(target, kernel, width, size)
    return Compiled(
        target.name,
        kernel,
        width,
        size,
        variant,
        config.told,
        shared,
        registers,
        spill,
        matrix,
        seconds,
        _problems(target, shared, registers, spill, limit, expected),
    )


def compile_target(target: Target, only: str = "") -> list[Compiled]:
    """Compile every shipped configuration of a target in its variants.

    Args:
        target: what to compile for.
        only: kernels whose names begin so.
    """
    return [
        compile_config(target, *entry, variant)
        for entry in shipped(target.name)
        if entry[0].startswith(only)
        for variant in variants(entry[0])
    ]
