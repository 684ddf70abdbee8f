"""Run an exported model: prefill, single steps, greedy generation, with states kept in place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reattend.errors import ArgumentError
from reattend.targets.onnx.buffers import StateBuffers, StateSpec
from reattend.targets.onnx.feeds import Progress
from reattend.targets.onnx.library import find_library, register
from reattend.targets.onnx.manifest import Manifest, read_manifest
from reattend.targets.onnx.runtime import started

Ids = Any
Array = np.ndarray[Any, Any]


class Session:
    """One exported model in ONNX Runtime, and at most one batch in progress.

    Letters: B batch, N new tokens, V vocabulary.

    Args:
        folder: what `export_onnx` wrote.
        providers: execution providers, most wanted first; the CPU's when not given. They must
            really start: ONNX Runtime falls back silently, this class does not.
        capacity: tokens to reserve per row; by default what a call needs. A call that needs more
            moves the states to larger buffers, which copies them once.
        threads: compute threads; ONNX Runtime's choice when not given.
        prefill_chunk: long prompts run in pieces of this many tokens, which bounds the memory of
            a call: the rows of a piece in every layer, and what its attention makes of them.
        library: reattend's own kernels (`reattend.targets.onnx.library`): a path, True for the
            built one, False for none. By default files of flavour `custom` use the built one.

    Raises:
        ModelError: the folder is not such an export.
        MissingExtraError: onnxruntime is not installed, a provider did not start, or the library
            is not there.
        ArgumentError: the library with another provider than the CPU's, or the export is of a model
            without states.
    """

    def __init__(
        self,
        folder: str | Path,
        providers: Sequence[str] | None = None,
        capacity: int | None = None,
        *,
        threads: int | None = None,
        prefill_chunk: int = 512,
        library: str | Path | bool | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.manifest: Manifest = read_manifest(self.folder)
        if self.manifest.whole:
            raise ArgumentError(
                "this export is of a model that does not decode from states",
                where=str(folder),
                next_step="open it with reattend.targets.onnx.EncoderSession",
            )
        own = self.manifest.flavour == "custom" if library is None else library

        def prepare(options: Any, wanted: list[str]) -> None:
            if own:
                path = library if isinstance(library, str | Path) else None
                register(options, find_library(path), wanted)

        self.ort = started(self.folder / self.manifest.file, providers, threads, prepare)
        self.capacity, self.prefill_chunk = capacity, prefill_chunk
        self._specs = [
            StateSpec(s.input, s.output, tuple(s.shape), s.ring) for s in self.manifest.states
        ]
        self._given = [v.name for v in self.ort.get_inputs() if not v.name.startswith("state.")]
        shapes = {entry.name: entry.shape for entry in self.manifest.outputs}
        self._vocabulary = int(shapes["logits"][-1])
        self._states: StateBuffers | None = None
        self._progress = Progress(np.ones((0, 0), np.int64))

    @property
    def states(self) -> StateBuffers:
        """The buffers of the batch in progress.

        Raises:
            ArgumentError: there is none; `prefill` comes first.
        """
        if self._states is None:
            raise ArgumentError("no batch is in progress", next_step="call prefill(ids) first")
        return self._states

    @property
    def seen(self) -> int:
        """Tokens of the batch in progress that were read, padding included."""
        return self._progress.seen

    def prefill(self, input_ids: Ids, attention_mask: Ids | None = None, reserve: int = 0) -> Array:
        """Start a new batch and read the prompt.

        Args:
            input_ids: [B, N].
            attention_mask: [B, N], 0 for padding on the left, 1 for tokens; all ones if not given.
            reserve: tokens that will follow; room for them is allocated now.

        Returns:
            Logits [B, N, V] in the model's dtype; those at padding mean nothing.

        Raises:
            ArgumentError: shapes do not fit, or padding is not on the left.
        """
        ids = _ids(input_ids)
        mask = np.ones_like(ids) if attention_mask is None else _ids(attention_mask)
        _check_mask(ids, mask)
        capacity = max(self.capacity or 0, ids.shape[1] + reserve)
        dtype = np.dtype(self.manifest.dtype)
        if (
            self._states is None
            or self._states.batch != ids.shape[0]
            or (self._states.capacity < capacity)
        ):
            self._states = StateBuffers(self._specs, dtype, ids.shape[0], capacity)
        self._states.restart()
        self._progress = Progress(mask)
        size = self.prefill_chunk
        pieces = [self._run(ids[:, at : at + size]) for at in range(0, ids.shape[1], size)]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, 1)

    def step(self, input_ids: Ids) -> Array:
        """Feed [B, N] more real tokens of the batch in progress; returns logits [B, N, V]."""
        states, ids = self.states, _ids(input_ids)
        if ids.shape[0] != states.batch or ids.shape[1] == 0:
            raise ArgumentError(
                "these tokens do not continue the batch in progress",
                why=f"they have shape {list(ids.shape)}, the batch has {states.batch} rows",
            )
        states.grow(self.seen + ids.shape[1], self.seen)
        return self._run(ids)

    def logits(self, input_ids: Ids, attention_mask: Ids | None = None) -> Array:
        """Logits [B, N, V] of whole sequences."""
        return self.prefill(input_ids, attention_mask)

    def generate(
        self,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        max_new_tokens: int = 64,
        eos_token_id: int | Sequence[int] | None = None,
    ) -> Array:
        """Greedy continuation.

        Args:
            input_ids: [B, N] prompt, padded on the left.
            attention_mask: as in `prefill`.
            max_new_tokens: most tokens to add.
            eos_token_id: ends a row; the manifest's when not given, none if that is empty. Rows
                that ended are filled with the manifest's pad id (or the first end id).

        Returns:
            Prompt and continuation, [B, N + new] int64.
        """
        ends = self._ends(eos_token_id)
        pad = self.manifest.generation.pad_token_id
        fill = pad if pad is not None else (ends[0] if ends else 0)
        ids = _ids(input_ids)
        done = np.zeros(ids.shape[0], bool)
        if max_new_tokens < 1:
            return ids
        last = self.prefill(ids, attention_mask, reserve=max_new_tokens)[:, -1]
        made = [ids]
        for index in range(max_new_tokens):
            token = np.where(done, fill, last.argmax(-1)).astype(np.int64)
            made.append(token[:, None])
            done |= np.isin(token, ends)
            if done.all() or index == max_new_tokens - 1:
                break
            last = self.step(token[:, None])[:, -1]
        return np.concatenate(made, 1)

    def _ends(self, given: int | Sequence[int] | None) -> list[int]:
        if given is None:
            return list(self.manifest.generation.eos_token_id)
        return [given] if isinstance(given, int) else list(given)

    def _run(self, ids: Array) -> Array:
        logits = np.empty((*ids.shape, self._vocabulary), self.states.dtype)
        feeds = self._progress.feeds(np.ascontiguousarray(ids))
        later_chunk = self._progress.seen > 0 and ids.shape[1] > 1
        limit = self.manifest.chunk_rows
        if limit is None or len(ids) <= limit or not later_chunk:
            self._call(self.states, feeds, logits)
        else:
            for row, states in enumerate(self.states.rows()):
                part = {name: array[row : row + 1] for name, array in feeds.items()}
                self._call(states, part, logits[row : row + 1])
        self._progress.seen += ids.shape[1]
        return logits

    def _call(self, states: StateBuffers, feeds: dict[str, Array], logits: Array) -> None:
        """One run of the graph, which writes into `logits` and the states."""
        binding = states.binding(self.ort)
        for name in self._given:  # a model without positions does not have that input
            binding.bind_cpu_input(name, feeds[name])
        binding.bind_output("logits", "cpu", 0, logits.dtype, logits.shape, logits.ctypes.data)
        self.ort.run_with_iobinding(binding)


def _ids(given: Ids) -> Array:
    array = np.asarray(given)
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
        raise ArgumentError(
            "token ids and masks must be whole numbers of shape [batch, length]",
            why=f"got {array.dtype} of shape {list(array.shape)}",
        )
    return np.ascontiguousarray(array, dtype=np.int64)


def _check_mask(ids: Array, mask: Array) -> None:
    if mask.shape != ids.shape or ids.size == 0:
        raise ArgumentError(
            "input_ids must not be empty and attention_mask must have its shape",
            why=f"{list(ids.shape)} and {list(mask.shape)}",
        )
    if not np.isin(mask, (0, 1)).all() or (np.diff(mask, axis=1) < 0).any():
        raise ArgumentError(
            "only padding on the left is supported",
            where="attention_mask",
            next_step='tokenize with padding_side="left"',
        )
