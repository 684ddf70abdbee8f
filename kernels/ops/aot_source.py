"""The kernels as a compiler is given them: constants, and the signature that launching specialises.

Layout of no tensor is needed: pointers and strides of the big tensors are multiples of 16.
"""

from __future__ import annotations

from typing import Any

import triton
from triton.compiler import ASTSource

from reattend.kernels.aot_forms import Form
from reattend.kernels.attention import triton_dkv as attention_dkv_kernels
from reattend.kernels.attention import triton_dq as attention_dq_kernels
from reattend.kernels.attention import triton_kernel as attention_kernels
from reattend.kernels.configs import WHOLE, KernelConfig
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

ROPE_WIDTH = 64
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


def _constants(form: Form, full: bool) -> dict[str, Any]:
    kernel, width, config = form.kernel, form.wide, form.config
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
        constants |= {"BLOCK": form.block}
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


def source_of(form: Form) -> ASTSource:
    """Signature as the launcher's arguments specialise it: aligned pointers and strides."""
    function, full = _kernel(form.kernel), form.variant == "full"
    if form.kernel.startswith("linear"):
        every = _linear_constants(form.wide, form.config, full, function.arg_names)
    else:
        every = _constants(form, full)
    constants = {name: every[name] for name in function.arg_names if name in every}
    data = "bf16" if form.size == 2 else "fp32"
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in _FLOATS:
            signature[name] = "fp32"
        elif name in _DATA or name in _POINTERS:
            kind = "fp32" if name == "y" and "decode" in form.kernel else data
            chunked = form.kernel in ("linear_state", "linear_read")
            undivided = name == "state" and chunked and not full  # as exact as what reads it
            signature[name] = "*" + (data if undivided else _POINTERS.get(name, kind))
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
            if "_" in name and name != "table_b":  # strides of the big tensors
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(function, signature, constants, attributes)
