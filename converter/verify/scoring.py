"""How a causal model is asked for logits: in one go, or token by token through its cache.

A *scorer* maps `(input_ids_BN, attention_mask_BN)` to `logits_BNV`. Every measurement of
`reattend.verify` takes one, so perplexity, recall and agreement are the same code for a plain
model, a sliding window and a quantised cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from reattend.at_once import spans
from reattend.errors import ArgumentError, GateError

Scorer = Callable[[Tensor, Tensor], Tensor]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's training flag is put back."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in flags.items():
            module.training = training


def full_scorer(model: nn.Module, tokens: slice | None = None) -> Scorer:
    """Logits of whole rows in one forward pass, without a cache.

    Args:
        model: causal LM.
        tokens: form no logits but these tokens'; for models that take `logits_to_keep`.
    """

    def score(ids_BN: Tensor, mask_BN: Tensor) -> Tensor:
        extra = padding_arguments(model, mask_BN)
        if _accepts(model, "use_cache"):
            extra["use_cache"] = False
        if tokens is not None:
            extra["logits_to_keep"] = _to(model, torch.arange(tokens.start, tokens.stop))
        with evaluating(model):
            return logits_of(model(_to(model, ids_BN), **extra))

    return score


def cached_scorer(
    model: nn.Module, *, chunk: int = 16, new_cache: Callable[[], Any] | None = None
) -> Scorer:
    """Logits of rows fed `chunk` tokens at a time through the KV cache.

    Args:
        model: one that takes `past_key_values` and returns it.
        chunk: new tokens per call; 1 is decoding.
        new_cache: makes the cache of each batch; None lets the model make its own.

    Raises:
        ArgumentError: (at the call) the model takes no cache.
    """
    if chunk < 1:
        raise ArgumentError("chunk must be at least 1.", why=f"got {chunk}")
    if not _accepts(model, "past_key_values"):
        raise ArgumentError("The model takes no KV cache.", where=type(model).__name__)

    def score(ids_BN: Tensor, mask_BN: Tensor) -> Tensor:
        ids_BN = _to(model, ids_BN)
        extra = padding_arguments(model, mask_BN)
        mask = extra.pop("attention_mask", None)
        position = extra.pop("position_ids", None)
        cache = new_cache() if new_cache is not None else None
        parts: list[Tensor] = []
        with evaluating(model):
            for start in range(0, ids_BN.shape[1], chunk):
                stop = min(start + chunk, ids_BN.shape[1])
                step = {} if mask is None else {"attention_mask": mask[:, :stop]}
                if position is not None:
                    step["position_ids"] = position[:, start:stop]
                out = model(ids_BN[:, start:stop], past_key_values=cache, use_cache=True, **step)
                cache = out.past_key_values
                parts.append(logits_of(out))
            return torch.cat(parts, dim=1)

    return score


def padding_arguments(model: nn.Module, mask_BN: Tensor) -> dict[str, Any]:
    """Mask and positions to pass; nothing when no token is padding.

    Positions count real tokens, as `generate` does, so left padding shifts nothing.

    Raises:
        ArgumentError: there is padding and the model takes no mask.
    """
    if bool(mask_BN.all()):
        return {}
    if not _accepts(model, "attention_mask"):
        raise ArgumentError(
            "The data has padding and the model takes no attention_mask.",
            where=type(model).__name__,
            next_step="pass full rows.",
        )
    mask_BN = _to(model, mask_BN)
    arguments: dict[str, Any] = {"attention_mask": mask_BN}
    if _accepts(model, "position_ids"):
        arguments["position_ids"] = (mask_BN.long().cumsum(-1) - 1).clamp(min=0)
    return arguments


def logits_of(output: Any) -> Tensor:
    """`logits_BNV` of a model output: its `.logits`, itself, or its first element.

    Raises:
        ArgumentError: no (B, N, V) tensor there.
    """
    logits = getattr(output, "logits", output[0] if isinstance(output, tuple) else output)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise ArgumentError(
            "The model returns no logits of shape (batch, tokens, vocabulary).",
            why=f"got {type(logits).__name__}",
            next_step="measure a causal language model.",
        )
    return logits


def token_nll(logits_BNV: Tensor, ids_BN: Tensor, mask_BN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and correctness of each predicted token, log-softmax in fp32, row by row.

    Returns:
        `nll_BM` in nats (M = N - 1, position i predicts token i + 1), `right_BM` (argmax equals
        the token), `real_BM` (predicting and predicted token are both real).

    Raises:
        GateError: a logit at a real position is not a number.
    """
    ids_BN, mask_BN = ids_BN.to(logits_BNV.device), mask_BN.to(logits_BNV.device).bool()
    real_BM = mask_BN[:, :-1] & mask_BN[:, 1:]
    nll, right = [], []
    for logits_NV, ids_N in zip(logits_BNV, ids_BN, strict=True):
        wanted_M, parts = ids_N[1:], list(spans(len(ids_N) - 1, logits_NV.shape[-1]))
        losses, hits = [], []
        for part in parts:
            logits_RV = logits_NV[part].float()
            losses.append(cross_entropy(logits_RV, wanted_M[part], reduction="none"))
            hits.append(logits_RV.argmax(-1) == wanted_M[part])
        nll.append(torch.cat(losses))
        right.append(torch.cat(hits))
    nll_BM = torch.stack(nll)
    if bool(nll_BM[real_BM].isnan().any()):
        raise GateError("The model's logits are not numbers.", why="NaN in the loss")
    return nll_BM, torch.stack(right), real_BM


def _accepts(model: nn.Module, name: str) -> bool:
    """Whether forward takes the argument, by name or through **kwargs."""
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _to(model: nn.Module, tensor: Tensor) -> Tensor:
    parameter = next(model.parameters(), None)
    return tensor if parameter is None else tensor.to(parameter.device)
