"""Calibration and evaluation data: many sources in, equal rows of token ids out.

Text is tokenised once, piece by piece, and packed into rows of `seq_len` tokens; reading stops as
soon as `tokens` tokens are there, so memory depends on `tokens` and never on the size of the
source. Readers of files live in `reattend.data_text`, sampling from the model itself in
`reattend.data_self`.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sized
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reattend.data_text import Piece, encode, pieces_of_path, pieces_of_texts
from reattend.errors import DataError

__all__ = ["Dataset", "load_data", "self_data"]

_TOKEN_KEYS = {"input_ids", "attention_mask", "labels"}


class Dataset:
    """Rows ready for a model, with a fingerprint of exactly what they hold.

    Args:
        blocks: one or more dicts of tensors that share their first dimension. Token data is one
            block with `input_ids` (S, N) int64 and `attention_mask` (S, N) int64.
        description: one line for reports: source, tokens, rows. No machine paths.
        seed: decides the order of `batches(epoch=...)`; the plain order is the source's.
    """

    def __init__(self, blocks: list[dict[str, Tensor]], *, description: str, seed: int = 0) -> None:
        self.blocks, self.description, self.seed = blocks, description, seed

    @property
    def rows(self) -> int:
        """Number of rows S over all blocks."""
        return sum(len(next(iter(block.values()))) for block in self.blocks)

    @property
    def tokens(self) -> int:
        """Real tokens (mask 1); for data without `input_ids`, rows."""
        total = 0
        for block in self.blocks:
            if "attention_mask" in block and "input_ids" in block:
                total += int(block["attention_mask"].sum())
            elif "input_ids" in block:
                total += block["input_ids"].numel()
            else:
                total += len(next(iter(block.values())))
        return total

    @property
    def packed(self) -> tuple[Tensor, Tensor]:
        """`input_ids_SN` and `attention_mask_SN` of token data.

        Raises:
            DataError: the data is not rows of tokens (pixels, several blocks of other inputs).
        """
        if len(self.blocks) == 1 and set(self.blocks[0]) == {"input_ids", "attention_mask"}:
            return self.blocks[0]["input_ids"], self.blocks[0]["attention_mask"]
        raise DataError(
            "This measurement needs rows of token ids.",
            where=self.description,
            why=f"the data holds {sorted(self.blocks[0])}",
            next_step="pass text, or tensors of token ids.",
        )

    @property
    def fingerprint(self) -> str:
        """sha256 over names, shapes and bytes of every tensor; equal data gives equal text."""
        digest = hashlib.sha256()
        for block in self.blocks:
            for name in sorted(block):
                tensor = block[name].detach().cpu().contiguous()
                digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def batches(
        self, batch_size: int = 8, *, epoch: int | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """Batches of at most `batch_size` rows: `input_ids` (B, N), `attention_mask` (B, N).

        Args:
            batch_size: rows per batch; the last one of a block may be smaller.
            epoch: None keeps the source's order; a number shuffles by (seed, epoch).
        """
        if batch_size < 1:
            raise DataError("batch_size must be at least 1.", why=f"got {batch_size}")
        order = torch.Generator().manual_seed(self.seed * 1_000_003 + (epoch or 0))
        indices = range(len(self.blocks))
        shuffled = torch.randperm(len(self.blocks), generator=order).tolist()
        for index in indices if epoch is None else shuffled:
            block = self.blocks[index]
            rows = len(next(iter(block.values())))
            pick = torch.arange(rows) if epoch is None else torch.randperm(rows, generator=order)
            for chosen in pick.split(batch_size):
                yield {name: tensor[chosen] for name, tensor in block.items()}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self.batches()

    def take(self, rows: int) -> Dataset:
        """`rows` rows at even distances over the whole source (all of them if there are fewer)."""
        ids_SN, mask_SN = self.packed
        total = len(ids_SN)
        if rows >= total:
            return self
        pick = torch.arange(rows) * total // rows
        description = f"{rows} of {total} rows, evenly spaced, of {self.description}"
        block = {"input_ids": ids_SN[pick], "attention_mask": mask_SN[pick]}
        return Dataset([block], description=description, seed=self.seed)


def load_data(
    source: Any, tokenizer: Any = None, *, seq_len: int, tokens: int | None = None, seed: int = 0
) -> Dataset:
    """Read a source into rows of `seq_len` tokens.

    Args:
        source: path of a `.txt` file, a `.jsonl` file (`text`, or `messages` through the chat
            template) or a folder of those (sorted, recursive); list or stream of strings; tensor,
            dict of tensors, or stream of either. Integer tensors and dicts of `input_ids` with an
            optional `attention_mask` (labels are ignored) are cut to rows of `seq_len`, the rest
            padded on the right and masked. Dicts with other inputs pass through unchanged.
        tokenizer: Hugging Face tokenizer; needed for text only.
        seq_len: tokens per row N.
        tokens: at most this many tokens are read (rounded down to whole rows); None reads all.
        seed: order of shuffled batches.

    Raises:
        DataError: missing, empty, unreadable or too short source, or text without a tokenizer.
    """
    if isinstance(source, Dataset):
        return source
    if seq_len < 2:
        raise DataError("seq_len must be at least 2.", why=f"got {seq_len}")
    if tokens is not None and tokens < seq_len:
        raise DataError(
            "The token budget does not fill one row.",
            why=f"tokens={tokens} < seq_len={seq_len}",
            next_step=f"set tokens to {seq_len} or more, or seq_len to {max(2, tokens)} or less.",
        )
    if isinstance(source, str | Path):
        name = Path(source).name
        return _pack(pieces_of_path(source), tokenizer, seq_len, tokens, seed, name)
    if isinstance(source, Tensor | Mapping):
        source = [source]
    if not isinstance(source, Iterable):
        raise DataError(
            f"Data of type {type(source).__name__} is not understood.",
            next_step="pass a path, a list of strings, or an iterable of tensors.",
        )
    if tokens is None and not isinstance(source, Sized):
        raise DataError(
            "A stream needs a bound.",
            why="it may be endless and tokens is not set",
            next_step="pass tokens=200_000 or another number.",
        )
    stream = iter(source)
    first = next(stream, None)
    if first is None:
        raise DataError("The data is empty.", why="it has no item")
    items = chain([first], stream)
    if isinstance(first, str):
        return _pack(pieces_of_texts(items), tokenizer, seq_len, tokens, seed, "texts")
    return _collect(items, seq_len, tokens, seed)


def _pack(
    pieces: Iterator[Piece],
    tokenizer: Any,
    seq_len: int,
    tokens: int | None,
    seed: int,
    name: str,
) -> Dataset:
    """Tokenise pieces until the budget is reached and cut the result into full rows."""
    if tokenizer is None:
        raise DataError(
            "Text data needs a tokenizer.",
            where=name,
            next_step="pass tokenizer=..., or token ids as tensors.",
        )
    if not callable(tokenizer):
        raise DataError(
            f"Not a tokenizer: {type(tokenizer).__name__}.",
            next_step="pass one of transformers: AutoTokenizer.from_pretrained(folder).",
        )
    budget = None if tokens is None else tokens // seq_len * seq_len
    ids = array("q")
    for piece in pieces:
        ids.extend(encode(piece, tokenizer, after_other=len(ids) > 0))
        if budget is not None and len(ids) >= budget:
            break
    rows = (len(ids) if budget is None else min(len(ids), budget)) // seq_len
    if rows == 0:
        raise DataError(
            "The data is too short for one row.",
            where=name,
            why=f"{len(ids)} tokens read, one row needs seq_len={seq_len}: "
            f"{seq_len - len(ids)} are missing",
            next_step=f"pass more text, or seq_len={len(ids)} or less.",
        )
    ids_SN = torch.tensor(ids[: rows * seq_len], dtype=torch.int64).view(rows, seq_len)
    description = f"{name}: {rows * seq_len} tokens, {rows} rows of {seq_len}"
    block = {"input_ids": ids_SN, "attention_mask": torch.ones_like(ids_SN)}
    return Dataset([block], description=description, seed=seed)


def _collect(items: Iterator[Any], seq_len: int, tokens: int | None, seed: int) -> Dataset:
    """Cut token tensors into rows, or keep batches with other inputs as they are."""
    ids_rows: list[Tensor] = []
    mask_rows: list[Tensor] = []
    raw: list[dict[str, Tensor]] = []
    count = 0
    for number, item in enumerate(items, start=1):
        batch = _as_batch(item, number)
        if "input_ids" not in batch or not set(batch) <= _TOKEN_KEYS:
            raw.append(batch)
            ids = batch.get("input_ids")
            count += len(next(iter(batch.values()))) if ids is None else ids.numel()
        else:
            ids_BN = batch["input_ids"].reshape(-1, batch["input_ids"].shape[-1]).long()
            mask_BN = batch.get("attention_mask", torch.ones_like(ids_BN)).reshape(ids_BN.shape)
            for ids_N, mask_N in zip(ids_BN, mask_BN, strict=True):
                for row in ids_N[mask_N.bool()].split(seq_len):
                    if len(row) < 2:  # nothing to predict
                        continue
                    gap = seq_len - len(row)
                    ids_rows.append(torch.nn.functional.pad(row, (0, gap)))
                    mask_rows.append(torch.nn.functional.pad(torch.ones_like(row), (0, gap)))
                    count += len(row)
        if raw and ids_rows:
            raise DataError("Batches of different kinds in one source.", where=f"item {number}")
        if tokens is not None and count >= tokens:
            break
    if raw:
        names = ", ".join(sorted(raw[0]))
        return Dataset(raw, description=f"{len(raw)} batches of {names}", seed=seed)
    if not ids_rows:
        raise DataError("The data has no row of at least 2 tokens.", where="tensors")
    rows = len(ids_rows) if tokens is None else min(len(ids_rows), -(-tokens // seq_len))
    ids_SN, mask_SN = torch.stack(ids_rows[:rows]), torch.stack(mask_rows[:rows])
    description = f"tensors: {int(mask_SN.sum())} tokens, {rows} rows of {seq_len}"
    block = {"input_ids": ids_SN, "attention_mask": mask_SN}
    return Dataset([block], description=description, seed=seed)


def _as_batch(item: Any, number: int) -> dict[str, Tensor]:
    """One item of a stream as a dict of CPU tensors.

    Raises:
        DataError: not a tensor or dict of tensors, or token ids that cannot be ids.
    """
    batch = {"input_ids": item} if isinstance(item, Tensor) else item
    if not isinstance(batch, Mapping) or not batch:
        raise DataError(
            f"An item of type {type(item).__name__} is not understood.",
            where=f"item {number}",
            next_step="pass tensors, dicts of tensors, or strings, one kind in one source.",
        )
    bad = [
        name for name, value in batch.items() if not isinstance(value, Tensor) or not value.dim()
    ]
    if bad:
        raise DataError("Not a tensor with rows.", where=f"item {number}, key {bad[0]!r}")
    ids = batch.get("input_ids")
    if ids is not None and (ids.is_floating_point() or (ids.numel() and int(ids.min()) < 0)):
        raise DataError(
            "Token ids must be integers from 0.", where=f"item {number}", why=f"dtype {ids.dtype}"
        )
    return {name: value.detach().cpu() for name, value in batch.items()}


def self_data(
    model: Any, *, sequences: int = 64, length: int | None = None, seed: int = 0
) -> Dataset:
    """Sequences sampled from the model; see `reattend.data_self.self_data`."""
    from reattend.data_self import sample_rows

    ids_SN, description = sample_rows(model, sequences=sequences, length=length, seed=seed)
    block = {"input_ids": ids_SN, "attention_mask": torch.ones_like(ids_SN)}
    return Dataset([block], description=description, seed=seed)
