"""What the weights of a model must be before anything is done with them."""

from __future__ import annotations

import math

from torch import Tensor, nn

from reattend.errors import ModelError

_QUANTISERS = ("torchao", "bitsandbytes", "optimum", "compressed_tensors")


def check_weights(model: nn.Module) -> None:
    """Refuse what cannot be converted: quantised, packed, sharded or offloaded weights, and NaN.

    Raises:
        ModelError: naming the first offending tensor.
    """
    _check_storage(model)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        # no copy, as `isfinite` makes; NaN is both
        low, high = (float(x) for x in tensor.detach().aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            kind = "NaN" if math.isnan(low) else "infinity"
            if kind == "NaN" or not name.split(".")[-1].startswith("bias"):
                raise ModelError(
                    f"a weight holds {kind}",
                    where=name,
                    next_step="fix or re-download the checkpoint",
                )


def _check_storage(model: nn.Module) -> None:
    """Refuse weights that are not plain tensors in this process' memory.

    Raises:
        ModelError: quantised, packed, sharded or offloaded weights; names the first of them.
    """
    config = getattr(model, "config", None)
    if getattr(config, "quantization_config", None) or getattr(model, "is_quantized", False):
        raise _quantised("the model")
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):  # torch.ao packs weights with their scales
            raise _quantised(name)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        package = type(tensor).__module__.partition(".")[0]
        if tensor.is_quantized or package in _QUANTISERS:
            raise _quantised(name)
        if tensor.device.type == "meta":
            raise ModelError(
                "a weight is not in memory (offloaded or never loaded)",
                where=name,
                next_step="load the model fully: device_map='cpu' or one device",
            )
        if type(tensor).__module__.startswith("torch.distributed"):
            raise ModelError(
                "a weight is sharded over processes",
                where=name,
                next_step="load the model unsharded for the conversion",
            )


def _quantised(where: str) -> ModelError:
    return ModelError(
        "the model's weights are quantised",
        where=where,
        why="statistics and decompositions need the full-precision matrices",
        next_step="convert the unquantised model, then quantise the result",
    )
