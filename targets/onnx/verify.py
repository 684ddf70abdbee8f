"""What an export must pass before it is published: onnx's own checker, and torch's logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from reattend.errors import GateError
from reattend.targets.onnx.layout import LayerLayout
from reattend.targets.onnx.manifest import CheckEntry
from reattend.targets.onnx.session import Session

LIMITS = {"float32": 1e-4, "float16": 3e-2}
# (batch, prompt, left padding of the first row, single steps)
SHAPES = ((2, 6, 2, 1), (1, 9, 0, 1))
# Tokens of a prompt beyond the longest ring of rows: it has turned, in pieces of 512 too.
_BEYOND = 515


def check_file(path: Path) -> None:
    """onnx.checker with shape inference.

    Raises:
        GateError: the file is not a valid model.
    """
    import onnx.checker
    import onnx.shape_inference

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise GateError(
            "the exported file does not pass onnx.checker", where=path.name, why=str(error)
        ) from error


def shapes(layers: list[LayerLayout], longest: int | None) -> list[tuple[int, int, int, int]]:
    """What to compare: short prompts, and one that does not fit into any state of bounded size.

    Args:
        layers: of the model.
        longest: tokens that the model has positions for; None: it says nothing.
    """
    rows = max(tensor.rows for layer in layers for tensor in layer.tensors)
    if not rows:
        return list(SHAPES)
    prompt = rows + min(rows, _BEYOND)
    if longest is not None:
        prompt = min(prompt, longest - 2)
    return [*SHAPES, (1, prompt, 3, 2)] if prompt > 9 else list(SHAPES)


def check_logits(
    open_session: Callable[[], Session],
    model: nn.Module,
    dtype: str,
    vocabulary: int,
    runtime: str = "onnxruntime",
    sizes: Sequence[tuple[int, int, int, int]] = SHAPES,
) -> list[CheckEntry]:
    """ONNX Runtime against torch without a cache: a padded prompt, then single steps.

    Args:
        open_session: opens the file in ONNX Runtime.
        model: the torch model in the export's dtype.
        dtype: the export's dtype; decides the limit.
        vocabulary: number of token ids to draw from.
        runtime: what the entries call the runtime.
        sizes: as `shapes` gives them.

    Raises:
        GateError: a difference is above the limit or not finite.
    """
    session, found = open_session(), []
    generator = torch.Generator().manual_seed(7)
    for batch, prompt, padding, steps in sizes:
        ids = torch.randint(0, vocabulary, (batch, prompt + steps), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        expected = torch_logits(model, ids, mask)
        got = [session.prefill(ids[:, :prompt].numpy(), mask[:, :prompt].numpy())]
        got += [session.step(ids[:, i : i + 1].numpy()) for i in range(prompt, prompt + steps)]
        error = difference(np.concatenate(got, 1), expected, mask)
        entry = CheckEntry(
            runtime=runtime, batch=batch, prefill=prompt, padding=padding, steps=steps,
            error=error, limit=LIMITS[dtype],
        )  # fmt: skip
        if not error <= entry.limit:
            raise GateError(
                "the exported model does not give torch's logits",
                where=f"batch {batch}, {prompt} tokens, {padding} padded, {steps} steps",
                why=f"relative difference {error:.3g}, limit {entry.limit:.3g}",
            )
        found.append(entry)
    return found


def torch_logits(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits [B, N, V] of whole sequences, padded on the left, without a cache."""
    position = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        result = model(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=False)
    logits: Tensor = result.logits
    return logits


def difference(got: np.ndarray, expected: Tensor, mask: Tensor) -> float:
    """Largest |difference| / max(1, largest |logit|) over real tokens."""
    real = mask.bool().numpy()
    wanted = expected.float().numpy()[real]
    return float(
        np.abs(got.astype(np.float32)[real] - wanted).max() / max(1.0, np.abs(wanted).max())
    )
