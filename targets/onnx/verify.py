"""What an export must pass before it is published: onnx's own checker, and torch's logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from reattend.errors import GateError
from reattend.install.adapter import Adapter
from reattend.targets.onnx.dense_body import DENSE_TILE, INPUTS
from reattend.targets.onnx.layout import LayerLayout, StateTensor
from reattend.targets.onnx.manifest import CheckEntry
from reattend.targets.onnx.routed_body import FEW
from reattend.targets.onnx.routed_body import NAME as ROUTED
from reattend.targets.onnx.session import Session

LIMITS = {"float32": 1e-4, "float16": 3e-2}


class Size(NamedTuple):
    """Rows, prompt length, left padding of the first row, single steps; and `CheckEntry.share`."""

    batch: int
    prompt: int
    padding: int
    steps: int
    share: float = 1.0


SHAPES = (Size(2, 6, 2, 1), Size(1, 9, 0, 1))
# Queries enough that those of every head are gathered, or that they are cut into tiles.
GATHERED = Size(2, 2 * FEW + 3, 5, 1)
TILED = Size(1, DENSE_TILE + 5, 3, 1)
# Tokens of a prompt from which on it is more than the short ones that all exports pass.
_LONGER = 10
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


def shapes(layers: list[LayerLayout], longest: int | None) -> list[Size]:
    """What to compare: short prompts, longer ones where nodes take those another way, and one that
    does not fit into any state of bounded size, or from which heads choose.

    Args:
        layers: of the model.
        longest: tokens that the model has positions for; None: it says nothing.
    """
    rows = max(_held_whole(tensor) for layer in layers for tensor in layer.tensors)
    chosen = max(_chosen_from(layer) for layer in layers)
    ops = {group.op for layer in layers for group in layer.groups}
    long = [GATHERED] if ROUTED in ops else []
    long += [TILED] if ops & INPUTS.keys() else []
    if rows or chosen:
        prompt = max(rows + min(rows, _BEYOND), chosen)
        long.append(Size(1, prompt, 3, 2, 0.5 if chosen else 1.0))
    if longest is not None:
        long = [size._replace(prompt=min(size.prompt, longest - size.steps)) for size in long]
    return [*SHAPES, *(size for size in long if size.prompt >= _LONGER)]


def _held_whole(tensor: StateTensor) -> int:
    """Tokens from which on a state does not hold every one; 0 if it always does."""
    if tensor.rows == 0 or tensor.growing >= tensor.block:
        return tensor.rows if not tensor.growing else 0
    return -(-tensor.rows * tensor.block // (tensor.block - tensor.growing))


def _chosen_from(layer: LayerLayout) -> int:
    return max(group.sparse.tokens if group.sparse else 0 for group in layer.groups)


def check_logits(
    open_session: Callable[[], Session],
    model: nn.Module,
    dtype: str,
    vocabulary: int,
    runtime: str = "onnxruntime",
    sizes: Sequence[Size] = SHAPES,
) -> list[CheckEntry]:
    """ONNX Runtime against torch without a cache: a padded prompt, then single steps.

    Where results depend on how a text is cut into calls, torch is called as the session is, with a
    cache. Of texts long enough to choose keys from, half of the tokens count (`CheckEntry.share`).

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
    mixers = [m.mixer for m in model.modules() if isinstance(m, Adapter)]
    by_calls = any(mixer.depends_on_calls for mixer in mixers)
    for batch, prompt, padding, steps, share in sizes:
        ids = torch.randint(0, vocabulary, (batch, prompt + steps), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        if by_calls:
            pieces = [*range(0, prompt, session.prefill_chunk), *range(prompt, prompt + steps)]
            expected = torch_calls(model, ids, mask, pieces)
        else:
            expected = torch_logits(model, ids, mask)
        got = [session.prefill(ids[:, :prompt].numpy(), mask[:, :prompt].numpy())]
        got += [session.step(ids[:, i : i + 1].numpy()) for i in range(prompt, prompt + steps)]
        error = difference(np.concatenate(got, 1), expected, mask, share)
        entry = CheckEntry(
            runtime=runtime, batch=batch, prefill=prompt, padding=padding, steps=steps,
            error=error, limit=LIMITS[dtype], share=share,
        )  # fmt: skip
        where = f"batch {batch}, {prompt} tokens, {padding} padded, {steps} steps"
        found.append(passed(entry, "logits", where))
    return found


def passed(entry: CheckEntry, what: str, where: str) -> CheckEntry:
    """The entry, if its error is within its limit.

    Raises:
        GateError: it is above, or not finite.
    """
    if entry.error <= entry.limit:
        return entry
    raise GateError(
        f"the exported model does not give torch's {what}",
        where=where,
        why=f"relative difference {entry.error:.3g}, limit {entry.limit:.3g}",
    )


def torch_logits(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits [B, N, V] of whole sequences, padded on the left, without a cache."""
    position = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        result = model(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=False)
    logits: Tensor = result.logits
    return logits


def torch_calls(model: nn.Module, ids: Tensor, mask: Tensor, begins: list[int]) -> Tensor:
    """The same with a cache, in calls that begin at these tokens."""
    position = (mask.cumsum(-1) - 1).clamp_min(0)
    cache, found = None, []
    with torch.no_grad():
        for begin, end in zip(begins, [*begins[1:], ids.shape[1]], strict=True):
            result = model(
                input_ids=ids[:, begin:end], attention_mask=mask[:, :end],
                position_ids=position[:, begin:end], past_key_values=cache, use_cache=True,
            )  # fmt: skip
            cache = result.past_key_values
            found.append(result.logits)
    return torch.cat(found, 1)


def difference(got: np.ndarray, expected: Tensor, mask: Tensor, share: float = 1.0) -> float:
    """|difference| / max(1, largest |logit|), the largest over real tokens or a share of them."""
    real = mask.bool().numpy()
    wanted = expected.float().numpy()[real]
    by_token = np.sort(np.abs(got.astype(np.float32)[real] - wanted).max(-1))
    worst = by_token[max(0, ceil(share * len(by_token)) - 1)]  # one that is no number stands last
    return float(worst / max(1.0, np.abs(wanted).max()))
