"""Parity: the converted model against the original where it must be equal, and against itself.

Tolerances are not invented: a cached run is compared with an uncached one, and allowed ten times
the gap the *original* shows between the same two runs in the same dtype.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reattend.at_once import spans, without_logits
from reattend.capture import Call, watch
from reattend.host import device_of
from reattend.inputs import without_cache
from reattend.install.adapter import Adapter
from reattend.install.binding import shared_tensors
from reattend.report.evidence import ParityCheck
from reattend.running import evaluation

#: fp32 logits of an exact conversion, on real positions (design: identity).
EXACT_LOGITS = 1e-4


def compare(got: Tensor, expected: Tensor) -> dict[str, Any]:
    """max_abs, relative, cosine and top-1 agreement of two tensors [..., V], in float64."""
    got_RV, expected_RV = got.flatten(0, -2), expected.flatten(0, -2)
    worst, same = torch.zeros((), dtype=torch.float64), 0
    sums = torch.zeros(4, dtype=torch.float64)  # of gap^2, a^2, b^2 and a b
    for part in spans(*got_RV.shape):  # float64 copies of few rows where the vocabulary is large
        a, b = got_RV[part].double().cpu(), expected_RV[part].double().cpu()
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
        sums[1:] += torch.stack([(x * y).sum() for x, y in ((a, a), (b, b), (a, b))])
        gap = a - b
        worst = torch.maximum(worst, gap.abs().max())
        sums[0] += gap.square_().sum()
    apart, size, reference = (float(x) for x in sums[:3].sqrt())
    return {
        "shape": tuple(got.shape),
        "max_abs": float(worst),
        "relative": apart / max(reference, 1e-30),
        "cosine": float(sums[3]) / max(size * reference, 1e-16),
        "top1": same / max(1, len(got_RV)),
    }


def block_errors(
    original: nn.Module, converted: nn.Module, paths: list[str], inputs: dict[str, Any]
) -> dict[str, float]:
    """Relative error of each converted block on the original's own activations.

    Norm of the difference of the block's output over the norm of the original's, on real tokens.
    """
    calls = watch(original, set(paths), without_cache(original, inputs))
    real = real_positions(inputs)
    errors = {}
    with evaluation(converted), torch.no_grad():
        for path in paths:
            call: Call = calls[path]
            result = converted.get_submodule(path)(*call.args, **call.kwargs)
            y, expected = next(shared_tensors(result, call.output))
            if real is not None and y.shape[:2] == real.shape:
                y, expected = y[real], expected[real]
            gap = (y.double() - expected.double()).norm()
            errors[path] = float(gap / expected.double().norm().clamp_min(1e-30))
    return errors


def real_positions(inputs: dict[str, Any]) -> Tensor | None:
    """[B, N] bool from a 2-D attention mask; None where every position counts."""
    mask = inputs.get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def exact_check(original: nn.Module, converted: nn.Module, inputs: dict[str, Any]) -> ParityCheck:
    """Logits of an exact conversion equal the original's, on real positions."""
    with evaluation(original), evaluation(converted), torch.no_grad():
        inputs = without_cache(original, inputs)
        expected, got = _first(original(**inputs)), _first(converted(**inputs))
    real = _real_positions(inputs, expected)
    numbers = compare(got[real], expected[real])
    floor = float(torch.finfo(expected.dtype).eps) * float(expected.abs().max())
    limit = max(EXACT_LOGITS, 8 * floor) if expected.dtype != torch.float64 else 1e-9
    good = numbers["max_abs"] <= limit
    return ParityCheck(
        name="equals the original", compared="output, converted / original, prefill",
        verdict="pass" if good else "fail", tolerance=limit, judged_by="max_abs",
        noise_floor=floor, **numbers,
    )  # fmt: skip


def _real_positions(inputs: dict[str, Any], output: Tensor) -> Tensor:
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape == output.shape[:2]:
        return mask.bool()
    return torch.ones(output.shape[:1], dtype=torch.bool)


