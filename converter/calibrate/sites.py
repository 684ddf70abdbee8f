"""Where teacher and student are compared: sites, blocks, inputs and validity of their tokens."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from reattend.errors import ArgumentError
from reattend.install.adapter import Adapter
from reattend.install.pieces import block_output
from reattend.install.stored import local_path


def adapters(student: nn.Module, teacher: nn.Module) -> dict[str, Adapter]:
    """Converted blocks by path, each with a counterpart of the same path in the teacher.

    Raises:
        ArgumentError: the teacher has no module of that path.
    """
    found = {p: m for p, m in student.named_modules() if isinstance(m, Adapter)}
    known = {p for p, _ in teacher.named_modules()}
    missing = sorted(p for p in found if p not in known)
    if missing:
        raise ArgumentError(
            "teacher and student do not belong together",
            where=missing[0],
            why="the teacher has no module of this path",
            next_step="pass the model that was converted as the teacher",
        )
    return found


def projection_of(model: nn.Module, adapter: Adapter) -> str | None:
    """Path of a block's output projection where another module owns it, else None."""
    path = adapter.binding.projection
    return local_path(model, path, getattr(model, "base_model_prefix", "")) if path else None


def block_paths(student: nn.Module) -> list[str]:
    """The repeated blocks around the converted sites: all items of the outermost ModuleList.

    A site in no ModuleList stands for itself.
    """
    paths: dict[str, None] = {}
    for path, module in student.named_modules():
        if not isinstance(module, Adapter):
            continue
        parts = path.split(".")
        for i in range(1, len(parts) + 1):
            parent = ".".join(parts[: i - 1])
            holder = student.get_submodule(parent) if parent else student
            if isinstance(holder, nn.ModuleList):
                paths.update(
                    {f"{parent}.{k}" if parent else str(k): None for k in range(len(holder))}
                )
                break
        else:
            paths[path] = None
    return list(paths)


def attention_output(shape: Any, value: Any) -> Tensor | None:
    """The block's output inside a module's result, whose form is `Binding.output`."""
    if block_output(shape):
        return value if isinstance(value, Tensor) else None
    if not isinstance(shape, dict) or "path" in shape:
        return None
    items = next(iter(shape.values()))
    for item, part in zip(items, value, strict=False):
        found = attention_output(item, part)
        if found is not None:
            return found
    return None


def first_tensor(value: Any) -> Tensor | None:
    """The hidden states of a block's result: itself, or its first element."""
    if isinstance(value, tuple | list) and value:
        value = value[0]
    return value if isinstance(value, Tensor) and value.is_floating_point() else None


def logits(output: Any) -> Tensor | None:
    """Logits [B, N, V] or [B, V] of a model's output; None for models without a head."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple):
        return first_tensor(output)
    found = getattr(output, "logits", None)
    return found if isinstance(found, Tensor) else None


def accepts(model: nn.Module, name: str) -> bool:
    """Whether forward takes the argument, by name or through **kwargs."""
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _names(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def _left_padded(mask: Tensor) -> bool:
    return mask.dim() == 2 and not bool(mask[:, 0].bool().all())


def call_arguments(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Keyword arguments of one forward pass: on the model's device, without a cache.

    Raises:
        ArgumentError: there is padding and the model takes no mask.
    """
    device = next(model.parameters()).device
    arguments: dict[str, Any] = {name: t.to(device) for name, t in inputs.items()}
    mask = arguments.get("attention_mask")
    if mask is not None and not accepts(model, "attention_mask"):
        if not bool(mask.bool().all()):
            raise ArgumentError(
                "the data has padding and the model takes no attention_mask",
                where=type(model).__name__,
                next_step="pass full rows",
            )
        del arguments["attention_mask"]
    elif mask is not None and _left_padded(mask) and _names(model, "position_ids"):
        # positions count real tokens, as `generate` counts them
        arguments.setdefault("position_ids", (mask.long().cumsum(-1) - 1).clamp(min=0))
    if accepts(model, "use_cache"):
        arguments["use_cache"] = False
    return arguments


def real_tokens(
    arguments: dict[str, Any], like_BND: Tensor, decoder: bool = False
) -> Tensor | None:
    """Which tokens of `like_BND` are real, [B, N] bool; None where every one counts."""
    mask = arguments.get("decoder_attention_mask" if decoder else "attention_mask")
    if not isinstance(mask, Tensor) or tuple(mask.shape) != tuple(like_BND.shape[:2]):
        return None
    return mask.bool()


def decoder_prefix(model: nn.Module) -> str | None:
    """Path of the decoder of an encoder-decoder model; its tokens have their own mask."""
    whole: Any = model
    if not getattr(getattr(whole, "config", None), "is_encoder_decoder", False):
        return None
    decoder = whole.get_decoder() if hasattr(whole, "get_decoder") else None
    return next((p for p, m in model.named_modules() if m is decoder), None)


def is_below(path: str, prefix: str | None) -> bool:
    """Whether a module path lies in the tree of `prefix`."""
    return prefix is not None and (path == prefix or path.startswith(f"{prefix}."))


@contextmanager
def hooked(handles: list[Any]) -> Iterator[None]:
    """Remove the hooks afterwards, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
