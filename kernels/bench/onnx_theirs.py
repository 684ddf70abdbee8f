"""The original as transformers' own exporter writes it: the peer of `onnx_decode.py`."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from transformers import DynamicCache, StaticCache

#: Positions beyond the context: steps that are timed.
ROOM = 64
Step = Callable[[], None]


class Theirs:
    """The original by transformers' exporter; `fixed`: StaticCache, one file per capacity."""

    def __init__(self, name: str, model: Any, folder: Path, fixed: bool) -> None:
        self.name, self.model, self.folder, self.fixed = name, model, folder, fixed
        config = model.config
        self.bytes_per_token = 4 * config.num_hidden_layers * 2 * config.num_key_value_heads * 32
        self.nodes: Counter[str] = Counter()
        self.sessions: dict[int, Any] = {}

    def _cache(self, past: torch.Tensor, capacity: int) -> Any:
        cache: Any = DynamicCache(config=self.model.config)
        if self.fixed:
            cache = StaticCache(config=self.model.config, max_cache_len=capacity)
        with torch.no_grad():
            self.model(past, past_key_values=cache, use_cache=True)
        return cache

    def _export(self, capacity: int) -> Any:
        path = self.folder / f"{self.name}-{capacity}.onnx"
        if not path.is_file():
            self._write(path, capacity)
        proto = onnx.load(path, load_external_data=False)
        self.nodes = Counter(
            f"{n.domain}::{n.op_type}" for n in proto.graph.node if n.domain == "com.microsoft"
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def _write(self, path: Path, capacity: int) -> None:
        import onnx_ir
        from transformers.exporters import OnnxConfig, OnnxExporter

        total = capacity if self.fixed else 8
        inputs = {
            "input_ids": torch.tensor([[5]]),
            "attention_mask": torch.ones(1, total, dtype=torch.int64),
            "position_ids": torch.tensor([[7]]),
            "past_key_values": self._cache(torch.full((1, 7), 5), capacity),
            "use_cache": True,
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = OnnxExporter().export(
                self.model, inputs, OnnxConfig(dynamic=not self.fixed, ort_fusions="cpu")
            )
        onnx_ir.save(made.program, str(path), external_data=f"{path.name}.data")

    def _binding(self, context: int, capacity: int, cache: Any, token: int) -> tuple[Any, Any]:
        key = capacity if self.fixed else 0
        if key not in self.sessions:
            self.sessions[key] = self._export(capacity)
        session = self.sessions[key]
        binding = session.io_binding()
        given = {
            "input_ids": np.array([[token]]),
            "attention_mask": np.ones((1, context + 1), np.int64),
            "position_ids": np.array([[context]]),
        }
        if self.fixed:
            given["attention_mask"] = (np.arange(capacity)[None] <= context).astype(np.int64)
        binding.bind_output("logits", "cpu")
        outputs = {o.name for o in session.get_outputs()}
        for value in session.get_inputs():
            if value.name in given:
                binding.bind_cpu_input(value.name, given[value.name])
                continue
            part, layer = value.name.split(".")[-1], int(value.name.split(".")[-2])
            array = np.array(context, np.int64)
            if part in ("keys", "values"):
                array = getattr(cache.layers[layer], part).numpy()
            held = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
            binding.bind_ortvalue_input(value.name, held)
            out = value.name.replace("input.", "output.", 1)
            if self.fixed and part in ("keys", "values") and out in outputs:
                binding.bind_ortvalue_output(out, held)
        if not self.fixed:
            for name in sorted(outputs - {"logits"}):
                binding.bind_output(name, "cpu")
        return session, binding

    def prepare(self, context: int) -> Step:
        """A step after `context` tokens."""
        capacity = context + ROOM
        cache = self._cache(torch.full((1, 2), 5), capacity)
        config = self.model.config
        rows = capacity if self.fixed else context
        for layer in cache.layers:
            shape = (1, config.num_key_value_heads, rows, 32)
            layer.keys, layer.values = 0.1 * torch.randn(shape), 0.1 * torch.randn(shape)
        session, binding = self._binding(context, capacity, cache, 5)
        return lambda: session.run_with_iobinding(binding)

    def logits(self, ids: torch.Tensor) -> np.ndarray:
        """Logits of the last token, fed as a step after the others."""
        context = ids.shape[1] - 1
        cache = self._cache(ids[:, :-1], context + ROOM)
        session, binding = self._binding(context, context + ROOM, cache, int(ids[0, -1]))
        session.run_with_iobinding(binding)
        found: np.ndarray = binding.get_outputs()[0].numpy()
        return found
