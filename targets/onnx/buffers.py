"""The state tensors of a running session: one buffer each, bound as input and as output.

ONNX Runtime does not know that both are the same memory; the graph is built so that this is safe:
nothing reads a state after its TensorScatter. So a step writes N rows and copies nothing. A chunk
on a state of bounded size first copies the rows it reads of it (`sparse_body.py`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

GROWTH = 256
_ROWS = re.compile(r"(\d*)C(?:/(\d+))?(?:\+(\d+))?$")


@dataclass(frozen=True)
class StateSpec:
    """A state tensor as the manifest lists it; `shape` holds letters B and C and numbers.

    C/64 is a row for every 64 tokens, rounded up; 3C/64+80 three for so many, and 80. One without a
    C is of bounded size: it is the same whatever the capacity is. In a `ring` token t stands in row
    t mod the number of rows.
    """

    input: str
    output: str
    shape: tuple[str | int, ...]
    ring: bool = False

    @property
    def row_axis(self) -> int | None:
        """Which axis grows with the capacity."""
        return next((i for i, s in enumerate(self.shape) if "C" in str(s)), None)

    def rows(self, tokens: int) -> int:
        """Rows of that axis that so many tokens have."""
        assert self.row_axis is not None
        each, block, more = _ROWS.findall(str(self.shape[self.row_axis]))[0]
        return int(each or 1) * -(-tokens // int(block or 1)) + int(more or 0)

    def sizes(self, batch: int, capacity: int) -> tuple[int, ...]:
        """The shape in numbers."""
        return tuple(
            s if isinstance(s, int) else batch if s == "B" else self.rows(capacity)
            for s in self.shape
        )


class StateBuffers:
    """State tensors of one batch.

    Args:
        specs: what the manifest lists.
        dtype: numpy dtype of the states.
        batch: rows.
        capacity: tokens that fit.
        arrays: memory to use; new and filled with zeros if not given.
    """

    def __init__(
        self,
        specs: list[StateSpec],
        dtype: np.dtype[Any],
        batch: int,
        capacity: int,
        arrays: list[np.ndarray[Any, Any]] | None = None,
    ) -> None:
        self.specs, self.dtype, self.batch, self.capacity = specs, dtype, batch, capacity
        self._hold(arrays or [np.zeros(s.sizes(batch, capacity), dtype) for s in specs])

    def _hold(self, arrays: list[np.ndarray[Any, Any]]) -> None:
        self.arrays, self.values = arrays, [self._new(array) for array in arrays]
        self._binding: Any = None
        self._rows: list[StateBuffers] = []

    def restart(self) -> None:
        """Forget the text before: a state of bounded size may hold a sum, which masks nothing."""
        for spec, array in zip(self.specs, self.arrays, strict=True):
            if spec.row_axis is None:
                array.fill(0)

    def rows(self) -> list[StateBuffers]:
        """Every row of the batch as a batch of one, in the same memory."""
        if not self._rows:
            self._rows = [
                StateBuffers(
                    self.specs, self.dtype, 1, self.capacity, [a[b : b + 1] for a in self.arrays]
                )
                for b in range(self.batch)
            ]
        return self._rows

    @staticmethod
    def _new(array: np.ndarray[Any, Any]) -> Any:
        import onnxruntime

        return onnxruntime.OrtValue.ortvalue_from_numpy(array)

    def pointers(self) -> list[int]:
        """Address of every buffer."""
        return [int(value.data_ptr()) for value in self.values]

    def bytes(self) -> int:
        """Memory held by all states."""
        items = sum(int(np.prod(s.sizes(self.batch, self.capacity))) for s in self.specs)
        return items * self.dtype.itemsize

    def binding(self, session: Any) -> Any:
        """A binding of `session` with every state as input and as output; made once, then reused.

        Binding a state takes longer than many an operator of a decode step.
        """
        if self._binding is None:
            self._binding = session.io_binding()
            for spec, value in zip(self.specs, self.values, strict=True):
                self._binding.bind_ortvalue_input(spec.input, value)
                self._binding.bind_ortvalue_output(spec.output, value)
        return self._binding

    def grow(self, needed: int, used: int) -> None:
        """Move to larger buffers if `needed` tokens do not fit: at least 1.5 times as large.

        Rows before `used` are copied; the rest is zero. This is the only time a state is copied.
        """
        if needed <= self.capacity:
            return
        wanted = max(needed, self.capacity + self.capacity // 2)
        capacity = -(-wanted // GROWTH) * GROWTH
        grown = []
        for spec, held in zip(self.specs, self.arrays, strict=True):
            if spec.row_axis is None:
                grown.append(held)
                continue
            array = np.zeros(spec.sizes(self.batch, capacity), self.dtype)
            every = (slice(None),) * spec.row_axis
            many = held.shape[spec.row_axis]
            if spec.ring:
                times = np.arange(max(0, used - many), used)
                array[(*every, times % array.shape[spec.row_axis])] = held[(*every, times % many)]
            else:
                rows = slice(0, min(spec.rows(used), many))
                array[(*every, rows)] = held[(*every, rows)]
            grown.append(array)
        self.capacity = capacity
        self._hold(grown)
