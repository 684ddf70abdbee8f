"""How much of a model's output is formed at once: logits of a large vocabulary outweigh its layers.

Layout letters: V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

#: Bytes of logits formed at once where a model's vocabulary allows it (one row at least), and of
#: the float32 copies that losses take from them.
LOGITS_BYTES, COPY_BYTES = 16 << 20, 4 << 20


def vocabulary_of(model: nn.Module) -> int:
    """V of a language model; 0 for other models."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    return int(getattr(text, "vocab_size", 0) or 0)


def rows_within(row_bytes: int, most: int) -> int:
    """Rows of that many bytes of logits each that are formed at once, 1 to `most`."""
    return max(1, min(most, LOGITS_BYTES // max(1, row_bytes)))


def rows_at_once(model: nn.Module, length: int, most: int) -> int:
    """Rows of `length` tokens whose logits are formed at once, 1 to `most`."""
    size = next(model.parameters()).element_size()
    return rows_within(length * vocabulary_of(model) * size, most)


def tokens_at_once(vocabulary: int) -> int:
    """Tokens whose logits are copied to float32 at once, 1 or more."""
    return max(1, COPY_BYTES // (4 * max(1, vocabulary)))


def spans(tokens: int, vocabulary: int) -> Iterator[slice]:
    """The tokens of one row, as many at a time as `tokens_at_once`."""
    step = tokens_at_once(vocabulary)
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))


def stretches(model: nn.Module, tokens: int) -> list[slice]:
    """The tokens of a row whose logits are formed at once; one slice where a row is small enough.

    A model that cannot leave logits out gives those of the whole row.
    """
    size = next(model.parameters()).element_size()
    step = max(1, LOGITS_BYTES // max(1, vocabulary_of(model) * size))
    if step >= tokens or not without_logits(model):
        return [slice(0, tokens)]
    return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]


def without_logits(model: nn.Module) -> dict[str, int]:
    """Arguments that spare a language model's logits but those of the last token."""
    known = inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in known else {}


@contextmanager
def one_pass(model: nn.Module | None) -> Iterator[None]:
    """Ask a language model several times for logits of the same rows, running its layers once.

    The first call's hidden states answer the later ones, so that forming logits in stretches costs
    nothing but the head. A model without a separate body (`base_model`) runs every time; None: for
    callers that ask once.
    """
    body: Any = getattr(model, "base_model", model)
    if body is model or not isinstance(body, nn.Module):  # None, or one that is all of it
        yield
        return
    before, forward = vars(body).get("forward"), body.forward
    kept: list[Any] = []

    def remembered(*args: Any, **kwargs: Any) -> Any:
        found = kept[0] if kept else forward(*args, **kwargs)
        if not kept and hasattr(found, "last_hidden_state"):
            kept.append(found)
        return found

    body.forward = remembered
    try:
        yield
    finally:
        if before is None:
            del body.forward
        else:
            body.forward = before
