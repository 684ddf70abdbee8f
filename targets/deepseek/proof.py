"""Load what was written with the stock class and compare, before it is published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reattend.errors import GateError
from reattend.targets.deepseek.manifest import Check
from reattend.targets.onnx.verify import SHAPES, torch_logits

#: the map itself, run in at least float32
EXACT = 1e-4
#: how much larger than the change of one latent that of the logits may be
GROWTH = 4.0
#: what rounding the weights to a half type may do besides
ROUNDED = {torch.bfloat16: 0.2, torch.float16: 0.05}


def prove(
    folder: Path,
    model_class: Any,
    converted: nn.Module,
    exact: dict[str, Tensor],
    stored: torch.dtype,
    norm_error: float,
) -> list[Check]:
    """Compare the checkpoint in `folder` with the converted model, whole and token by token.

    Args:
        folder: the checkpoint.
        model_class: the stock class that loads it.
        converted: in evaluation mode and in the dtype to compare in.
        exact: the checkpoint's tensors before they were rounded to `stored`.
        stored: dtype of the files.
        norm_error: largest relative change of a latent by anchored norms.

    Raises:
        GateError: the class does not load it whole, or its logits are not the model's.
    """
    wide = next(converted.parameters()).dtype
    loaded, info = model_class.from_pretrained(
        folder, dtype=wide, output_loading_info=True, local_files_only=True
    )
    odd = {k: sorted(map(str, v)) for k, v in info.items() if v}
    if odd:
        raise GateError(
            f"{model_class.__name__} does not load the checkpoint as it is",
            where=str(folder), why="; ".join(f"{k}: {', '.join(v[:4])}" for k, v in odd.items()),
        )  # fmt: skip
    loaded = loaded.eval()
    exact_limit = EXACT + GROWTH * norm_error
    checks: list[Check] = []
    if stored != wide:
        limit = max(exact_limit, ROUNDED.get(stored, EXACT))
        checks += _compare(loaded, converted, "checkpoint", limit)
        loaded.load_state_dict(exact, strict=not loaded.config.tie_word_embeddings)
    return _compare(loaded, converted, "weights", exact_limit) + checks


def _compare(loaded: Any, converted: nn.Module, what: Any, limit: float) -> list[Check]:
    generator = torch.Generator().manual_seed(7)
    words, found = int(loaded.config.vocab_size), []
    for batch, prompt, padding, steps, _ in SHAPES:
        ids = torch.randint(0, words, (batch, prompt + steps), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        expected = torch_logits(converted, ids, mask)
        got = _stepwise(loaded, ids, mask, prompt)
        real = mask.bool()
        largest = max(1.0, float(expected[real].abs().max()))
        error = float((got - expected)[real].abs().max()) / largest
        check = Check(
            what=what, batch=batch, prefill=prompt, padding=padding, steps=steps, error=error,
            limit=limit,
        )  # fmt: skip
        if not error <= limit:
            raise GateError(
                f"{type(loaded).__name__} does not give the converted model's logits",
                where=f"batch {batch}, {prompt} tokens, {padding} padded, {steps} steps ({what})",
                why=f"difference {error:.3g}, limit {limit:.3g}",
                next_step="please report it, with the model's config.json",
            )
        found.append(check)
    return found


def _stepwise(model: Any, ids: Tensor, mask: Tensor, prompt: int) -> Tensor:
    """Logits [B, N, V] of a prompt and then of single tokens, with the class' own cache."""
    position = (mask.cumsum(-1) - 1).clamp_min(0)
    cache, logits = None, []
    with torch.no_grad():
        ends = [prompt, *range(prompt + 1, ids.shape[1] + 1)]
        for start, end in zip([0, *ends], ends, strict=False):
            result = model(
                input_ids=ids[:, start:end], attention_mask=mask[:, :end],
                position_ids=position[:, start:end], past_key_values=cache, use_cache=True,
            )  # fmt: skip
            cache = result.past_key_values
            logits.append(result.logits)
    return torch.cat(logits, 1)
