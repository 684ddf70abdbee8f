"""Registers: which kernels may take more of them or have other tiles, and which spill all the same.

Left to itself the compiler spills a few registers of small tiles, so that more programs run side by
side on a multiprocessor; told that it may take all, it spills none of those. What is not listed may
not spill on NVIDIA (`reattend.kernels.aot` checks).
"""

from __future__ import annotations

ALL_REGISTERS = 255  # of a thread on NVIDIA

Entry = tuple[str, int, int]  # kernel, bytes per element, width class

#: by target; none of these was measured
FREE: dict[str, tuple[Entry, ...]] = {
    "sm_80": (
        ("attention_decode", 2, 128),
        ("attention_decode", 4, 64),
        ("attention_dkv", 4, 64),
        ("attention_dkv", 4, 128),
        ("latent_decode", 4, 128),
        ("latent_decode_wide", 2, 128),
        ("latent_prefill", 4, 128),
        ("latent_prefill", 4, 256),
        ("linear_state", 2, 256),
        ("routed_dkv", 4, 128),
        ("routed_dq", 4, 64),
        ("routed_dq", 4, 256),
        ("routed_prefill", 4, 64),
        ("routed_prefill", 4, 128),
        ("routed_prefill", 4, 256),
        ("sparse_decode", 4, 256),
        ("sparse_dkv", 2, 64),
        ("sparse_dkv", 4, 64),
        ("sparse_dq", 4, 128),
        ("sparse_dq", 4, 256),
        ("sparse_prefill", 2, 128),
        ("sparse_prefill", 2, 256),
    ),
    "sm_90": (
        ("attention_decode", 4, 256),
        ("attention_dkv", 4, 64),
        ("attention_dkv", 4, 128),
        ("attention_dkv", 4, 256),
        ("attention_dq", 4, 128),
        ("latent_prefill", 4, 256),
        ("routed_dkv", 2, 256),
        ("routed_dkv", 4, 128),
        ("routed_dkv", 4, 256),
        ("routed_dq", 2, 256),
        ("routed_dq", 4, 256),
        ("routed_prefill", 4, 128),
        ("sparse_decode", 2, 64),
        ("sparse_decode", 2, 128),
        ("sparse_decode", 4, 256),
        ("sparse_dkv", 4, 64),
        ("sparse_dkv", 4, 128),
        ("sparse_dkv", 4, 256),
        ("sparse_dq", 2, 256),
    ),
    "sm_100": (
        ("attention_decode", 4, 256),
        ("attention_dkv", 4, 64),
        ("attention_dq", 2, 256),
        ("latent_decode_wide", 2, 128),
        ("latent_dq", 2, 128),
        ("latent_prefill", 4, 256),
        ("linear_read_back", 4, 256),
        ("linear_state", 2, 256),
        ("routed_decode", 2, 64),
        ("routed_dkv", 2, 128),
        ("routed_dkv", 4, 128),
        ("routed_dq", 4, 256),
        ("routed_prefill", 2, 64),
        ("routed_prefill", 4, 128),
        ("routed_prefill", 4, 256),
        ("sparse_decode", 2, 128),
        ("sparse_decode", 4, 256),
        ("sparse_dkv", 2, 128),
        ("sparse_dkv", 4, 64),
        ("sparse_dkv", 4, 128),
        ("sparse_dkv", 4, 256),
        ("sparse_dq", 2, 128),
        ("sparse_dq", 2, 256),
        ("sparse_dq", 4, 128),
        ("sparse_prefill", 2, 64),
    ),
}

#: 8 warps in place of 4, which divides a program's numbers among twice as many registers;
#: on sm_100 those of 2 bytes spill in fp16 otherwise, which the report does not compile
EIGHT_WARPS: dict[str, tuple[Entry, ...]] = {
    "sm_80": (
        ("linear_channels", 2, 128),
        ("linear_read", 2, 256),
        ("linear_read", 4, 256),
        ("linear_read_back", 2, 256),
        ("linear_read_back", 4, 256),
    ),
    "sm_90": (("linear_read_back", 4, 256),),
    "sm_100": (
        ("linear_channels", 2, 128),
        ("linear_read", 2, 256),
        ("linear_read_back", 2, 256),
        ("linear_read_back", 4, 256),
    ),
}

#: classes of their own, for widths whose tiles have masked columns: tiles of the next class spill
NARROW: dict[str, dict[Entry, dict[str, int]]] = {
    "sm_80": {("attention_prefill", 2, 96): {"rows": 64}},
    "sm_90": {
        ("attention_dq", 2, 192): {"keys": 32},
        ("attention_prefill", 2, 192): {"keys": 32},
        ("latent_decode_tall", 2, 384): {"rows": 32},
        ("latent_prefill", 2, 192): {"rows": 64},
        ("latent_prefill", 2, 384): {"rows": 32, "keys": 32},
        ("routed_prefill", 2, 96): {"stages": 1},
    },
    "sm_100": {("routed_prefill", 2, 192): {"rows": 64}},
}

#: bytes of stack a thread of what spills all the same, fastest in a sweep on an H200; nothing else
#: may spill
SPILLS: dict[str, dict[Entry, int]] = {
    "sm_80": {},
    "sm_90": {
        ("attention_prefill", 2, 256): 64,
        ("latent_decode_tall", 2, 512): 104,
        ("latent_decode_wide", 2, 512): 48,
        ("latent_prefill", 2, 256): 256,
        ("latent_prefill", 2, 512): 400,
    },
    "sm_100": {},
}
