"""What both launchers share on the host: target, device guard, number of splits, arguments."""

from __future__ import annotations

import contextlib
import os
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from reattend.kernels.configs import KernelConfig
from reattend.kernels.core import Rule
from reattend.kernels.targets import Target, target_of_device
from reattend.kernels.triton_tiles import merge_splits

# costs of split decode, in tiles of keys
START_TILES = 2.0
MERGE_TILES = 2.0
MERGE_TILES_PER_SPLIT = 0.05
MAX_SPLITS = 64
MERGE_TILE = 8192  # numbers (splits x columns) of a merging program


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def device_target(device: torch.device) -> Target | None:
    """The shipped target of a CUDA or ROCm device, None when there is none."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return target_of_device("hip", properties.gcnArchName.split(":")[0])
    return target_of_device("cuda", 10 * properties.major + properties.minor)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's GPU current: Triton launches on the current one."""
    if tensor.device.type != "cuda":
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def next_power_of_two(width: int) -> int:
    """Tile width that holds ``width`` (at least 16, the smallest matrix tile)."""
    return max(16, int(triton.next_power_of_2(width)))


def unit_stride(x: Tensor) -> Tensor:
    """The kernels assume that the last dimension is dense; copy where it is not."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def count_splits(device: torch.device, programs: int, capacity: int, config: KernelConfig) -> int:
    """Splits of the keys, from sizes the host knows (never from kv_len).

    Args:
        device: where the kernel runs.
        programs: programs without splitting.
        capacity: rows of the cache.
        config: the kernel's configuration.
    """
    if device.type != "cuda":
        return 1
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return best_splits(processors * config.resident, programs, -(-capacity // config.keys))


@lru_cache(maxsize=1024)
def best_splits(slots: int, programs: int, tiles: int) -> int:
    """The number of splits with the shortest predicted time.

    Programs run in waves of ``slots``. A program costs its tiles and `START_TILES` to begin and
    to end; merging costs `MERGE_TILES` and, per split, `MERGE_TILES_PER_SPLIT`.

    Args:
        slots: programs the device runs at once.
        programs: programs without splitting.
        tiles: tiles of keys of one program without splitting.
    """

    def cost(splits: int) -> float:
        waves = -(-programs * splits // slots)
        merging = MERGE_TILES + MERGE_TILES_PER_SPLIT * splits if splits > 1 else 0.0
        return waves * (-(-tiles // splits) + START_TILES) + merging

    return min(range(1, max(min(tiles, MAX_SPLITS), 1) + 1), key=cost)


def tile_options(softcap: float, config: KernelConfig, x: Tensor) -> dict[str, Any]:
    """Compile-time and launch options that every kernel with tiles takes."""
    return {
        "HAS_SOFTCAP": softcap > 0,
        # the interpreter holds bf16 as integers: compute in fp32 there
        "UPCAST": interpreting() and x.dtype == torch.bfloat16,
        "PRECISION": "ieee",
        "BLOCK_ROWS": config.rows,
        "BLOCK_KEYS": config.keys,
        "enable_fp_fusion": True,
        **config.launch,
    }


def rule_options(rule: Rule, config: KernelConfig, x: Tensor) -> dict[str, Any]:
    """Options of the kernels whose mask is a rule."""
    return tile_options(rule.softcap, config, x) | {
        "CAUSAL": rule.causal,
        "HAS_WINDOW": rule.sliding_window > 0,
    }


def common_options(rule: Rule, config: KernelConfig, paged: bool, x: Tensor) -> dict[str, Any]:
    """Options of those of them that read pages too."""
    return rule_options(rule, config, x) | {"PAGED": paged}


def outputs(
    shape: tuple[int, int, int, int], splits: int, like: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output and lse, and the buffers the kernel writes (the same ones when not split)."""
    b, h, n, e = shape
    y = like.new_empty(shape)
    lse = like.new_empty(b, h, n, dtype=torch.float32)
    if splits == 1:
        return y, lse, y, lse
    part = like.new_empty(splits, b, h, n, e, dtype=torch.float32)
    return y, lse, part, like.new_empty(splits, b, h, n, dtype=torch.float32)


def merge(part: Tensor, part_lse: Tensor, y: Tensor, lse: Tensor) -> None:
    """Combine the splits into ``y`` and ``lse``."""
    e = y.shape[-1]
    block_splits = triton.next_power_of_2(part.shape[0])
    columns = min(MERGE_TILE // block_splits, next_power_of_two(e))
    merge_splits[(lse.numel() * -(-e // columns),)](
        part,
        part_lse,
        y,
        lse,
        lse.numel(),
        part.shape[0],
        E=e,
        BLOCK_SPLITS=block_splits,
        BLOCK_E=columns,
        num_warps=4,
        enable_fp_fusion=True,
    )
