"""Two models on one set of weights, copy-on-write: whoever writes first gets a copy of its own.

torch's lazy clones (`torch._lazy_clone`, used by torch itself for `reshape`) are real
copy-on-write storage: reading leaves both tensors at one address; the first write through either
one, by an optimiser step, `copy_`, or a view, copies the bytes first. Asking for a pointer that
may be written through (`data_ptr()`, `numpy()`, safetensors' writer) counts as a write, so code
here asks `address` instead.

torch can share only memory its own allocator made. Tensors that safetensors read without a cast
lie in other memory; they are moved into torch's first, one at a time, where nobody else looks at
them, and copied where somebody does.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn

_C: Any = torch._C  # these three are missing from its stubs
#: Holders of a storage that one tensor alone has: itself, and the handle that asks.
_ALONE = 2


def address(tensor: Tensor) -> int:
    """Where the first element lies, asked for reading only (`data_ptr` would end the sharing)."""
    return int(_C._data_address(tensor))


def is_shared(tensor: Tensor) -> bool:
    """Whether the tensor lies in copy-on-write storage that it has not written to yet."""
    return bool(_C._is_cow_tensor(tensor))


def twins(tensors: Iterable[Tensor]) -> dict[int, Tensor]:
    """A copy-on-write twin of every tensor, by the tensor's id; aliases stay aliases.

    Args:
        tensors: the originals. Their values and identity do not change; one that lies in foreign
            memory and has no alias is moved into torch's own.
    """
    storages: dict[int, UntypedStorage] = {}
    held: list[UntypedStorage] = []  # a freed storage's number could be given out again
    found: dict[int, Tensor] = {}
    for tensor in tensors:
        if tensor.device.type == "meta":
            found[id(tensor)] = tensor.detach()
            continue
        if id(tensor) in found:
            continue
        if not _shareable(tensor):
            _adopt(tensor)
        plain = tensor.detach()
        storage = plain.untyped_storage()
        if storage._cdata not in storages:
            held.append(storage)
            storages[storage._cdata] = _lazy(plain).untyped_storage()
        found[id(tensor)] = torch.empty(0, dtype=plain.dtype, device=plain.device).set_(
            storages[storage._cdata], plain.storage_offset(), plain.size(), plain.stride()
        )
    return found


def replacements(module: nn.Module, *, plain: bool = False) -> dict[int, Tensor]:
    """By id, what takes the place of every parameter and buffer: a new object on a twin.

    Args:
        plain: share the storage itself: for an original that nobody else will ever see. Saving
            does not end this sharing.
    """
    tensors = [*module.parameters(), *module.buffers()]
    new = {id(t): t.detach() for t in tensors} if plain else twins(tensors)
    return {
        id(t): nn.Parameter(new[id(t)], t.requires_grad)
        if isinstance(t, nn.Parameter)
        else new[id(t)]
        for t in tensors
    }


def share_in_place(module: nn.Module) -> None:
    """Give a module twins of the tensors it holds; whoever holds the old ones keeps them."""
    new = replacements(module)
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in list(held.items()):
                if tensor is not None:
                    held[name] = new[id(tensor)]  # type: ignore[assignment]


def _shareable(tensor: Tensor) -> bool:
    try:
        torch._lazy_clone(tensor.detach())
    except RuntimeError:  # torch says no more than "Expected storage != nullptr"
        return False
    return True


def _adopt(tensor: Tensor) -> None:
    """Move a tensor without aliases into memory of torch's allocator."""
    alone = _C._storage_Use_Count(tensor.untyped_storage()._cdata) <= _ALONE
    if alone and not tensor.is_shared():
        tensor.data = tensor.detach().clone()


def _lazy(plain: Tensor) -> Tensor:
    """A tensor whose storage is a lazy clone of the whole storage; a real one where it must be."""
    try:
        return torch._lazy_clone(plain)
    except RuntimeError:
        copy = torch.empty(0, dtype=plain.dtype, device=plain.device)
        return copy.set_(plain.untyped_storage().clone(), 0, (0,), (1,))
