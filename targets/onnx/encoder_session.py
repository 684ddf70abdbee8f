"""Run an exported model without states: one call, or the passes that fill in a text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from reattend.errors import ArgumentError
from reattend.targets.onnx.manifest import PASS, Manifest, read_manifest
from reattend.targets.onnx.runtime import started

Array = np.ndarray[Any, Any]


class EncoderSession:
    """One exported encoder in ONNX Runtime.

    Args:
        folder: what `export_onnx` wrote of a model without caches.
        providers: execution providers, most wanted first; the CPU's when not given.
        threads: compute threads; ONNX Runtime's choice when not given.

    Raises:
        ModelError: the folder is not an export.
        MissingExtraError: onnxruntime is not installed, or a provider did not start.
        ArgumentError: the export decodes from states.
    """

    def __init__(
        self,
        folder: str | Path,
        providers: Sequence[str] | None = None,
        *,
        threads: int | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.manifest: Manifest = read_manifest(self.folder)
        if not self.manifest.whole:
            raise ArgumentError(
                "this export decodes token by token from states",
                where=str(folder),
                next_step="open it with reattend.targets.onnx.Session",
            )
        self.ort = started(self.folder / self.manifest.file, providers, threads)
        self._own = {
            e.name: e
            for e in self.manifest.inputs
            if e.name not in PASS and not e.name.startswith("state.")
        }
        mask = self._own.get("attention_mask")
        is_left_out = mask is not None and len(mask.shape) == 2 and "input_ids" in self._own
        self._optional = {"attention_mask"} if is_left_out else set()
        self._passes = (0, 0)
        self._number = 0
        self._states: dict[str, Array] = {}
        self._shape: tuple[int, ...] = ()

    def run(self, **inputs: Any) -> dict[str, Array]:
        """The model's result.

        Args:
            inputs: arrays by the names in the manifest; a text without `attention_mask`: all tokens
                count.

        Returns:
            Outputs by name.

        Raises:
            ArgumentError: an input is missing or unknown, or a text in passes is padded or changed.
        """
        known = set(self._own)
        missing = known - set(inputs) - self._optional
        if missing or set(inputs) - known:
            wrong = sorted(missing or set(inputs) - known)
            raise ArgumentError(
                f"{'missing' if missing else 'unknown'} input: {', '.join(wrong)}",
                next_step=f"the file takes {', '.join(self._own)}",
            )
        feeds = {
            name: np.ascontiguousarray(value, dtype=np.dtype(self._own[name].dtype))
            for name, value in inputs.items()
        }
        for name in self._optional - set(inputs):
            dtype = np.dtype(self._own[name].dtype)
            feeds[name] = np.ones_like(feeds["input_ids"], dtype)
        if self.manifest.states:
            feeds |= self._around(feeds)
        names = [entry.name for entry in self.manifest.outputs]
        result = dict(zip(names, self.ort.run(names, feeds), strict=True))
        for state in self.manifest.states:
            self._states[state.input] = result.pop(state.output)
        return result

    @contextmanager
    def denoising(self, steps: int, new_tokens: int = 0) -> Iterator[None]:
        """Inside, calls are the passes that fill in one text; as `reattend.denoising`.

        Args:
            steps: passes that the text takes.
            new_tokens: tokens at its end that are filled in.

        Raises:
            ArgumentError: the file has no heads that read what they saw, or it is inside already.
        """
        if not self.manifest.states or steps < 1 or new_tokens < 0 or self._passes[0]:
            raise ArgumentError(
                f"denoising was given steps={steps}, new_tokens={new_tokens}",
                why="it tells a file with `select: {kind: observed}`, one text at a time, which "
                "passes share a text",
                next_step="convert with plan `sparsed`, and pass steps >= 1, new_tokens >= 0",
            )
        self._passes, self._number = (steps, new_tokens), 0
        try:
            yield
        finally:
            self._passes, self._states = (0, 0), {}

    def _around(self, feeds: dict[str, Array]) -> dict[str, Array]:
        """Which pass this is, and what those before it saw."""
        shape = feeds[next(iter(self._own))].shape
        if "attention_mask" in feeds and not feeds["attention_mask"].all():
            raise ArgumentError(
                "a file whose heads read blocks of a text was given padding",
                why="blocks are counted from the first token of every row",
                next_step="run texts of one length together",
            )
        self._number += 1
        if not self._passes[0] or self._number == 1:
            self._shape, self._states = shape, {}
        if shape != self._shape:
            raise ArgumentError(
                "an input changed its length or another size between passes",
                why="later passes read the blocks that an earlier pass over the same input found",
                next_step="begin another `with session.denoising(...)` for another input",
            )
        for s in self.manifest.states:
            if s.input not in self._states:
                self._states[s.input] = np.zeros((shape[0], int(s.shape[1]), 1, 1), np.int64)
        told = (self._number if self._passes[0] else 0, *self._passes)
        return {n: np.array([x], np.int64) for n, x in zip(PASS, told, strict=True)} | self._states
