"""Data sampled from the model itself, for statistics when the user has no text at hand.

Such sequences follow the model's own distribution, so second moments of its activations are close
to those on real text; they carry nothing to learn from, so no training stage accepts them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reattend.errors import DataError

DEFAULT_LENGTH = 256
_BATCH = 16
_NEXT = (
    'pass text: convert(..., data="calibration.txt", tokenizer=tokenizer), or --data on the CLI.'
)


def sample_rows(model: Any, *, sequences: int, length: int | None, seed: int) -> tuple[Tensor, str]:
    """Sample rows by ancestral sampling at temperature 1 from the full vocabulary.

    Each starts at the beginning-of-text token (a seeded random token where there is none); the end
    token is not drawn, so that every row is full. The global random state is left as it was.

    Args:
        model: a causal LM of transformers.
        sequences: rows S.
        length: tokens per row N; None: 256, or the model's longest position if that is less.
        seed: of the sampling.

    Returns:
        `ids_SN` int64 on the CPU, and the line for the report.

    Raises:
        DataError: the model cannot generate, or needs an input to generate from.
    """
    check_can_sample(model)
    config = model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None) or DEFAULT_LENGTH
    length = min(DEFAULT_LENGTH, limit) if length is None else length
    if length < 2 or length > limit:
        raise DataError(
            "The length of sampled sequences is out of range.",
            why=f"length={length}, the model takes 2 to {limit} positions",
        )
    from transformers import GenerationConfig

    defaults = getattr(model, "generation_config", None)
    ends = getattr(defaults, "eos_token_id", None) or config.eos_token_id
    settings = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_beams=1, repetition_penalty=1.0,
        min_new_tokens=length - 1, max_new_tokens=length - 1, use_cache=True,
        eos_token_id=ends, pad_token_id=_first(ends) or 0,
    )  # fmt: skip
    device = next(model.parameters()).device
    starts_S = _starts(config, sequences, seed)
    cuda = [device] if device.type == "cuda" else []
    training, rows = model.training, []
    model.eval()
    try:
        with torch.random.fork_rng(devices=cuda), torch.inference_mode():
            torch.manual_seed(seed)
            for start_B in starts_S.split(_BATCH):
                ids_B1 = start_B[:, None].to(device)
                sampled_BN = model.generate(
                    input_ids=ids_B1,
                    attention_mask=torch.ones_like(ids_B1),
                    generation_config=settings,
                )
                rows.append(sampled_BN.cpu())
    finally:
        model.train(training)
    ids_SN = torch.cat(rows).clone()
    return ids_SN, f"self: {sequences} sequences of {length} tokens sampled from the model itself"


def check_can_sample(model: Any) -> None:
    """Refuse models that cannot produce text from nothing.

    Raises:
        DataError: with the `data=` line to paste.
    """
    config = getattr(model, "config", None)
    can = getattr(model, "can_generate", None)
    if config is None or can is None or not can():
        raise DataError(
            "No data was given and the model cannot make its own.",
            where=type(model).__name__,
            why="it has no generate()",
            next_step=_NEXT,
        )
    if getattr(config, "is_encoder_decoder", False):
        raise DataError(
            "No data was given and the model cannot make its own.",
            where=type(model).__name__,
            why="its decoder generates from an encoder input, and there is none",
            next_step=_NEXT,
        )


def _starts(config: Any, sequences: int, seed: int) -> Tensor:
    """First token of every row, `starts_S`."""
    first = _first(config.bos_token_id)
    if first is not None:
        return torch.full((sequences,), first, dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, int(config.vocab_size), (sequences,), generator=generator)


def _first(token: Any) -> int | None:
    """Configs hold one id, a list of ids or None."""
    first: int | None = token[0] if isinstance(token, list) else token
    return first
