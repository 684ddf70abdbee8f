"""What a user would do instead of converting: a sliding window, or a quantised KV cache.

A yardstick is the *original* model asked in another way, with its cache bytes per token, so that a
converted model can be read beside it at equal bytes. Three remarks on fairness:

- The window is plain (no attention sinks): query i sees keys i - w + 1 to i in every layer, and
  information may still travel w tokens per layer. Its w tokens are a share of the *whole* context,
  so the first w positions of a row lose nothing: average perplexity flatters it, recall does not.
- The quantised cache is filled in chunks of `residual` tokens that are quantised when they are
  complete, so a token is read in full precision only within its own chunk. transformers' default
  residual is 128, which at short contexts would leave half of the row unquantised.
- Bytes count elements of the original cache at `element_bytes` (2: bf16 or fp16 serving), and
  codes, scales and zero points of the quantised one, plus the residual at its largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reattend.data import Dataset
from reattend.errors import ArgumentError
from reattend.mixers.base import Mixer
from reattend.verify.kv_quant import GROUP, new_quantised_cache
from reattend.verify.quality import Quality, measure, perplexity, recall
from reattend.verify.recall import RecallScore
from reattend.verify.scoring import (
    Scorer,
    cached_scorer,
    evaluating,
    full_scorer,
    logits_of,
    padding_arguments,
)

RESIDUAL = 16


@dataclass(frozen=True)
class Yardstick:
    """The original, asked in another way.

    Attributes:
        name: stable text for tables, e.g. `sliding window 25 %`.
        context: tokens for which the bytes hold.
        cache_bytes_per_token: cache of all layers after `context` tokens, divided by `context`.
        share: those bytes over the original's.
        scorer: how logits are asked.
        model: the original.
    """

    name: str
    context: int
    cache_bytes_per_token: float
    share: float
    scorer: Scorer
    model: nn.Module

    def perplexity(self, dataset: Dataset, *, batch_size: int = 8) -> float:
        """Perplexity on rows of at most `context` tokens."""
        return perplexity(self.model, dataset, scorer=self.scorer, batch_size=batch_size)

    def recall(
        self, dataset: Dataset, *, seed: int = 0, batch_size: int = 8
    ) -> dict[str, RecallScore]:
        """The recall probes."""
        return recall(self.model, dataset, scorer=self.scorer, seed=seed, batch_size=batch_size)

    def measure(
        self, dataset: Dataset, *, teacher: nn.Module | None = None, **options: Any
    ) -> Quality:
        """As `reattend.verify.quality.measure`."""
        return measure(self.model, dataset, teacher, scorer=self.scorer, **options)


def cache_elements_per_token(model: nn.Module, *, tokens: int = 16) -> float:
    """Numbers that the model's own cache holds per token, all layers, counted on a real forward.

    Args:
        model: any with a transformers cache.
        tokens: how many are read; it matters where a layer keeps some of them only.

    Raises:
        ArgumentError: the model returns no cache of known form.
    """
    device = next(model.parameters()).device
    with evaluating(model):
        ids_BN = torch.arange(1, tokens + 1, device=device)[None] % 16 + 1
        cache = model(ids_BN[:, :-1], use_cache=True).past_key_values
        if getattr(cache, "layers", None):  # what a call of several tokens keeps beside, is gone
            cache = model(ids_BN[:, -1:], past_key_values=cache, use_cache=True).past_key_values
    layers = getattr(cache, "layers", None)
    if not layers:
        raise ArgumentError("The model returns no KV cache.", where=type(model).__name__)
    held = sum(
        value.numel()
        for layer in layers
        for value in getattr(layer, "rows", (layer.keys, layer.values))
        if isinstance(value, Tensor)
    )
    return held / tokens


def original(model: nn.Module, *, context: int, element_bytes: int = 2) -> Yardstick:
    """The model as it is: the row that all others are compared with."""
    keeps = any(isinstance(m, Mixer) and m.keeps for m in model.modules())
    held = cache_elements_per_token(model, tokens=context if keeps else 16) * element_bytes
    return Yardstick("original", context, held, 1.0, full_scorer(model), model)


def sliding_window(
    model: nn.Module, *, keep: float, context: int, element_bytes: int = 2
) -> Yardstick:
    """The original whose every layer sees the last `round(keep * context)` tokens only.

    Evaluated with a 4-D boolean mask (True: may attend).

    Raises:
        ArgumentError: keep out of (0, 1], or a model whose own window is already smaller.
    """
    if not 0 < keep <= 1:
        raise ArgumentError("keep must be above 0 and at most 1.", why=f"got {keep}")
    window = max(1, round(keep * context))
    own = getattr(getattr(model, "config", None), "sliding_window", None)
    if own is not None and window > own:
        raise ArgumentError(
            "The yardstick's window would widen the model's own.",
            why=f"window {window} > sliding_window {own}",
        )
    held = cache_elements_per_token(model) * element_bytes

    def score(ids_BN: Tensor, mask_BN: Tensor) -> Tensor:
        extra = padding_arguments(model, mask_BN)
        device = next(model.parameters()).device
        allowed = window_mask(mask_BN.to(device), window)
        extra.update(attention_mask=allowed, use_cache=False)
        with evaluating(model):
            return logits_of(model(ids_BN.to(device), **extra))

    name = f"sliding window {100 * keep:g} %"
    share = window / context
    return Yardstick(name, context, held * share, share, score, model)


def window_mask(mask_BN: Tensor, window: int) -> Tensor:
    """`(B, 1, N, N)` boolean: query i may see real keys i - window + 1 .. i, and always itself."""
    length = mask_BN.shape[1]
    position = torch.arange(length, device=mask_BN.device)
    back_NN = position[:, None] - position[None, :]
    near_NN = (back_NN >= 0) & (back_NN < window)
    return (near_NN & mask_BN.bool()[:, None, None, :]) | (back_NN == 0)


def quantised_cache(
    model: nn.Module,
    *,
    bits: int,
    context: int,
    residual: int = RESIDUAL,
    backend: str = "minmax",
    element_bytes: int = 2,
) -> Yardstick:
    """The original with its KV cache in `bits` bits; see `reattend.verify.kv_quant`.

    Raises:
        ArgumentError, MissingExtraError: as `new_quantised_cache`.
    """
    new_cache = new_quantised_cache(model.config, bits=bits, residual=residual, backend=backend)
    elements = cache_elements_per_token(model)
    packed = bits / 8 + 2 * 2 / GROUP  # code, and a 2-byte scale and zero point per group
    loose = min(residual - 1, context)
    held = elements * (packed * (context - loose) + element_bytes * loose) / context
    name = f"int{bits} KV cache" + ("" if backend == "minmax" else f" ({backend})")
    scorer = cached_scorer(model, chunk=residual, new_cache=new_cache)
    return Yardstick(name, context, held, held / (elements * element_bytes), scorer, model)


def yardsticks(
    model: nn.Module,
    *,
    context: int,
    keeps: Sequence[float] = (0.5, 0.25, 0.125),
    bits: Sequence[int] = (8, 4, 2),
    backend: str = "minmax",
) -> list[Yardstick]:
    """The original, its windows, and its quantised caches.

    With groups of 64, int8, int4 and int2 need 53, 28 and 16 % of a 2-byte cache, plus the
    residual: the nearest such caches to 50, 25 and 12.5 %, each a little above.
    """
    rows = [original(model, context=context)]
    rows += [sliding_window(model, keep=keep, context=context) for keep in keeps]
    rows += [quantised_cache(model, bits=b, context=context, backend=backend) for b in bits]
    return rows
