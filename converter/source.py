"""Open what the user gave: a live module, a folder, or a model id already on this machine."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reattend.errors import ArgumentError
from reattend.sharing import is_shared
from reattend.source_check import check_weights
from reattend.source_load import load_source
from reattend.weight_files import hash_files


@dataclass
class Source:
    """The original model and where it came from.

    Attributes:
        model: in eval mode; never changed by the pipeline.
        name: what the user calls it; never a path.
        folder: where its files lie, None for a live module or an id.
        home: the same, for an id its place in the local cache.
        owned: we loaded it, so its tensors may be used freely.
        hashes: sha256 by weight file, or of the state dict of a live module.
    """

    model: nn.Module
    tokenizer: Any
    name: str
    folder: Path | None
    owned: bool
    hashes: dict[str, str]
    home: Path | None = None

    @property
    def state(self) -> list[Any]:
        """What the weights are, as plain data: `hashes`, dtypes and the kind of device."""
        dtypes = sorted({str(p.dtype) for p in self.model.parameters()})
        return [self.hashes, dtypes, self.device.type]

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.model.parameters()).device


def open_source(
    model: Any,
    *,
    tokenizer: Any = None,
    device: Any = None,
    device_map: Any = None,
    dtype: Any = None,
    trust_remote_code: bool = False,
) -> Source:
    """Load or accept a model; nothing is fetched from the network.

    Raises:
        ModelError: missing folder or config, damaged weights, remote code, quantised weights, NaN.
        ArgumentError: not a model, a folder or an id.
    """
    if isinstance(model, nn.Module):
        if device is not None or dtype is not None or device_map is not None:
            raise ArgumentError(
                "device, device_map and dtype are for models that reattend loads",
                next_step="move or cast the module before the call",
            )
        check_weights(model)
        hashes = {"state_dict": _hash_state(model)}
        source = Source(model, tokenizer, type(model).__name__, None, False, hashes)
    elif isinstance(model, str | Path):
        loaded, found, folder, home = load_source(
            str(model), device=device, device_map=device_map, dtype=dtype,
            trust_remote_code=trust_remote_code, tokenizer=tokenizer,
        )  # fmt: skip
        check_weights(loaded)
        hashes = hash_files(folder) if folder else {"state_dict": _hash_state(loaded)}
        name = folder.name if folder else str(model)
        source = Source(loaded, found, name, folder, True, hashes, home)
    else:
        raise ArgumentError(
            f"not a model: {type(model).__name__}",
            next_step="pass a torch.nn.Module, a model folder, or a model id",
        )
    return source


def _hash_state(model: nn.Module) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(name.encode())
        data = tensor.detach().cpu().contiguous()
        data = data.clone() if is_shared(data) else data  # numpy's pointer would end the sharing
        total.update(str((data.dtype, tuple(data.shape))).encode())
        total.update(data.flatten().view(torch.uint8).numpy().tobytes())
    return "sha256:" + total.hexdigest()
