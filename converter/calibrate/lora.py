"""LoRA instead of full weights: peft injects low-rank factors into the linear layers that train.

Hu et al., arXiv 2106.09685. After training the factors are merged, so the published model has
ordinary weights.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from reattend.calibrate.working import Working
from reattend.errors import MissingExtraError


def inject(working: Working, rank: int) -> None:
    """Freeze the masters and train LoRA factors of every `nn.Linear` that trains.

    Norm gains, biases and other loose parameters stay as they are. Initial factors come from the
    global random state: seed it.

    Raises:
        MissingExtraError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as problem:
        raise MissingExtraError(
            "calibrate.lora_rank needs peft",
            next_step="pip install reattend[lora], or drop lora_rank to train full weights",
        ) from problem
    held = {id(p) for p in working.masters.values()}
    targets = [
        name
        for name, module in working.student.named_modules()
        if type(module) is nn.Linear and id(module.weight) in held
    ]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=targets)
    inject_adapter_in_model(config, working.student)
    working.student.eval()
    factors = {n: p for n, p in working.student.named_parameters() if "lora_" in n}
    for parameter in working.masters.values():
        parameter.requires_grad_(False)
    for parameter in factors.values():
        parameter.requires_grad_(True)
    working.masters.update(factors)


def merge(working: Working) -> None:
    """Add the trained factors to the masters (in place)."""
    for module in list(working.student.modules()):
        layer: Any = module
        if hasattr(layer, "merge") and hasattr(layer, "base_layer"):
            layer.merge(safe_merge=True)
