"""FSDP2: the end-to-end stage with the parameters of both models spread over the processes.

Asked for as accelerate users do, by `accelerate config` and `accelerate launch`, or under torchrun
with `ACCELERATE_USE_FSDP=true FSDP_VERSION=2`. Every repeated block is one unit of
`torch.distributed.fsdp.fully_shard`, the rest of the model is another. A process holds its share
of the float32 weights, gradients and AdamW moments, plus one block in full while it computes.
The caller's models stay whole in every process.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from reattend.errors import ArgumentError


def wanted() -> bool:
    """Whether accelerate's environment asks for FSDP.

    Raises:
        ArgumentError: it asks for FSDP 1, or for something the stage does not do.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ArgumentError(
            "calibration shards with FSDP2 only",
            where="FSDP_VERSION",
            why=f"it is {os.environ.get('FSDP_VERSION', '1 (not set)')}",
            next_step="set FSDP_VERSION=2 (fsdp_version: 2 in accelerate's config)",
        )
    for name in ("FSDP_OFFLOAD_PARAMS", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        if os.environ.get(name, "false").lower() == "true":
            raise ArgumentError(
                "calibration does not follow this setting of accelerate",
                where=name,
                why="trained weights stay on the models' device, and every process loads them",
                next_step=f"set {name}=false",
            )
    return True


def shard(model: nn.Module, blocks: list[str]) -> dict[int, tuple[nn.Module, str]]:
    """Spread a model's parameters over all processes, in place.

    Args:
        model: a working copy; equal in all processes.
        blocks: paths of the units. One that shares a parameter with the rest of the model is left
            to the outermost unit.

    Returns:
        By id of every old parameter: the module that holds its sharded successor, and the name.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    places = {
        id(p): (module, name)
        for module in model.modules()
        for name, p in module._parameters.items()
        if p is not None
    }
    whole = {p for p in model.parameters() if p.dim() == 0}  # fully_shard refuses scalars
    for parameter in model.parameters():
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    from accelerate.utils import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin()
    options: dict[str, Any] = {"mesh": mesh, "ignored_params": whole}
    for path in _alone(model, blocks):
        fully_shard(
            model.get_submodule(path), **options,
            reshard_after_forward=bool(plugin.reshard_after_forward),
        )  # fmt: skip
    fully_shard(model, **options)
    return places


def unshard(model: nn.Module) -> None:
    """Every parameter whole again in every process; the model is not to be called any more."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a share of the tensor only."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered from all processes if it is sharded: all of them must ask."""
    if not is_sharded(tensor):
        return tensor
    full: Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
    return full


@torch.no_grad()
def fill(target: Tensor, full: Tensor) -> None:
    """Write a whole tensor, equal in all processes, into `target` or this process' share of it."""
    if is_sharded(target):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = target
        full = distribute_tensor(
            full.to(target.device), sharded.device_mesh, sharded.placements, src_data_rank=None
        )
    target.copy_(full)


def _alone(model: nn.Module, blocks: list[str]) -> list[str]:
    """Blocks that share no parameter with anything outside them."""
    owners: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = next((b for b in blocks if name.startswith(f"{b}.")), "")
        owners.setdefault(id(parameter), set()).add(owner)
    mixed = {owner for found in owners.values() if len(found) > 1 for owner in found}
    return [b for b in blocks if b not in mixed]