def _first(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    values = output.values() if hasattr(output, "values") else output
    return next(v for v in values if isinstance(v, Tensor))


def decode_checks(
    original: nn.Module | None,
    converted: nn.Module,
    seed: int = 0,
    floors: Mapping[str, float] | None = None,
) -> list[ParityCheck]:
    """Prefill and cached decode agree: batch 1 and a left-padded batch of 3, at two lengths.

    Args:
        original: its own gap is the noise floor; None takes `floors`.
        converted: the model judged.
        seed: of the token ids.
        floors: by check name, what the original showed when it was measured; checks that are
            not in it were not made.

    Returns:
        Nothing for models that do not generate, whose converted layers refuse a cache, or whose
        results depend on how a text is cut into calls (`by_call`).
    """
    if not _generates(converted) or _needs_the_whole(converted) or by_call(converted):
        return []
    vocabulary = int(converted.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]
    generator = torch.Generator().manual_seed(seed)
    checks = []
    for batch, length, pad in ((1, 37, 0), (3, 53, 6)):
        ids = torch.randint(
            min(8, vocabulary - 1), vocabulary, (batch, length), generator=generator
        )
        mask = torch.ones_like(ids)
        for row in range(batch):
            mask[row, : pad * row // max(1, batch - 1)] = 0
        name = f"cached decode, batch {batch}" + (", left padding" if pad else "")
        floor = (floors or {}).get(name) if original is None else _own_gap(original, ids, mask)
        if floor is None:  # the original has no cached decoding to be equal to
            continue
        got, gap, expected = _cache_gap(converted, ids, mask, keep=True)
        size = float(expected.abs().max())
        eps = float(torch.finfo(expected.dtype).eps)
        limit = max(10 * floor, 64 * eps * size)
        numbers = compare(got, expected)
        checks.append(
            ParityCheck(
                name=name,
                compared="logits of the last 8 tokens, step by step / in one pass",
                verdict="pass" if gap <= limit else "fail",
                tolerance=limit, judged_by="max_abs", noise_floor=floor, **numbers,
            )
        )  # fmt: skip
    return checks


def _generates(model: nn.Module) -> bool:
    can = getattr(model, "can_generate", None)
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if can is None or not can() or encoder_decoder:
        return False
    return "past_key_values" in inspect.signature(model.forward).parameters


def _needs_the_whole(model: nn.Module) -> bool:
    """Whether a converted layer refuses to continue from a cache."""
    return any(not m.binding.stepwise for m in model.modules() if isinstance(m, Adapter))


def by_call(model: nn.Module) -> str:
    """What makes results depend on how a text is cut into calls, by design; "": nothing."""
    found = [m.mixer.depends_on_calls for m in model.modules() if isinstance(m, Adapter)]
    return ", ".join(dict.fromkeys(word for word in found if word))


def decodes_apart(model: nn.Module) -> bool:
    """Whether decoding reads fewer keys, by design, than one pass over the same text."""
    return any(m.mixer.decodes_apart for m in model.modules() if isinstance(m, Adapter))


def _own_gap(model: nn.Module, ids: Tensor, mask: Tensor) -> float | None:
    """The original's gap; None where its own cached decoding fails (an encoder with a head)."""
    try:
        return float(_cache_gap(model, ids, mask)[1])
    except (RuntimeError, ValueError, IndexError, AttributeError):
        return None


def _cache_gap(
    model: nn.Module, ids: Tensor, mask: Tensor, steps: int = 8, keep: bool = False
) -> Any:
    """Logits of the last tokens through the cache and in one pass, and their largest gap."""
    device = device_of(model)
    ids, mask = ids.to(device), mask.to(device)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    named = inspect.signature(model.forward).parameters
    place = "position_ids" in named

    def where(start: int, end: int) -> dict[str, Tensor]:
        return {"position_ids": positions[:, start:end]} if place else {}

    start = ids.shape[1] - steps
    with evaluation(model), torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask, use_cache=False, **where(0, ids.shape[1]))
        expected = whole.logits[:, start:].clone()  # a view would keep all of them
        del whole
        out = model(
            input_ids=ids[:, :start],
            attention_mask=mask[:, :start],
            use_cache=True,
            **where(0, start),
            **without_logits(model),
        )
        rows = []
        for i in range(start, ids.shape[1]):
            out = model(
                input_ids=ids[:, i : i + 1], attention_mask=mask[:, : i + 1], use_cache=True,
                past_key_values=out.past_key_values, **where(i, i + 1),
            )  # fmt: skip
            rows.append(out.logits)
    got = torch.cat(rows, 1)
    gap = float((got - expected).abs().max())
    return (got, gap, expected) if keep else (None, gap)
